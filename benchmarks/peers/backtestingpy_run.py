"""Time backtesting.py on ready signals: backtestingpy_run.py DATA.parquet --rounds N

backtesting.py knows one symbol only: each symbol runs alone on an account of its own and the seconds are added. final_equity is the product of
the symbols' growths, which is what one account would have but for trades that overlap in time. It trades whole units only, so prices are
given for a millionth of a coin, as its documentation advises.
Timed: `Backtest.run()`, statistics at its end included since it always makes them. Not timed: imports, reading of the file, the DataFrames,
the making of `Backtest`. The words are a plain list read by bar number, quicker than an indicator made with `self.I`.
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import time

import backtesting
import pandas as pd

FEE, CASH, UNIT = 0.0005, 10_000.0, 1e-6


def strategy(words: list[int]) -> type[backtesting.Strategy]:
    "A strategy that follows the ready `words`, one a bar."
    class Ready(backtesting.Strategy):
        def init(self) -> None: pass

        def next(self) -> None:
            word = words[len(self.data) - 1]
            if word < 0: return
            if word == 1:
                if not self.position: self.buy(size=0.5)
            elif self.position: self.position.close()
    return Ready


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    tests = []
    for _, df in pd.read_parquet(a.data).groupby("symbol"):
        df.index = pd.DatetimeIndex(pd.to_datetime(df.time, unit="ms"))
        bars = df[["open", "high", "low", "close", "volume"]].rename(columns=str.capitalize)
        bars[["Open", "High", "Low", "Close"]] *= UNIT
        bars["Volume"] /= UNIT
        tests.append(backtesting.Backtest(bars, strategy(df.signal.tolist()), cash=CASH, commission=FEE, finalize_trades=True))
    seconds = []
    for _ in range(a.rounds):
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        stats = [t.run() for t in tests]
        seconds.append(round(time.perf_counter() - begin, 4))
    equity = CASH
    for s in stats: equity *= s["Equity Final [$]"] / CASH
    print(json.dumps({"engine": "backtesting.py", "version": backtesting.__version__, "seconds": seconds,
                      "trades": int(sum(s["# Trades"] for s in stats)), "final_equity": round(equity, 2)}))


if __name__ == "__main__":
    main()
