"""Time vectorbt on ready signals: vectorbt_run.py DATA.parquet --rounds N [--engine auto|numba|rust]

`Portfolio.from_orders` with one shared account: the target is half of the equity at a word that turns long and nothing at one that turns flat,
at the next bar's open, NaN elsewhere. (`from_signals` knows no share of the equity: its percent is of the free cash.)
Timed: `from_orders` and `final_value()`; vectorbt is lazy, so `from_orders` alone runs the simulation and `run_only` in the output says its part.
Not timed: imports, reading of the file, the wide frames, and dropping of repeated words, all done with whole arrays beforehand.
The index has no time zone: with one, pandas 3 is made to walk it stamp by stamp, 0.21 s and not 0.04 s on two symbols.
The first round pays for what numba has to compile.
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import time

import pandas as pd
import vectorbt as vbt

FEE, CASH = 0.0005, 10_000.0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--engine", default="auto", choices=["auto", "numba", "rust"])
    a = p.parse_args()
    df = pd.read_parquet(a.data)
    df.index = pd.MultiIndex.from_arrays([pd.to_datetime(df.time, unit="ms"), df.symbol])
    wide = {c: df[c].unstack() for c in ("open", "close", "signal")}
    state = wide["signal"].where(wide["signal"] >= 0).ffill().fillna(0).shift(1, fill_value=0)  # acts on the bar after its own
    size = (state * 0.5).where(state.diff().fillna(0) != 0)
    trades = int((state.diff() < 0).sum().sum())
    whole, part = [], []
    for _ in range(a.rounds):
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        pf = vbt.Portfolio.from_orders(wide["close"], size=size, size_type="targetpercent", price=wide["open"], fees=FEE, init_cash=CASH,
                                       cash_sharing=True, group_by=True, call_seq="auto", freq="1min", engine=a.engine)
        part.append(round(time.perf_counter() - begin, 4))
        equity = float(pf.final_value())
        whole.append(round(time.perf_counter() - begin, 4))
    assert trades == pf.trades.closed.count(), (trades, pf.trades.closed.count())
    print(json.dumps({"engine": f"vectorbt ({a.engine})", "version": vbt.__version__, "seconds": whole, "trades": trades, "final_equity": round(equity, 2),
                      "run_only": part}))


if __name__ == "__main__":
    main()
