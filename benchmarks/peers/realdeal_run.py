"""Time our fold on ready signals: realdeal_run.py DATA.parquet --rounds N [--every-minute]

Each word is a decision of the very function that the runner calls: snapshot, `decide`, `plan`, the orders at work in the minutes that follow, and the account, so that the breakers see it;
half of the equity a symbol, fee 0.05 %, lots of a hundred-millionth. Timed: the fold and the accounts of every minute. Not timed: imports, reading of the file, making of panel, signals and tape.
vectorbt's accounting of the same fills, with which every backtest of ours is checked, is told apart (`checked`).
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import time

import numpy as np
import polars as pl

import realdeal
from realdeal.backtest import accounts, fold, tape, vectorbt_accounts
from realdeal.features import Panel
from realdeal.settings import Settings
from realdeal.types import MINUTE, Account, MarketRules, Signal

FEE, CASH = 0.0005, 10_000.0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--every-minute", action="store_true", help="a decision on each minute, which the settings would refuse")
    a = p.parse_args()
    every = 1 if a.every_minute else 15
    s = Settings().override(costs={"taker_fee": FEE, "half_spread": 0.0, "slippage": 0.0, "participation": 1.0}, risk={"max_drawdown": 0.5, "max_daily_loss": 0.5}, strategy={"horizon": 15})
    s = s.model_copy(update={"strategy": s.strategy.model_copy(update={"decision_every": every, "horizon": every})})
    df = pl.read_parquet(a.data)
    # The word of a bar is known at its close, and peers fill it in the next bar. Our decision stands at the opening time of the bar it fills in, so the minutes are told one minute early.
    words = {str(k): d["signal"].to_numpy() for (k,), d in df.group_by("symbol", maintain_order=True)}
    candles = {str(k): d.select(pl.col("time") - MINUTE, "open", "high", "low", "close", "volume").with_columns(origin=pl.lit("venue")) for (k,), d in df.group_by("symbol", maintain_order=True)}
    symbols, start, end = tuple(candles), int(df["time"][0]), int(df["time"][-1])
    t = tape(candles, start, end, s.costs)
    at, k = np.arange(0, len(t.times), every), len(candles)
    times, group, close = np.repeat(t.times[at], k), np.tile(np.arange(k), len(at)), np.vstack([t.first, t.close])[at].ravel()
    panel = Panel(symbols=symbols, times=times, group=group, X=np.empty((len(times), 0)), close=close, high=close, low=close, sigma=np.full(len(times), 1e-9), real=np.ones(len(times), bool), names=())
    signals = [Signal(symbols[g], int(u), 0.6, "long" if words[symbols[g]][i] == 1 else "flat", 0.2) for u, g, i in zip(times, group, np.repeat(at, k), strict=True)]
    rules = {x: MarketRules(x, lot=1e-8, tick=0.01, min_notional=1.0) for x in symbols}
    seconds, steps, equity = [], [], np.empty(0)
    for _ in range(a.rounds):
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        steps = fold(panel, signals, t, rules, s, Account(CASH))
        fills = [f for x in steps for f in x.fills]
        equity = accounts(fills, t, CASH)[1]
        seconds.append(round(time.perf_counter() - begin, 4))
    vectorbt_accounts(fills, t, CASH, 7)
    begin = time.perf_counter()
    theirs = vectorbt_accounts(fills, t, CASH, 7)[1]
    checked = round(time.perf_counter() - begin, 4)
    assert abs(theirs - equity).max() < 0.005
    print(json.dumps({"engine": "realdeal", "version": realdeal.__version__, "seconds": seconds, "trades": sum(f.side == "sell" for f in fills), "final_equity": round(float(equity[-1]), 2),
        "decisions": len(steps), "fills": len(fills), "us_a_step": round(min(seconds) / len(steps) * 1e6, 2), "checked": checked}))


if __name__ == "__main__":
    main()
