"""The readers of frames against everything that may come over the wire: lawful events or BadData, and the same values as ccxt's own decoding."""
from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import ccxt.pro
import orjson
import pytest
from fuzz_frames import BREAK, FRAMES, NAME, NAMES, NOW, START, SYMBOL, VENUES, check, edited, joined, messages, one
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realdeal.frames import DIALECTS, BookChange, Candle, DayTicker, OrderUpdate, Quote, Trade
from realdeal.market import Tick
from realdeal.types import DAY, MINUTE, BadData
from realdeal.venue import Deal, Depth, NewOrder, VenueOrder
from realdeal.wire import Day, deals_frame, depth_frame, kline_frame, mini_frame, private_frame, ticker_frame

MEXC, BINANCE = DIALECTS["mexc"], DIALECTS["binance"]
ATHERIS_RUNS = 80_000     # 25 s; with what is read below more than 100,000 inputs
many = settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(venue: str, frame: bytes) -> int:
    """Lawful events, or BadData and nothing else; how many frames were read."""
    good = 0
    for message in messages(venue, [frame]):
        try: events = DIALECTS[venue].read(message, NAMES, NOW)
        except BadData: continue
        for e in events: check(e)
        good += 1
    return good


@pytest.mark.parametrize(("venue", "name"), [(v, n) for v, frames in FRAMES.items() for n in frames])
def test_every_bit_and_every_length(venue: str, name: str) -> None:
    frame = FRAMES[venue][name]
    assert read(venue, frame) == 1
    for k in range(len(frame)): read(venue, frame[:k])
    for k in range(len(frame) * 8): read(venue, frame[: k // 8] + bytes([frame[k // 8] ^ 1 << k % 8]) + frame[k // 8 + 1 :])


@pytest.mark.parametrize("venue", VENUES)
def test_spliced_frames(venue: str) -> None:
    frames = list(FRAMES[venue].values())
    for a in frames:
        for b in frames:
            for k in range(0, min(len(a), len(b)), 2): read(venue, a[:k] + b[k:]), read(venue, a[:k] + b[len(b) - k :])
            read(venue, a + b)


@many
@given(st.binary(max_size=300))
def test_any_bytes(frame: bytes) -> None:
    for venue in VENUES: read(venue, frame)


FIELDS = ("stream", "data", "e", "E", "s", "t", "p", "q", "T", "m", "k", "o", "h", "l", "c", "v", "U", "u", "b", "a")
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["trade", "kline", "depthUpdate", "24hrMiniTicker", NAME, "1", "nan", "inf", "1e400", "", "-1", "\u00b2", START, NOW, 1e308, 10**30])
anything = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), x, max_size=8), max_leaves=12)


@settings(many, max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), anything), st.sampled_from(list(FRAMES["binance"].values())), st.booleans())
def test_any_json(fields: dict[str, Any], frame: bytes, wrapped: bool) -> None:
    """JSON of any shape, alone and laid over a valid frame."""
    valid = orjson.loads(frame)
    for message in (fields, {"data": fields}, {**valid, "data": {**valid["data"], **fields}}):
        try: events = BINANCE.read(message, NAMES, NOW)
        except BadData: continue
        for e in events: check(e)


@many
@given(st.sampled_from(VENUES), st.integers(0, 2**32), st.integers(1, 12))
def test_edited_frames(venue: str, seed: int, n: int) -> None:
    """Frames whose fields hold what they should not, one after the other into a feed: no corrupt minute comes out."""
    rng = random.Random(seed)
    frames = list(FRAMES[venue].values())
    one(joined(venue, [edited(venue, f, rng) if rng.random() < 0.5 else f for f in (frames + rng.choices(frames, k=n))]))


def test_clean_frames_make_a_minute() -> None:
    for venue, frames in FRAMES.items(): assert one(joined(venue, list(frames.values()))) == (10 if venue == "binance" else 12, 0, 2)
    assert BREAK not in b"".join(f for frames in FRAMES.values() for f in frames.values())


