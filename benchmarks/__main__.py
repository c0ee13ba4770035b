"""`python -m benchmarks [--rounds N] [--json]`: each row times two ways of the same work in turn and prints the median ratio. Nothing here passes or fails."""
from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ccxt.pro
import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.load import Market
from realdeal.backtest import accounts, fold, tape, vectorbt_accounts
from realdeal.exchange import Clock, Exchange
from realdeal.features import WARMUP_MINUTES, Panel, panel
from realdeal.market import funding, generate
from realdeal.settings import Settings
from realdeal.store import Store, StoreKey
from realdeal.streams import Connection, Streams
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


def spot(client: Any) -> Any:
    """`client` of ccxt with one market, as if it had been loaded."""
    market = {"id": "BTCUSDT", "symbol": "BTC/USDT", "base": "BTC", "quote": "USDT", "spot": True, "type": "spot", "precision": {"amount": 1e-6, "price": 0.01}}
    client.set_markets([client.safe_market_structure(market)])
    return client


def handlers() -> Iterator[Pair]:
    """What a frame of MEXC's costs from its bytes: until its events stand in our queue and are taken from it, and until ccxt's own handler has it in its caches."""
    made = Market("BTC/USDT", 61_837.63, 7)
    made.turn(START)
    venue, theirs = Exchange(Settings(), clock=Clock(rate=0)), spot(ccxt.pro.mexc())
    spot(venue.client)
    venue.clock.set(START)
    live = Streams(venue, ["BTC/USDT"])
    mine, socket = Connection(live, "ws://loopback", ("BTC/USDT",), ()), asyncio.run(socket_of(theirs))

    def ours(frames: list[bytes]) -> None:
        for f in frames: live.frame(mine, f)
        while live.inbox.take(): pass
        assert not live.counts["malformed"]

    def ccxts(frames: list[bytes]) -> None:
        theirs.orderbooks["BTC/USDT"] = theirs.order_book({"nonce": 0})
        for f in frames: theirs.handle_message(socket, f)

    kinds = {"10,000 trades, one a frame": [made.deals(START, 1) for _ in range(10_000)], "10,000 trades, ten a frame": [made.deals(START, 10) for _ in range(1000)],
             "5,000 running candles": [made.kline(START) for _ in range(5000)], "5,000 best prices": [made.ticker(START) for _ in range(5000)]}
    made = Market("BTC/USDT", 61_837.63, 7)
    made.turn(START)
    kinds["1,000 changes of ten levels"] = [made.depth(START) for _ in range(1000)]
    kinds["5,000 frames, mixed"] = [getattr(made, k)(START) for k in random.Random(7).choices(["deals", "depth", "ticker", "kline"], [40, 20, 26, 14], k=5000)]
    for work, told in kinds.items(): yield f"{work}, through the handler", "realdeal", lambda told=told: ours(told), "ccxt", lambda told=told: ccxts(told)  # type: ignore[misc]


async def socket_of(client: Any) -> Any:
    """ccxt's own object for a socket, not connected."""
    made = client.client("ws://loopback")
    await client.close()
    return made


def pairs() -> Iterator[Pair]:
    yield from handlers()
    candles, s = frames(), Settings()
    known = {k: rates(k) for k in candles}
    window = {k: c.tail(WARMUP_MINUTES) for k, c in candles.items()}
    yield "features of one new bar", "the last window", lambda: panel(window, known, END, start=END), "98 days again", lambda: panel(candles, known, END, start=END)

    p = panel(candles, known, END, start=END - 90 * DAY)
    said, t = signals(p), tape(candles, END - 90 * DAY, END, s.costs)
    rules = {k: MarketRules(k, 1e-5, 0.01, 5.0) for k in candles}
    fills = [f for x in fold(p, said, t, rules, s, Account(10_000.0)) for f in x.fills]
    yield "accounts of 90 days x 2 symbols", "fold's own", lambda: accounts(fills, t, 10_000.0), "vectorbt", lambda: vectorbt_accounts(fills, t, 10_000.0, 7)
    yield "90 days decided every 15 minutes", "fold", lambda: fold(p, said, t, rules, s, Account(10_000.0)), "vectorbt's accounts alone", lambda: vectorbt_accounts(fills, t, 10_000.0, 7)

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
