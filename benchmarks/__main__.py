"""`python -m benchmarks [--rounds N] [--json]`: each row times two ways of the same work in turn and prints the median ratio. Nothing here passes or fails."""
from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.table import Table

from realdeal.backtest import accounts, fold, tape, vectorbt_accounts
from realdeal.ensemble import TftMember
from realdeal.features import KNOWN, NAMES, STEP, WARMUP_MINUTES, Panel, panel
from realdeal.market import funding, generate
from realdeal.settings import Settings
from realdeal.store import Store, StoreKey
from realdeal.tft import export_onnx, fit_tft
from realdeal.types import DAY, MINUTE, Account, MarketRules, Signal

START, DAYS = 1_704_067_200_000, 98
END = START + DAYS * DAY
Pair = tuple[str, str, Callable[[], object], str, Callable[[], object]]


def frames() -> dict[str, pl.DataFrame]:
    made = generate("realistic", ["BTC/USDT", "ETH/USDT"], START, DAYS * 1440, seed=7)
    return {k: pl.DataFrame(dict(zip(("time", "open", "high", "low", "close", "volume"), c.columns, strict=True))).with_columns(origin=pl.lit("venue")) for k, c in made.items()}


def rates(symbol: str) -> pl.DataFrame:
    f = funding(symbol, START, DAYS * 1440, seed=7)
    return pl.DataFrame({"time": f.times, "rate": f.rates})


def signals(p: Panel) -> list[Signal]:
    rng = np.random.default_rng(7)
    return [Signal(p.symbols[g], int(t), 0.6, "long" if rng.random() < 0.05 else "flat", 0.2) for g, t in zip(p.group, p.times, strict=True)]


def pairs() -> Iterator[Pair]:
    candles, s = frames(), Settings()
    known = {k: rates(k) for k in candles}
    window = {k: c.tail(WARMUP_MINUTES) for k, c in candles.items()}
    yield "features of one new bar", "the last window", lambda: panel(window, known, END, start=END), "98 days again", lambda: panel(candles, known, END, start=END)

    p = panel(candles, known, END, start=END - 90 * DAY)
    said, t = signals(p), tape(candles, END - 90 * DAY, END)
    rules = {k: MarketRules(k, 1e-5, 0.01, 5.0) for k in candles}
    fills = [f for x in fold(p, said, t, rules, s, Account(10_000.0)) for f in x.fills]
    yield "accounts of 90 days x 2 symbols", "fold's own", lambda: accounts(fills, t, 10_000.0), "vectorbt", lambda: vectorbt_accounts(fills, t, 10_000.0, 7)
    yield "90 days decided every 15 minutes", "fold", lambda: fold(p, said, t, rules, s, Account(10_000.0)), "vectorbt's accounts alone", lambda: vectorbt_accounts(fills, t, 10_000.0, 7)

    y = (np.random.default_rng(0).random(len(p)) > 0.5).astype(float)
    early = p.times < p.times[0] + 20 * DAY
    stop = (p.times >= p.times[0] + 20 * DAY) & (p.times < p.times[0] + 24 * DAY)
    model = fit_tft(p.X, y, p.times, p.group, NAMES, KNOWN, train=early, stop=stop, steps=32, every_ms=STEP, max_epochs=1, say=None)
    member, row = TftMember(export_onnx(model)), np.flatnonzero(p.group == 0)[-1]
    one = p.rows(np.arange(len(p)) > row - 32)
    torch.set_num_threads(1)
    yield "one TFT prediction", "ONNX, batch of one", lambda: member.prob(p, np.array([row])), "torch", lambda: model.predict(one.X[:32], one.times[:32], one.group[:32])

    folder = tempfile.TemporaryDirectory()
    store = Store(Path(folder.name), StoreKey(source="simulated", venue="emulator", market="benchmark"))
    store.write("BTC/USDT", candles["BTC/USDT"])
    files = [str(f) for f in store.folder.glob("candles/**/*.parquet")]
    yield ("read 8 days of one symbol", "store (DuckDB)", lambda: store.read("BTC/USDT", END - 8 * DAY, END), "polars scan",
           lambda: pl.scan_parquet(files, hive_partitioning=False).filter(pl.col("time").is_between(END - 8 * DAY, END - MINUTE)).sort("time").collect())
    folder.cleanup()


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog="Example: python -m benchmarks --rounds 9 --json")
    args.add_argument("--rounds", type=int, default=5, help="pairs of runs of each row, after one warm-up")
    args.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = args.parse_args()
    rows = []
    for work, a_name, a, b_name, b in pairs():
        timed(a), timed(b)
        runs = [(timed(a), timed(b)) for _ in range(given.rounds)]
        rows.append({"work": work, "a": a_name, "a_ms": statistics.median(x for x, _ in runs), "b": b_name, "b_ms": statistics.median(y for _, y in runs),
                     "b_over_a": statistics.median(y / x for x, y in runs), "low": min(y / x for x, y in runs), "high": max(y / x for x, y in runs)})
    if given.json: print(json.dumps(rows, indent=1))
    else:
        table = Table("work", "A", "ms", "B", "ms", "B / A", "lowest to highest")
        for r in rows: table.add_row(r["work"], r["a"], f"{r['a_ms']:.2f}", r["b"], f"{r['b_ms']:.2f}", f"{r['b_over_a']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")
        Console(width=150).print(table)


if __name__ == "__main__": main()
