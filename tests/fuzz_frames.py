"""Coverage-guided fuzzing of the readers of frames and of the feed behind them, for atheris (libFuzzer).

    python tests/fuzz_frames.py -runs=100000 -seed=7 [folder of inputs]

An input is a venue's byte and frames, separated. Each frame is read; what comes out obeys every rule, or the reader raises BadData and nothing else. The events go
into a feed, and no corrupt minute comes out of it. tests/test_frames.py uses the same seeds, edits and rules.
"""
from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["realdeal.frames", "realdeal.feed"]): import realdeal.feed  # noqa: F401 - its bytecode is changed while it is loaded

import orjson

from realdeal.feed import Feed, same
from realdeal.frames import _WRAPPER, DIALECTS, BookChange, Candle, DayTicker, Gap, Kind, OrderUpdate, Quote, Trade
from realdeal.market import Tick
from realdeal.types import DAY, MINUTE, BadData, Bar, Minute, Print
from realdeal.venue import Deal, Depth, NewOrder, VenueOrder
from realdeal.wire import Day, deals_frame, depth_frame, kline_frame, mini_frame, private_frame, ticker_frame

START = 1_704_067_200_000
NOW = START + MINUTE + 30_000
NAME, SYMBOL = "BTCUSDT", "BTC/USDT"
NAMES = {NAME: SYMBOL, "ETHUSDT": "ETH/USDT"}
VENUES = ("mexc", "binance")
BREAK = b"\n\xff\n"
TICKS = [Tick(START + ms, SYMBOL, 100 + k, p, a, bool(k % 2)) for k, (ms, p, a) in enumerate(((5, 61837.63, .02), (900, 61837.64, .5), (59_999, 61830., 1.), (60_001, 61831., 2.), (60_001, 61840.5, .001)))]


# Valid frames

def bar(ticks: Sequence[Tick]) -> tuple[int, float, float, float, float, float]:
    prices = [t.price for t in ticks]
    return ticks[0].time // MINUTE * MINUTE, prices[0], max(prices), min(prices), prices[-1], float(sum(Decimal(str(t.amount)) for t in ticks))


def mexc_frames() -> dict[str, bytes]:
    m, first, second, d = DIALECTS["mexc"], TICKS[:3], TICKS[3:], Decimal

    def named(kind: Kind) -> str: return m.channel(kind, NAME)

    before, after = Depth(7, ((d("61837.6"), d(2)),), ((d("61837.7"), d(1)),)), Depth(9, ((d("61837.6"), d("1.5")), (d("61837.5"), d(3))), ((d("61837.8"), d("0.25")),))
    order = VenueOrder("k", "C02__1", NewOrder(SYMBOL, "BUY", "LIMIT", d("0.01"), d(60000), client_id="rd1"), START, NOW, filled=d("0.004"), spent=d(240))
    deal = Deal("k", "7", "C02__1", "rd1", SYMBOL, "BUY", d(60000), d("0.004"), d("0.12"), False, NOW)
    return {
        "deals": deals_frame(named("trades"), NAME, NOW, first), "kline": kline_frame(named("candles"), NAME, NOW - 9, bar(first), "Min1", MINUTE),
        "more deals": deals_frame(named("trades"), NAME, NOW, second), "more kline": kline_frame(named("candles"), NAME, NOW, bar(second), "Min1", MINUTE),
        "depth": depth_frame(named("book"), NAME, NOW, before, after), "ticker": ticker_frame(named("quotes"), NAME, NOW, after),
        "mini": mini_frame(named("day"), NAME, NOW, Day(61000., 62000., 60000., 61837.63, 123.5, 7.6e6)),
        "order": private_frame("spot@private.orders.v3.api.pb", NOW, order), "my deal": private_frame("spot@private.deals.v3.api.pb", NOW, deal)}


def binance_frames() -> dict[str, bytes]:
    def combined(topic: str, **d: Any) -> bytes: return orjson.dumps({"stream": f"btcusdt@{topic}", "data": d})
    def trade(t: Tick) -> bytes: return combined("trade", e="trade", E=NOW, s=NAME, t=t.id, p=f"{t.price:.8f}", q=f"{t.amount:.8f}", T=t.time, m=not t.is_buy)
    def kline(ticks: Sequence[Tick], now: int) -> bytes:
        opened, *row = bar(ticks)
        return combined("kline_1m", e="kline", E=now, s=NAME, k={"t": opened, "T": opened + MINUTE - 1, "i": "1m", **dict(zip("ohlcv", (f"{x:.8f}" for x in row), strict=True)), "x": False})
    return {
        **{f"trade {t.id}": trade(t) for t in TICKS[:3]}, "kline": kline(TICKS[:3], NOW - 9), **{f"trade {t.id}": trade(t) for t in TICKS[3:]}, "more kline": kline(TICKS[3:], NOW),
        "depth": combined("depth@100ms", e="depthUpdate", E=NOW, s=NAME, U=8, u=9, b=[["61837.60", "1.5"], ["61837.50", "3"]], a=[["61837.70", "0.00000000"]]),
        "ticker": combined("bookTicker", u=9, s=NAME, b="61837.60", B="1.5", a="61837.70", A="1"),
        "mini": combined("miniTicker", e="24hrMiniTicker", E=NOW, s=NAME, c="61837.63", o="61000", h="62000", l="60000", v="123.5", q="7600000")}