def test_atheris(tmp_path: Path) -> None:
    """libFuzzer with the coverage of the readers and the feed, from the same valid frames."""
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "fuzz_frames.py"), f"-runs={ATHERIS_RUNS}", "-seed=7", str(tmp_path)], capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert f"Done {ATHERIS_RUNS} runs" in said
    inputs, events, refused, minutes = map(int, re.findall(r"inputs (\d+), events (\d+), refused (\d+), minutes (\d+)", said)[-1])
    assert inputs == ATHERIS_RUNS and events > 50_000 and refused > 50_000 and minutes >= ATHERIS_RUNS, "and they got behind the first check"


# Rules, one by one

def trade(**fields: Any) -> dict[str, Any]:
    return {"data": {"e": "trade", "E": NOW, "s": NAME, "t": 9, "p": "61837.63", "q": "0.02", "T": NOW - 1, "m": True, **fields}}


def kline(**fields: Any) -> dict[str, Any]:
    return {"data": {"e": "kline", "E": NOW, "s": NAME, "k": {"t": START, "o": "10", "h": "12", "l": "9", "c": "11", "v": "5", **fields}}}


def depth(**fields: Any) -> dict[str, Any]:
    return {"data": {"e": "depthUpdate", "E": NOW, "s": NAME, "U": 8, "u": 9, "b": [["10", "1"]], "a": [["11", "0"]], **fields}}


@pytest.mark.parametrize("message", [
    *(trade(p=x) for x in ("nan", "inf", "-inf", "1e400", "1e308", 1e308, "0", "-0", "-1", "", "x", "0x10", "1,5", None, [], {}, float("nan"))),
    *(trade(q=x) for x in ("nan", "-1", "-1e-9", "1e400", "")), *(trade(T=x) for x in (0, -1, NOW + 5 * MINUTE, NOW + DAY, NOW - DAY, 10**30, 1e400, "", None, "soon")),
    *(trade(m=x) for x in ("false", None, 2, [])), *(trade(t=x) for x in (None, "", "x", [])), trade(s="XXXUSDT"), trade(s=[]), trade(e="aggTrade"), trade(e=None),
    *(kline(**x) for x in ({"h": "10"}, {"l": "10.5"}, {"l": "13"}, {"t": START + 1}, {"t": START - DAY}, {"v": "-1"}, {"o": "nan"})), {"data": {"e": "kline", "s": NAME}},
    *(depth(**x) for x in ({"U": 10}, {"U": -1}, {"u": "nan"}, {"b": [["10"]]}, {"b": [["0", "1"]]}, {"a": [["11", "-1"]]}, {"a": {"x": 1}}, {"E": NOW + 2 * DAY})),
    {}, {"data": None}, {"data": []}, {"data": {"s": NAME, "b": "10"}}, {"data": {"s": NAME, "b": "10", "a": "nan"}}], ids=lambda m: str(m)[:60])
def test_refused(message: Mapping[str, Any]) -> None:
    with pytest.raises(BadData, match=r"^frame: \w+: "): BINANCE.read(message, NAMES, NOW)


@pytest.mark.parametrize("message", [trade(p="1e-8"), trade(q="0"), trade(T=NOW + 5 * MINUTE - 1), trade(T=NOW - DAY + 1), trade(T=str(NOW)), kline(o="12", c="9"), kline(v="0", o="9", h="9", c="9"), depth(U=9), depth(b=[], a=[])], ids=lambda m: str(m)[:60])
def test_taken(message: Mapping[str, Any]) -> None:
    [e] = BINANCE.read(message, NAMES, NOW)
    check(e)


# The same values as ccxt's own decoding

ccxts = ccxt.pro.mexc()
prices = st.decimals("0.00000001", "10000000", places=8)
amounts = st.decimals("0", "1000000", places=8)
times = st.integers(NOW - 1000, NOW)
ticks = st.builds(Tick, times, st.just(SYMBOL), st.integers(1, 10**12), prices.map(float), amounts.map(float), st.booleans())
sides = st.lists(st.tuples(prices, amounts.filter(bool)), max_size=8, unique_by=lambda r: r[0]).map(tuple)
NONE = {"price": "", "quantity": ""}


