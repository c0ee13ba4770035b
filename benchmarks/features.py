"""`python -m benchmarks.features [--rounds N] [--json]`: 90 days of two symbols as features, and one minute more.

Ours against the same features written down as anybody would, in polars, and a quarter of them in pandas and DuckDB. The plain ways begin with candles that have no gaps, know of no readiness,
no halts and no publication times, and join funding row by row. Each row times two ways of the same work in turn and prints the median ratio; the values are compared first.
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import duckdb
import numpy as np
import pandas as pd
import polars as pl
from rich.console import Console
from rich.table import Table

from realdeal.features import FEATURES, NAMES, STEP, WARMUP_MINUTES, Window, panel
from realdeal.market import funding, generate
from realdeal.store import dense
from realdeal.types import DAY, HOUR, Bar

START, DAYS, SYMBOLS = 1_704_067_200_000, 90, ("BTC/USDT", "ETH/USDT")
END = START + DAYS * DAY
ROWS = {"15m": 1, "30m": 2, "1h": 4, "2h": 8, "4h": 16, "8h": 32, "12h": 48, "1d": 96, "2d": 192, "3d": 288, "7d": 672, "14d": 1344}
Frames = dict[str, pl.DataFrame]
c = pl.col


def data(days: int = DAYS) -> tuple[Frames, Frames]:
    """Candles without gaps, and rates."""
    made = generate("realistic", list(SYMBOLS), START, days * 1440, seed=7)
    candles = {k: pl.DataFrame(dict(zip(("time", "open", "high", "low", "close", "volume"), x.columns, strict=True))).with_columns(origin=pl.lit("venue")) for k, x in made.items()}
    first = max(x["time"][0] for x in candles.values())
    rates = {k: funding(k, START, days * 1440, seed=7) for k in SYMBOLS}
    return ({k: dense(x, first, START + days * DAY) for k, x in candles.items()}, {k: pl.DataFrame({"time": r.times, "rate": r.rates}) for k, r in rates.items()})


def bars(df: pl.DataFrame) -> pl.DataFrame:
    """15-minute bars by closing time."""
    r = c("r")
    return df.with_columns(r=(c("close") / c("open")).log(), end=(c("time") // STEP + 1) * STEP).group_by("end", maintain_order=True).agg(
        c("high").max(), c("low").min(), c("close").last(), c("volume").sum(), rv=(r**2).sum(), up=(r.clip(0) ** 2).sum(), bv=(r * r.shift(1)).abs().sum(), cov1=(r * r.shift(1)).sum(),
        flow=(c("volume") * r.sign()).sum(), last5=r.tail(5).sum()).rename({"end": "time"})


def plain() -> dict[str, pl.Expr]:
    """The features as rolling expressions on bars, without names for what they share."""
    def ret(n: int, price: str = "close") -> pl.Expr: return (c(price) / c(price).shift(n)).log()
    def mean(x: str | pl.Expr, n: int) -> pl.Expr: return (c(x) if isinstance(x, str) else x).rolling_mean(n)
    def total(x: str | pl.Expr, n: int) -> pl.Expr: return (c(x) if isinstance(x, str) else x).rolling_sum(n)
    def vol(n: int, rv: str = "rv") -> pl.Expr: return mean(rv, n).sqrt()
    def scaled(n: int) -> pl.Expr: return ret(n) / (vol(96) * math.sqrt(n))
    def peer(n: int) -> pl.Expr: return ret(n, "peer_close") / (vol(96, "peer_rv") * math.sqrt(n))
    def pairs(*labels: str) -> list[tuple[str, int, int]]: return [(x, ROWS[x.split("_")[0]], ROWS[x.split("_")[1]]) for x in labels]
    def low(n: int) -> pl.Expr: return c("low").rolling_min(n)
    def high(n: int) -> pl.Expr: return c("high").rolling_max(n)
    r, other, t, lap = ret(1), ret(1, "peer_close"), c("time"), 2 * math.pi
    week = ((t + 3 * DAY) % (7 * DAY)) * (lap / (7 * DAY))
    out = {"ret_5m": c("last5") / (vol(96) * math.sqrt(1 / 3)), **{f"ret_{x}": scaled(n) for x, n in ROWS.items()}}
    out |= {f"vol_{x}": (vol(n) / vol(m)).log() for x, n, m in pairs("1h_1d", "4h_1d", "4h_7d", "1d_7d", "7d_14d")} | {"vol_1d": vol(96).log()}
    out |= {"semi_1d": 2 * total("up", 96) / total("rv", 96) - 1, "jump_1d": 1 - total("bv", 96) / total("rv", 96) * (math.pi / 2 * 15 / 14)}
    out |= {"park_1d": (total((c("high") / c("low")).log() ** 2, 96) / total("rv", 96) / (4 * math.log(2))).log() / 2}
    out |= {f"range_{x}": (c("close") - low(ROWS[x])) / (high(ROWS[x]) - low(ROWS[x])) - 0.5 for x in ("4h", "1d", "3d", "7d", "14d")}
    out |= {f"{x}_7d": (c("close") / e).log() / (vol(96) * math.sqrt(672)) for x, e in (("high", high(672)), ("low", low(672)))}
    out |= {f"volume_{x}": (mean("volume", n) / mean("volume", m)).log() for x, n, m in pairs("15m_1d", "1h_7d", "1d_7d")}
    out |= {f"flow_{x}": total("flow", ROWS[x]) / total("volume", ROWS[x]) for x in ("15m", "1h", "4h", "1d", "3d")}
    out |= {"diverge_4h": total("flow", 16) / total("volume", 16) - ret(16) / total(r.abs(), 16)}
    quote = c("volume") * c("close")
    out |= {"illiq_1d_7d": (total(r.abs(), 96) / total(quote, 96) / (total(r.abs(), 672) / total(quote, 672))).log()}
    out |= {f"autocorr_{x}": total("cov1", ROWS[x]) / total("rv", ROWS[x]) for x in ("4h", "1d")}
    out |= {f"autocorr15_{x}": total(r * r.shift(1), ROWS[x] - 1) / total(r**2, ROWS[x]) for x in ("1d", "7d")}
    out |= {f"skew_{x}": math.sqrt(ROWS[x]) * total(r**3, ROWS[x]) / total(r**2, ROWS[x]) ** 1.5 for x in ("1d", "7d")}
    out |= {f"trend_{x}": ret(ROWS[x]) / total(r.abs(), ROWS[x]) for x in ("4h", "1d", "7d")}
    out |= {f"peer_ret_{x}": peer(ROWS[x]) for x in ("15m", "1h", "4h", "1d", "7d")} | {f"lead_{x}": peer(ROWS[x]) - scaled(ROWS[x]) for x in ("15m", "1h", "4h")}
    out |= {f"corr_{x}": total(r * other, ROWS[x]) / (total(r**2, ROWS[x]) * total(other**2, ROWS[x])).sqrt() for x in ("1d", "7d")}
    beta = total(r * other, 672) / total(other**2, 672)
    out |= {f"residual_{x}": (ret(ROWS[x]) - beta * ret(ROWS[x], "peer_close")) / (vol(96) * math.sqrt(ROWS[x])) for x in ("4h", "1d")}
    out |= {"volume_peer": (mean("volume", 4) / mean("volume", 672) / (mean("peer_volume", 4) / mean("peer_volume", 672))).log()}
    out |= {"funding": c("rate") * 1e4, "funding_change": c("change") * 1e4, "funding_3d": c("mean3") * 1e4, "funding_7d": c("mean7") * 1e4}
    return out | {"to_funding": 8 - t % (8 * HOUR) / HOUR, "hour_sin": (t % DAY * (lap / DAY)).sin(), "hour_cos": (t % DAY * (lap / DAY)).cos(), "week_sin": week.sin(), "week_cos": week.cos()}


def plain_polars(candles: Frames, rates: Frames) -> Frames:
    """By symbol: bars, what it needs of the other one, the rates, one select."""
    made = {k: bars(x) for k, x in candles.items()}
    out = {}
    for k, g in made.items():
        other = next(x for s, x in made.items() if s != k).select("time", peer_close="close", peer_rv="rv", peer_volume="volume")
        settled = rates[k].with_columns(change=c("rate").diff(), mean3=c("rate").rolling_mean(9), mean7=c("rate").rolling_mean(21))
        out[k] = g.join(other, on="time", how="left", maintain_order="left").join_asof(settled, on="time").select("time", **plain())
    return out


FEW = ("ret_1h", "ret_4h", "ret_1d", "ret_7d", "vol_1h_1d", "vol_4h_7d", "vol_1d", "semi_1d", "jump_1d", "range_4h", "range_1d", "range_7d", "volume_1h_7d", "flow_1h", "flow_1d", "autocorr_1d", "hour_sin")
MADE = [f for f in FEATURES if f.name in FEW]


def plain_pandas(candles: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """A quarter of the features, of one symbol at a time."""
    out = {}
    for k, x in candles.items():
        r = np.log(x.close / x.open)
        x = x.assign(end=(x.time // STEP + 1) * STEP, rv=r**2, up=r.clip(lower=0) ** 2, flow=x.volume * np.sign(r), cov=(r * r.shift(1)).where(x.time % STEP != 0, 0.0)).assign(bv=lambda y: y["cov"].abs())
        g = x.groupby("end", sort=False).agg(high=("high", "max"), low=("low", "min"), close=("close", "last"), **{n: (n, "sum") for n in ("volume", "rv", "up", "bv", "cov", "flow")})
        sigma, f = np.sqrt(g.rv.rolling(96).mean()), pd.DataFrame(index=g.index)
        for n in ("1h", "4h", "1d", "7d"): f[f"ret_{n}"] = np.log(g.close / g.close.shift(ROWS[n])) / (sigma * math.sqrt(ROWS[n]))
        for a, b in (("1h", "1d"), ("4h", "7d")): f[f"vol_{a}_{b}"] = np.log(g.rv.rolling(ROWS[a]).mean() / g.rv.rolling(ROWS[b]).mean()) / 2
        f["vol_1d"], rv = np.log(sigma), g.rv.rolling(96).sum()
        f["semi_1d"], f["jump_1d"], f["autocorr_1d"] = 2 * g.up.rolling(96).sum() / rv - 1, 1 - g.bv.rolling(96).sum() / rv * (math.pi / 2 * 15 / 14), g["cov"].rolling(96).sum() / rv
        for n in ("4h", "1d", "7d"):
            low, high = g.low.rolling(ROWS[n]).min(), g.high.rolling(ROWS[n]).max()
            f[f"range_{n}"] = (g.close - low) / (high - low) - 0.5
        f["volume_1h_7d"] = np.log(g.volume.rolling(4).mean() / g.volume.rolling(672).mean())
        for n in ("1h", "1d"): f[f"flow_{n}"] = g.flow.rolling(ROWS[n]).sum() / g.volume.rolling(ROWS[n]).sum()
        f["hour_sin"] = np.sin(g.index.to_numpy() % DAY * (2 * math.pi / DAY))
        out[k] = f
    return out


def plain_duckdb(db: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """The same quarter in SQL, of both symbols at once, from a table in memory."""
    def over(f: str, n: int) -> str: return f"{f} over (partition by s order by e rows {n - 1} preceding)"
    def lag(n: int) -> str: return f"lag(close, {n}) over (partition by s order by e)"
    sigma = f"sqrt({over('avg(rv)', 96)})"
    cols = [f"ln(close / {lag(ROWS[n])}) / ({sigma} * sqrt({ROWS[n]})) as ret_{n}" for n in ("1h", "4h", "1d", "7d")]
    cols += [f"ln({over('avg(rv)', ROWS[a])} / {over('avg(rv)', ROWS[b])}) / 2 as vol_{a}_{b}" for a, b in (("1h", "1d"), ("4h", "7d"))]
    cols += [f"ln({sigma}) as vol_1d", *(f"{sign} {factor} * {over(f'sum({x})', 96)} / {over('sum(rv)', 96)} {more} as {name}" for name, x, sign, factor, more in (
        ("semi_1d", "up", "", "2", "- 1"), ("jump_1d", "bv", "1 -", "(pi() / 2 * 15 / 14)", ""), ("autocorr_1d", "cov", "", "1", "")))]
    cols += [f"(close - {over('min(low)', ROWS[n])}) / ({over('max(high)', ROWS[n])} - {over('min(low)', ROWS[n])}) - 0.5 as range_{n}" for n in ("4h", "1d", "7d")]
    cols += [f"ln({over('avg(volume)', 4)} / {over('avg(volume)', 672)}) as volume_1h_7d", *(f"{over('sum(flow)', ROWS[n])} / {over('sum(volume)', ROWS[n])} as flow_{n}" for n in ("1h", "1d"))]
    return pl.DataFrame(db.sql(f"""
        with m as (select *, ln(close / open) as r, (time // {STEP} + 1) * {STEP} as e from minutes),
        p as (select *, case when time % {STEP} = 0 then 0 else r * lag(r) over (partition by s order by time) end as q from m),
        b as (select s, e, max(high) as high, min(low) as low, arg_max(close, time) as close, sum(volume) as volume, sum(r * r) as rv, sum(case when r > 0 then r * r else 0 end) as up,
            sum(abs(q)) as bv, sum(q) as cov, sum(volume * sign(r)) as flow from p group by s, e)
        select s, e as time, {", ".join(cols)}, sin(e % {DAY} * (2 * pi() / {DAY})) as hour_sin from b order by s, e""").to_arrow_table())


def table_of(candles: Frames) -> duckdb.DuckDBPyConnection:
    """A database in memory with all minutes in one table."""
    db = duckdb.connect()
    db.register("whole", pl.concat([x.with_columns(s=pl.lit(k)) for k, x in candles.items()]).to_arrow())
    db.sql("create table minutes as select * from whole")
    return db


def agree(candles: Frames, rates: Frames, frames: dict[str, pd.DataFrame], db: duckdb.DuckDBPyConnection) -> None:
    """Where all of them are warm, all ways give the same numbers."""
    ours = panel(candles, rates, END)
    warm = ours.times > START + 16 * DAY
    def same(name: str, theirs: np.ndarray, names: tuple[str, ...]) -> None:
        mine = ours.X[:, [NAMES.index(n) for n in names]]
        bad = [n for j, n in enumerate(names) if not np.allclose(mine[warm, j], np.where(np.isfinite(theirs[warm, j]), theirs[warm, j], np.nan), rtol=1e-6, atol=1e-8, equal_nan=True)]
        assert not bad, f"{name} differs in {', '.join(bad)}"
    same("polars", pl.concat(plain_polars(candles, rates).values()).select(NAMES).to_numpy(), NAMES)
    same("pandas", np.concatenate([f[list(FEW)].to_numpy() for f in plain_pandas(frames).values()]), FEW)
    same("DuckDB", plain_duckdb(db).select(FEW).to_numpy(), FEW)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def minutes(days: int = 5) -> tuple[int, dict[str, float]]:
    """How long one minute of both symbols takes, in ms: by the clock, which other processes of the machine lengthen, and of the processor."""
    candles, rates = data(20 + days)
    at = START + 20 * DAY
    w = Window({k: x.filter(c("time") < at) for k, x in candles.items()}, rates, at)
    took, cpu = [], []
    for rows in zip(*(x.filter(c("time") >= at).iter_rows() for x in candles.values()), strict=True):
        new = [Bar(*row) for row in rows]
        began = time.process_time()
        took.append(timed(lambda new=new: [w.append(k, b) for k, b in zip(SYMBOLS, new, strict=True)]))  # type: ignore[misc]
        cpu.append((time.process_time() - began) * 1000)
    closing = took[14::15]
    return len(took), {"p50": float(np.percentile(took, 50)), "p99": float(np.percentile(took, 99)), "p50 of those that close a bar": statistics.median(closing), "p99 of those": float(np.percentile(closing, 99)),
                       "p99 of the processor": float(np.percentile(cpu, 99))}


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m benchmarks.features", description=__doc__, epilog="Example: python -m benchmarks.features --rounds 9 --json")
    args.add_argument("--rounds", type=int, default=11, help="pairs of runs of each row, after one warm-up")
    args.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = args.parse_args()
    candles, rates = data()
    frames, db = {k: x.to_pandas() for k, x in candles.items()}, table_of(candles)
    agree(candles, rates, frames, db)
    def ours() -> object: return panel(candles, rates, END)
    def few() -> object: return panel(candles, {}, END, features=MADE)
    last = {k: x.tail(WARMUP_MINUTES) for k, x in candles.items()}
    pairs: list[tuple[str, str, Callable[[], object], str, Callable[[], object]]] = [
        (f"{len(NAMES)} features, 90 days x 2", "plain polars", lambda: plain_polars(candles, rates), "panel", ours),
        (f"{len(FEW)} features, 90 days x 2", "panel", few, "plain pandas", lambda: plain_pandas(frames)),
        (f"{len(FEW)} features, 90 days x 2", "panel", few, "plain DuckDB", lambda: plain_duckdb(db)),
        ("one new row x 2", "last window only", lambda: panel(last, rates, END, start=END), "90 days again", ours)]
    rows = []
    for work, a_name, a, b_name, b in pairs:
        timed(a), timed(b)
        runs = [(timed(a), timed(b)) for _ in range(given.rounds)]
        rows.append({"work": work, "a": a_name, "a_ms": statistics.median(x for x, _ in runs), "b": b_name, "b_ms": statistics.median(y for _, y in runs),
                     "b_over_a": statistics.median(y / x for x, y in runs), "low": min(y / x for x, y in runs), "high": max(y / x for x, y in runs)})
    n, took = minutes()
    if given.json: print(json.dumps({"pairs": rows, "one minute of two symbols appended, ms": took, "appends": n}, indent=1))
    else:
        table = Table("work", "A", "ms", "B", "ms", "B / A", "lowest to highest")
        for r in rows: table.add_row(r["work"], r["a"], f"{r['a_ms']:.2f}", r["b"], f"{r['b_ms']:.2f}", f"{r['b_over_a']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")
        Console(width=150).print(table)
        print(f"One minute of two symbols appended to a Window, of {n}: " + ", ".join(f"{k} {v:.2f} ms" for k, v in took.items()))


if __name__ == "__main__": main()
