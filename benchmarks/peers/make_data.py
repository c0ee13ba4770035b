"""Make the candles and ready signals that each engine's script replays: make_data.py OUT.parquet [--symbols 1] [--every-minute].

One row a minute and symbol, sorted by time and then symbol: time (ms of the candle's open), symbol, open, high, low, close, volume and signal.
Candles are a geometric random walk in 0.01 ticks. A candle opens at the close before it, so that an engine filling at the bar's close and one
filling at the next open trade at the same price. Signals: 1 be long half of the equity from the next bar's open, 0 be flat, -1 no new word.
A word stands on each 15-minute mark (on each minute with --every-minute) and -1 elsewhere; flat waits are geometric with a mean that makes
`--turns` entries a day, each held `--hold` minutes. The first and the last hours are flat, so that every trade closes within the data.
"""
import argparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START, MINUTE, DAY = 1_735_689_600_000, 60_000, 1440  # 2025-01-01 UTC in ms
SYMBOLS = {"BTC/USDT": (60_000.0, 20.0), "ETH/USDT": (3_000.0, 400.0)}  # first price, typical volume a minute


def candles(rng: np.random.Generator, n: int, price: float, volume: float) -> dict[str, np.ndarray]:
    "`n` candles of a geometric random walk from `price`, in 0.01 ticks."
    path = np.round(price * np.exp(np.cumsum(np.concatenate([[0.0], rng.normal(0, 7e-4, n)]))), 2)
    open_, close = path[:-1], path[1:]
    up, down = np.abs(rng.normal(0, 3e-4, (2, n)))
    return {"open": open_, "high": np.round(np.maximum(open_, close) * (1 + up), 2), "low": np.round(np.minimum(open_, close) * (1 - down), 2),
            "close": close, "volume": np.round(volume * np.exp(rng.normal(0, 0.5, n)), 3)}


def signals(rng: np.random.Generator, n: int, step: int, turns: float, hold: int) -> np.ndarray:
    "Words on each `step`-th minute: about `turns` entries a day, each `hold` minutes long."
    wait = max(DAY / turns - hold, 1.5 * step) / step  # mean steps spent flat
    word = np.full(n, -1, np.int8)
    word[::step] = 0
    at = 60
    while True:
        at += step * int(rng.geometric(1 / wait))
        if at + hold > n - 60: return word
        word[at:at + hold:step] = 1
        at += hold


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split(":")[0])
    p.add_argument("out")
    p.add_argument("--days", type=int, default=90)
    p.add_argument("--symbols", type=int, default=2, choices=[1, 2])
    p.add_argument("--every-minute", action="store_true", help="a word on each minute, not on 15-minute marks")
    p.add_argument("--turns", type=float, default=3.0, help="entries a day and symbol, about")
    p.add_argument("--hold", type=int, default=240, help="minutes an entry is held; a multiple of 15 unless --every-minute")
    p.add_argument("--seed", type=int, default=7)
    a = p.parse_args()
    n, step = a.days * DAY, 1 if a.every_minute else 15
    if a.hold % step: p.error(f"--hold must be a multiple of {step}")
    names = list(SYMBOLS)[:a.symbols]
    cols = []
    for i, name in enumerate(names):  # a stream for each symbol: the first is the same with 1 and 2 symbols, and with either step
        walk, words = (np.random.default_rng([a.seed, i, k]) for k in (0, 1))
        cols.append(candles(walk, n, *SYMBOLS[name]) | {"signal": signals(words, n, step, a.turns, a.hold)})
    table = {"time": np.repeat(START + MINUTE * np.arange(n, dtype=np.int64), len(names)), "symbol": names * n}
    table |= {k: np.stack([c[k] for c in cols], 1).ravel() for k in cols[0]}
    pq.write_table(pa.table(table), a.out)


if __name__ == "__main__":
    main()
