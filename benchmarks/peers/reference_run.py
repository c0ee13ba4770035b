"""A plain Python loop over the ready signals: the answer the engines are held against. reference_run.py DATA.parquet --rounds N

On a changed word the order fills at the next bar's open: buy for half of the equity (marked at the opens) or, if less, for what the cash pays,
fee on top; sell the whole position. No rounding of amounts. Needs numpy and pyarrow only.
Timed: the loop. Not timed: reading the file and making the lists.
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import platform
import time

import pyarrow.parquet as pq

FEE, CASH = 0.0005, 10_000.0


def run(rows: list[tuple[list[float], list[int]]]) -> tuple[int, float]:
    "Trades closed and final equity; `rows` has opens and words for each minute, one entry a symbol."
    k = len(rows[0][0])
    cash, held, due, trades = CASH, [0.0] * k, [-1] * k, 0
    for opens, words in rows:
        for i in range(k):
            if due[i] == 1 and not held[i]:
                value = min((cash + sum(h * o for h, o in zip(held, opens, strict=True))) / 2, cash / (1 + FEE))
                held[i] = value / opens[i]
                cash -= value * (1 + FEE)
            elif due[i] == 0 and held[i]:
                cash += held[i] * opens[i] * (1 - FEE)
                held[i], trades = 0.0, trades + 1
        due = words
    return trades, cash + sum(h * o for h, o in zip(held, rows[-1][0], strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    t = pq.read_table(a.data)
    k = len(set(t["symbol"][:2].to_pylist()))
    opens, words = (t[c].to_numpy().reshape(-1, k).tolist() for c in ("open", "signal"))
    rows, seconds = list(zip(opens, words, strict=True)), []
    for _ in range(a.rounds):
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        trades, equity = run(rows)
        seconds.append(round(time.perf_counter() - begin, 4))
    print(json.dumps({"engine": "plain loop", "version": platform.python_version(), "seconds": seconds, "trades": trades, "final_equity": round(equity, 2)}))


if __name__ == "__main__":
    main()