FRAMES = {"mexc": mexc_frames(), "binance": binance_frames()}


def joined(venue: str, frames: Sequence[bytes]) -> bytes: return bytes([VENUES.index(venue)]) + BREAK.join(frames)


def parted(data: bytes) -> tuple[str, list[bytes]]: return VENUES[data[0] % 2 if data else 0], data[1:].split(BREAK)


def seeds() -> list[bytes]: return [joined(v, f) for v, frames in FRAMES.items() for f in (list(frames.values()), *[[x] for x in frames.values()])]


# Edits that keep a frame a frame

TEXTS = ("", "0", "-0", "-1", "nan", "inf", "-inf", "1e400", "1e308", "1e-320", "1_0", " 7 ", "0x10", "1,5", "9" * 5000, "\u00b2", "\u0661\u0662", "\x00", "\U0001f4a5", "XXXUSDT", "ETHUSDT", "[]", "61837.63", "61830", "100", "104", "8", "9")
WHOLES = (0, 1, -1, 2, 2**31 - 1, 2**63 - 1, -(2**63), START, START + MINUTE, START + 1, START // 1000, START // 1000 + 1, NOW, NOW + 5 * MINUTE - 1, NOW + 5 * MINUTE, NOW + DAY, NOW - DAY, NOW - DAY + 1)
VALUES = (*TEXTS, *WHOLES, None, True, False, [], {}, [[]], [["1"]], {"s": NAME}, 1e308, -0.0, 0.5, 1e-320, [[[[[[[[]]]]]]]], "trade", "kline", "depthUpdate", "24hrMiniTicker")


def _edit_message(m: Any, rng: random.Random) -> None:
    "Change one field of `m`, or of a message in it."
    fields = [f for f, _ in m.ListFields()]
    f = rng.choice(fields if fields and rng.random() < .8 else list(m.DESCRIPTOR.fields))
    if f.message_type is None:
        if rng.random() < .1: m.ClearField(f.name)
        else: setattr(m, f.name, rng.choice(TEXTS) if f.cpp_type == f.CPPTYPE_STRING else bool(rng.getrandbits(1)) if f.cpp_type == f.CPPTYPE_BOOL else max(-(2**31), min(2**31 - 1, x)) if (x := rng.choice(WHOLES)) is not None and f.cpp_type == f.CPPTYPE_INT32 else x)
    elif f.is_repeated:
        rows, k = getattr(m, f.name), rng.random()
        if not rows or k < .1: rows.add()
        elif k < .2: rows.append(rng.choice(rows))
        elif k < .3: del rows[rng.randrange(len(rows))]
        else: _edit_message(rng.choice(rows), rng)
    else: _edit_message(getattr(m, f.name), rng)


def _edit_json(x: Any, rng: random.Random) -> Any:
    "`x` with one value in it changed."
    if not isinstance(x, (dict, list)) or not x or rng.random() < .05: return rng.choice(VALUES)
    keys = list(x) if isinstance(x, dict) else range(len(x))
    k = rng.choice(keys)
    if rng.random() < .1:
        del x[k]
        return x
    x[k] = _edit_json(x[k], rng)
    return x


def edited(venue: str, frame: bytes, rng: random.Random) -> bytes:
    "`frame` with a field or two changed; as it is where it is none."
    try:
        if venue == "binance":
            told = orjson.loads(frame)
            for _ in range(rng.randint(1, 2)): told = _edit_json(told, rng)
            return orjson.dumps(told)
        m = _WRAPPER.FromString(frame)
        for _ in range(rng.randint(1, 2)): _edit_message(m, rng)
        return bytes(m.SerializeToString())
    except Exception: return frame  # not one that has fields


# The rules, said again

def number(x: Any, least: float, above: bool = False) -> None: assert type(x) is float and isfinite(x) and (x > least if above else x >= least), x


def near(t: Any) -> None: assert type(t) is int and -DAY < t - NOW < 5 * MINUTE, t


def check(e: Any) -> None:
    "Every rule of an event."
    if isinstance(e, OrderUpdate):
        assert type(e.client_id) is str and e.received == NOW
        return
    assert e.symbol in NAMES.values() and e.received == NOW
    near(e.time)
    if isinstance(e, Trade):
        number(e.price, 0, above=True), number(e.amount, 0)
        assert type(e.is_buy) is bool and type(e.id) is str
    elif isinstance(e, Candle):
        for p in e[2:6]: number(p, 0, above=True)
        number(e.volume, 0), near(e.event_time)
        assert e.time % MINUTE == 0 and e.low <= min(e.open, e.close) <= max(e.open, e.close) <= e.high
    elif isinstance(e, Quote): number(e.bid, 0, above=True), number(e.ask, 0, above=True)
    elif isinstance(e, BookChange):
        assert type(e.first) is int and type(e.last) is int and 0 <= e.first <= e.last
        for p, a in (*e.bids, *e.asks): number(p, 0, above=True), number(a, 0)
    elif isinstance(e, DayTicker):
        for p in (e.last, e.high, e.low): number(p, 0, above=True)
        number(e.volume, 0)
    else: raise AssertionError(e)


def check_minute(m: Minute) -> None:
    "What is known is a lawful bar, and the trades are its own."
    b = m.bar
    assert b.broken_rule() is None and m.symbol in NAMES.values(), m
    times = [t.time for t in m.trades]
    assert times == sorted(times) and all(b.time <= t < b.time + MINUTE for t in times), m
    ids = [t.id for t in m.trades if t.id]
    assert len(ids) == len(set(ids)), m
    for t in m.trades: number(t.price, 0, above=True), number(t.amount, 0)
    if m.proof in ("stream", "rest") and m.trades:
        prices = [t.price for t in m.trades]
        assert (b.open, b.high, b.low, b.close) == (prices[0], max(prices), min(prices), prices[-1]), m
        total = sum(Decimal(t.amount) for t in m.trades)
        assert abs(total - Decimal(b.volume)) <= Decimal("2e-8") + abs(total) * Decimal("1e-11"), m


def messages(venue: str, frames: Sequence[bytes]) -> list[Any]:
    "What the client hands over: bytes, or JSON that is an object."
    if venue == "mexc": return list(frames)
    told: list[Any] = []
    for f in frames:
        try: told.append(orjson.loads(f))
        except orjson.JSONDecodeError: continue
    return [x for x in told if isinstance(x, dict)]


TRUTH = {opened: [Print(*t[:1], *t[3:6]) for t in TICKS if t.time // MINUTE * MINUTE == opened] for opened in (START, START + MINUTE)}


def one(data: bytes) -> tuple[int, int, int]:
    "Read the frames of `data` into a feed and check all that comes out; events, refusals, minutes."
    venue, frames = parted(data)
    feed, read, refused = Feed(list(NAMES.values()), grace=2000), 0, 0
    minutes: list[Minute] = []
    feed.begin(SYMBOL, START)
    for message in messages(venue, frames[:16]):
        try: events = DIALECTS[venue].read(message, NAMES, NOW)
        except BadData:
            refused += 1
            feed.on(Gap(SYMBOL, NOW, "malformed frame", NOW))
            continue
        for e in events:
            check(e)
            minutes += feed.on(e)
            read += 1
    minutes += feed.tick(NOW + MINUTE)
    state = feed.symbols[SYMBOL]
    for t in list(feed.doubts(SYMBOL))[:1]:
        bar_told = Bar(*bar([x for x in TICKS if x.time // MINUTE * MINUTE == t]), "backfilled") if t in TRUTH else None
        for _ in range(3): minutes += feed.told(SYMBOL, t, bar_told, TRUTH.get(t, []) if len(data) % 3 else None, NOW + MINUTE, tries=1)   # with its trades, or without
        if bar_told: assert same(state.known[t], bar_told), "in the end REST's word is taken"
    for x in NAMES.values(): feed.md(x), feed.bar_now(x, START)
    for m in minutes: check_minute(m)
    return read, refused, len(minutes)


def main() -> None:
    counts = [0, 0, 0, 0]

    def target(data: bytes) -> None:
        counts[:] = [n + x for n, x in zip(counts, (1, *one(data)), strict=True)]
        if counts[0] % 5000 == 0: print("inputs {}, events {}, refused {}, minutes {}".format(*counts), flush=True)  # libFuzzer leaves by _exit: nothing can be said at the end

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        venue, frames = parted(data)
        k, way = rng.randrange(len(frames)), rng.random()
        if way < .3: return bytes(atheris.Mutate(data, most))
        if way < .8: frames[k] = edited(venue, frames[k], rng)
        elif way < .85: frames.insert(k, rng.choice(list(FRAMES[venue].values())))
        elif way < .9 and len(frames) > 1: del frames[k]
        elif way < .95: frames.insert(rng.randrange(len(frames)), frames[k])
        else: frames[k] = bytes(atheris.Mutate(frames[k], max(1, most - len(data) + len(frames[k]))))
        return joined(venue, frames)[:most]

    given = [a for a in sys.argv[1:] if not a.startswith("-")]
    folder = Path(given[0] if given else tempfile.mkdtemp(prefix="frames-"))
    for k, seed in enumerate(seeds()): (folder / f"seed-{k:03}").write_bytes(seed)
    options = [a for a in sys.argv[1:] if a.startswith("-")]
    atheris.Setup([sys.argv[0], "-max_len=2048", *options, f"-artifact_prefix={folder}/", str(folder)], target, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__": main()