def expected(told: Mapping[str, Any], ids: Sequence[str]) -> list[Any]:
    """The events that ccxt's dictionary holds; it has no ids of trades."""
    symbol, sent = NAMES.get(told.get("symbol", ""), ""), int(told.get("sendTime", told.get("createTime", 0)))
    def rows(side: str) -> tuple[tuple[float, float], ...]: return tuple((float(x["price"]), float(x["quantity"])) for x in told["publicAggreDepths"].get(side, []))
    match told:
        case {"publicAggreDeals": d}: return [Trade(symbol, int(x["time"]), float(x["price"]), float(x["quantity"]), x["tradeType"] == 1, i, NOW) for x, i in zip(d.get("deals", []), ids, strict=True)]
        case {"publicSpotKline": k}: return [Candle(symbol, int(k["windowStart"]) * 1000, *(float(k[f"{x}Price"]) for x in ("opening", "highest", "lowest", "closing")), float(k["volume"]), sent, NOW)]
        case {"publicAggreBookTicker": q}: return [Quote(symbol, sent, float(q["bidPrice"]), float(q["askPrice"]), NOW)]
        case {"publicAggreDepths": d}: return [BookChange(symbol, sent, int(d["fromVersion"]), int(d["toVersion"]), rows("bids"), rows("asks"), NOW)]
        case {"publicMiniTicker": t}: return [DayTicker(symbol, sent, float(t["price"]), float(t["high"]), float(t["low"]), float(t["quantity"]), NOW)]
        case {"privateOrders": o}: return [OrderUpdate(o.get("clientId", ""), NOW)]
        case {"privateDeals": o}: return [OrderUpdate(o.get("clientOrderId", ""), NOW)]
    raise AssertionError(told)


def same(frame: bytes, ids: Sequence[str] = ()) -> None:
    want = expected(ccxts.decode_proto_msg(frame), ids)
    assert MEXC.read(frame, NAMES, NOW) == want


@given(st.lists(ticks, max_size=12))
def test_deals_as_ccxt(made: list[Tick]) -> None: same(deals_frame(MEXC.channel("trades", NAME), NAME, NOW, made), [str(t.id) for t in made])


@given(st.lists(prices.map(float), min_size=4, max_size=4), amounts.map(float), st.integers(0, 600))
def test_kline_as_ccxt(p: list[float], volume: float, minutes: int) -> None:
    same(kline_frame(MEXC.channel("candles", NAME), NAME, NOW, (START - minutes * MINUTE, p[0], max(p), min(p), p[3], volume), "Min1", MINUTE))


@given(sides.filter(bool), sides.filter(bool), sides, sides, st.integers(0, 10**15))
def test_book_as_ccxt(bids: Any, asks: Any, more_bids: Any, more_asks: Any, version: int) -> None:
    before, after = Depth(version, bids, asks), Depth(version + 3, more_bids, more_asks)
    same(depth_frame(MEXC.channel("book", NAME), NAME, NOW, before, after))
    same(ticker_frame(MEXC.channel("quotes", NAME), NAME, NOW, before))


@given(st.lists(prices.map(float), min_size=4, max_size=4), amounts.map(float))
def test_day_as_ccxt(p: list[float], volume: float) -> None: same(mini_frame(MEXC.channel("day", NAME), NAME, NOW, Day(p[0], max(p), min(p), p[3], volume, volume * p[3])))


@given(st.text("abcXYZ019_-", max_size=32), st.sampled_from(["BUY", "SELL"]), prices, amounts)
def test_own_orders_as_ccxt(client_id: str, side: Any, p: Decimal, a: Decimal) -> None:
    same(private_frame(MEXC.private[0], NOW, VenueOrder("k", "C02__1", NewOrder(SYMBOL, side, "LIMIT", a, p, client_id=client_id), START, NOW)))
    same(private_frame(MEXC.private[1], NOW, Deal("k", "7", "C02__1", client_id, SYMBOL, side, p, a, Decimal("0.12"), False, NOW)))
