"""The second venue over the real client: frames that Binance really sent, and a handful of made ones, through ccxt's class, our streams and the feed."""
from __future__ import annotations

import asyncio
import gzip
import heapq
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
from aiohttp import ClientConnectionResetError, WSMsgType, web
from fuzz_frames import FRAMES, NOW, START, TICKS

from realdeal.exchange import Clock, Exchange
from realdeal.feed import Feed, build
from realdeal.frames import KIND, BookChange, Candle, Event, Gap, Kind, Quote, Trade
from realdeal.ingest import Follower
from realdeal.settings import Settings
from realdeal.store import Store, StoreKey
from realdeal.streams import Patience, Streams
from realdeal.types import HOUR, MINUTE, BadSetting, Bar, MarketRules, Print, Refused, Retry

SYMBOLS = {"BTC/USDT": "BTCUSDT", "ETH/USDT": "ETHUSDT"}
ROOT = Path(os.environ.get("REALDEAL_DATA", ""))
recorded = pytest.mark.skipif(not (ROOT / "recorded").is_dir() or "REALDEAL_DATA" not in os.environ, reason="REALDEAL_DATA names no folder with recorded frames")
BINANCE = Settings().override(data={"venue": "binance", "rate_limit_ms": 1})


# A loopback Binance: the few endpoints that a start needs, and a socket that plays given frames

STEPS = {"BTCUSDT": "0.00001000", "ETHUSDT": "0.00010000"}


def market(name: str) -> dict[str, Any]:
    return {"symbol": name, "status": "TRADING", "baseAsset": name[:3], "baseAssetPrecision": 8, "quoteAsset": "USDT", "quotePrecision": 8, "quoteAssetPrecision": 8,
            "orderTypes": ["LIMIT", "MARKET"], "isSpotTradingAllowed": True, "isMarginTradingAllowed": True, "permissions": ["SPOT"],
            "filters": [{"filterType": "PRICE_FILTER", "minPrice": "0.01000000", "maxPrice": "1000000.00000000", "tickSize": "0.01000000"},
                        {"filterType": "LOT_SIZE", "minQty": STEPS[name], "maxQty": "9000.00000000", "stepSize": STEPS[name]},
                        {"filterType": "NOTIONAL", "minNotional": "5.00000000", "applyMinToMarket": True, "maxNotional": "9000000.00000000"}]}


PERPETUAL = {**market("BTCUSDT"), "pair": "BTCUSDT", "contractType": "PERPETUAL", "marginAsset": "USDT", "deliveryDate": 4_133_404_800_000, "onboardDate": 1_569_398_400_000, "contractSize": 1}
FUNDED = 1_669_852_800_000


class Loopback:
    """`snapshots`: the REST book by symbol; `candles`: rows of klines by symbol; each connection plays the next of `plays`: frames as text, None for a lost connection."""
    def __init__(self, plays: Sequence[Iterable[str | None]], snapshots: Mapping[str, Any], candles: Mapping[str, Sequence[Sequence[Any]]], now: int):
        self.plays, self.snapshots, self.candles, self.now = list(plays), snapshots, candles, now
        self.sent = self.connections = 0
        self.asked: list[dict[str, Any]] = []
        self.done = asyncio.Event()

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        self.connections += 1
        async for message in ws:
            if message.type is not WSMsgType.TEXT: continue
            self.asked.append(json.loads(message.data))
            await ws.send_str(json.dumps({"result": None, "id": self.asked[-1]["id"]}))
            try: await self._play(ws, request)
            except ClientConnectionResetError: break
        return ws

    async def _play(self, ws: web.WebSocketResponse, request: web.Request) -> None:
        for frame in self.plays.pop(0) if self.plays else ():
            if frame is None:
                assert request.transport
                return request.transport.abort()
            await ws.send_str(frame)
            self.sent += 1
        if not self.plays: self.done.set()

    async def rest(self, request: web.Request) -> web.Response:
        name, path = request.query.get("symbol", ""), request.path.rpartition("/v")[2][2:]
        match path:
            case "time": return web.json_response({"serverTime": self.now})
            case "exchangeInfo": return web.json_response({"symbols": {"api": [market(x) for x in SYMBOLS.values()], "fapiPublic": [PERPETUAL]}.get(request.path.split("/")[1], [])})
            case "fundingRate":
                settled = range(FUNDED, FUNDED + 1200 * 8 * HOUR, 8 * HOUR)
                rows = [t for t in settled if t >= int(request.query["startTime"])][:int(request.query["limit"])]
                return web.json_response([{"symbol": name, "fundingTime": t, "fundingRate": f"{(t - FUNDED) / HOUR * 1e-8:.8f}", "markPrice": "1"} for t in rows])
            case "openInterest": return web.json_response({"symbol": name, "openInterest": "10659.509", "time": self.now})
            case "depth": return web.json_response(self.snapshots[name])
            case "klines": return web.json_response([r for r in self.candles[name] if int(request.query["startTime"]) <= r[0] <= int(request.query["endTime"])])
        return web.json_response({"code": -1, "msg": f"no {request.path}"}, status=404)


@asynccontextmanager
async def served(*plays: Iterable[str | None], snapshots: Mapping[str, Any] | None = None, candles: Mapping[str, Any] | None = None, now: int) -> AsyncIterator[tuple[Loopback, Exchange]]:
    """The loopback venue and our client on it; market time is the server's and stands still."""
    venue = Loopback(plays, snapshots or {}, candles or {}, now)
    app = web.Application()
    app.router.add_get("/ws", venue.socket)
    app.router.add_get("/{path:.*}", venue.rest)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with Exchange(BINANCE, options={"urls": {"api": addresses(host)}}, clock=Clock(rate=0)) as client: yield venue, client
    finally: await runner.cleanup()


def addresses(host: str) -> dict[str, Any]:
    """Every address of ccxt's class, on loopback: nothing can be asked anywhere else."""
    import ccxt.pro

    def local(x: Any, path: str) -> Any: return {k: local(v, k) for k, v in x.items()} if isinstance(x, dict) else f"http://{host}/{path}/v3" if x.startswith("http") else f"ws://{host}/ws"
    api = local(ccxt.pro.binance().urls["api"], "")
    return {**api, "public": f"http://{host}/api/v3"}


async def all_events(venue: Loopback, live: Streams, taken: list[Event]) -> None:
    """Take what arrives until all that was sent has."""
    while not venue.done.is_set() or live.frames < venue.sent:
        await live.inbox.wait(0.05)
        taken += live.inbox.take()
        await asyncio.sleep(0)
    taken += live.inbox.take(10**6)


# Made frames

def made(name: str) -> str: return FRAMES["binance"][name].decode()


SNAPSHOT = {"lastUpdateId": 8, "bids": [["61837.50", "1"], ["61837.00", "1"]], "asks": [["61837.70", "1"], ["61838.00", "1"]]}


def rest_row(bar: Bar) -> list[Any]: return [bar.time, *(f"{x:.8f}" for x in (bar.open, bar.high, bar.low, bar.close, bar.volume)), bar.time + MINUTE - 1, "0", 1, "0", "0", "0"]


def prints(opened: int) -> list[Print]: return [Print(t.time, t.price, t.amount, t.is_buy, str(t.id)) for t in TICKS if opened <= t.time < opened + MINUTE]


async def test_start_and_every_kind() -> None:
    kinds: tuple[Kind, ...] = ("trades", "candles", "quotes", "book", "day")
    async with served(map(made, FRAMES["binance"]), snapshots={"BTCUSDT": SNAPSHOT}, now=NOW) as (venue, client):
        assert client.clock.now() == NOW and client.rules("ETH/USDT") == MarketRules("ETH/USDT", lot=1e-4, tick=0.01, min_notional=5.0, active=True)
        got: list[Event] = []
        async with Streams(client, ["BTC/USDT", "ETH/USDT"], kinds) as live:
            assert venue.asked == [{"method": "SUBSCRIBE", "id": 1, "params": [
                f"{x}usdt@{c}" for x in ("btc", "eth") for c in ("trade", "kline_1m", "bookTicker", "depth@100ms", "miniTicker")]}]
            await all_events(venue, live, got)
            assert live.counts["frames"] == len(FRAMES["binance"]) and not live.counts["malformed"] and not live.gaps
        assert [x for x in got if isinstance(x, Trade)] == [Trade("BTC/USDT", t.time, t.price, t.amount, t.is_buy, str(t.id), NOW) for t in TICKS]
        feed = Feed(list(SYMBOLS), grace=2000)
        minutes = [m for e in got for m in feed.on(e)]
        [m] = minutes + feed.tick(NOW)[:1]
        assert (m.proof, m.bar, list(m.trades)) == ("stream", build(START, prints(START)), prints(START))
        ladder = feed.symbols["BTC/USDT"].ladder
        assert ladder.reset(await client.book("BTC/USDT")) and ladder.version == 9 and ladder.best == (61837.6, 61838.0)
        assert {KIND[type(e)] for e in got} == set(kinds) and next(e for e in got if isinstance(e, Quote)).time == NOW, "bookTicker tells no time: it is our clock's"


async def test_funding_and_open_interest() -> None:
    """More settlements than one page holds, paged by time; what there is no perpetual of is unknown."""
    async with served(now=NOW) as (_, client):
        rates = await client.funding("BTC/USDT", FUNDED + 8 * HOUR, FUNDED + 1150 * 8 * HOUR)
        assert rates["time"].to_list() == [FUNDED + k * 8 * HOUR for k in range(1, 1150)] and rates["rate"][0] == 8e-8
        assert await client.open_interest("BTC/USDT") == 10659.509 and await client.open_interest("ETH/USDT") is None
        assert (await client.funding("ETH/USDT", FUNDED, NOW)).is_empty()
        with pytest.raises(BadSetting, match="own orders are not streamed from binance"): Streams(client, ["BTC/USDT"], private=True)


async def test_a_lost_connection_and_bad_frames() -> None:
    """The connection breaks after the first trades: one gap, and the rest comes on the next one. A frame that breaks a rule is survived."""
    names = list(FRAMES["binance"])
    bad = made("trade 100").replace("61837.63", "NaN"), '{"stream":"btcusdt@trade","data":[1]}', '{"stream":"x"}'
    async with served([*map(made, names[:2]), *bad, None], map(made, names[2:]), now=NOW) as (venue, client):
        got: list[Event] = []
        async with Streams(client, ["BTC/USDT"], ("trades", "candles"), patience=Patience(backoff=0.1)) as live:
            await all_events(venue, live, got)
            assert live.counts["malformed"] == len(bad) and venue.connections == 2 and len(live.reconnects) == 1
            assert live.gaps["malformed frame"] == len(bad) and sum(live.gaps.values()) == len(bad) + 1
        lost = [k for k, e in enumerate(got) if isinstance(e, Gap)][-1]
        assert [type(e) for e in got[:lost] if not isinstance(e, Gap)] == [Trade, Trade]
        assert [e.id for e in got if isinstance(e, Trade)] == [str(t.id) for t in TICKS] and any(isinstance(e, Candle) for e in got[lost:])


async def test_follower(tmp_path: Path) -> None:
    """The follower on the second venue: a minute without a candle on the stream is asked for by REST, and its trades are proof enough."""
    names = [n for n in FRAMES["binance"] if "kline" not in n]
    bar = build(START, prints(START))
    assert bar
    store = Store(tmp_path, StoreKey(source="exchange", venue="binance", market="spot"))
    s = BINANCE.override(data={"symbols": ("BTC/USDT",)})
    async with served(map(made, names), candles={"BTCUSDT": [rest_row(bar)]}, snapshots={"BTCUSDT": SNAPSHOT}, now=START) as (venue, client):
        follower = Follower(client, store, s, kinds=("trades", "quotes", "book", "day"), say=lambda _: None)
        follower.begin()
        async with follower.streams:
            await asyncio.wait_for(venue.done.wait(), 10)
            while follower.streams.frames < venue.sent: await asyncio.sleep(0.01)  # noqa: ASYNC110
            venue.now = NOW
            await follower.books()
            assert await follower.settle(10) == 0
        told = follower.ledger()
        assert told["dropped"] == 0 and told["symbols"]["BTC/USDT"]["known"] == {"rest": 1} and told["symbols"]["BTC/USDT"]["doubts"] == {"no candle": 1}
        assert follower.feed.symbols["BTC/USDT"].ladder.best == (61837.6, 61838.0)
    assert store.read_trades("BTC/USDT", START, START + MINUTE)["price"].to_list() == [t.price for t in TICKS[:3]]
    assert [Bar(**r) for r in store.read("BTC/USDT", START, START + MINUTE).iter_rows(named=True)] == [Bar(*rest_values(bar), "backfilled")]


def rest_values(b: Bar) -> tuple[int, float, float, float, float, float]: return b.time, b.open, b.high, b.low, b.close, b.volume


async def test_a_real_key_is_never_sent_to_another_address() -> None:
    with pytest.raises(Refused, match="emulator keys only"): Exchange(BINANCE, options={"apiKey": "real", "secret": "x", "urls": {"api": addresses("127.0.0.1:9")}})


async def test_no_server() -> None:
    with pytest.raises(Retry, match="binance: server time"):
        async with Exchange(BINANCE, options={"urls": {"api": addresses("127.0.0.1:9")}}, tries=2): pass


# Recorded frames

FROM, TO = 1_723_161_240_000, 1_723_161_960_000   # 2024-08-08 23:54 to 2024-08-09 00:06


class Line(NamedTuple):
    """A line of the recording: its time by the recorder's clock (ns), and what was said."""
    time: int
    text: str


def lines(name: str) -> Iterator[Line]:
    for day in ("08", "09"):
        with gzip.open(ROOT / f"recorded/binance_spot_{name.lower()}_202408{day}.gz", "rt") as f:
            for line in f:
                time, _, text = line.rstrip("\n").partition(" ")
                yield Line(int(time), text)


class Best(NamedTuple):
    """bookTicker as recorded: the book's version, and its best bid and ask."""
    version: int
    bid: float
    ask: float


@recorded
@pytest.mark.timeout(300)
async def test_recorded_frames() -> None:
    """Eleven minutes of both symbols, 179,000 frames as Binance sent them: each trade once, each whole minute equal to the venue's candle, one book from beginning to end."""
    said = list(heapq.merge(*map(lines, SYMBOLS.values())))
    told = [x for x in said if '"stream"' in x.text[:12]]
    snapshots = {name: next(json.loads(x.text) for x in lines(name) if '"stream"' not in x.text[:12]) for name in SYMBOLS.values()}
    bests: dict[str, list[Best]] = {x: [] for x in SYMBOLS}
    for x in told:
        if "@bookTicker" in x.text[:40]:
            d = json.loads(x.text)["data"]
            bests[next(k for k, v in SYMBOLS.items() if v == d["s"])].append(Best(d["u"], float(d["b"]), float(d["a"])))

    got: list[Event] = []
    async with served((x.text for x in told), snapshots=snapshots, now=told[0].time // 10**6) as (venue, client):
        async def advance() -> None:
            while True:
                venue.now = told[max(0, venue.sent - 1)].time // 10**6 + 1270   # the recorder's clock was slow
                await client.sync_time()
                await asyncio.sleep(0.05)

        moving = asyncio.create_task(advance())
        async with Streams(client, list(SYMBOLS), ("trades", "quotes", "book")) as live:
            books = {x: await client.book(x) for x in SYMBOLS}
            await all_events(venue, live, got)
            moving.cancel()
            assert live.frames == venue.sent == len(told) and live.counts["malformed"] == live.inbox.dropped == 0 and not live.gaps

    trades = pl.read_parquet(ROOT / "recorded/binance_trades_20240808_0809.parquet").filter(pl.col("market") == "spot")
    for symbol, name in SYMBOLS.items():
        mine = [e for e in got if e[0] == symbol]
        prints = [Print(e.time, e.price, e.amount, e.is_buy, e.id) for e in mine if isinstance(e, Trade)]
        rows = trades.filter(pl.col("symbol") == name).sort("recv_ts_ns", maintain_order=True).select("trade_ms", "price", "qty", ~pl.col("buyer_is_maker"), pl.col("trade_id").cast(pl.String))
        assert prints == [Print(*r) for r in rows.iter_rows()] and len(prints) > 14_000
        ids = [int(t.id) for t in prints]
        assert ids == list(range(ids[0], ids[-1] + 1)), "nothing is missing, nothing twice"

        candles = pl.read_parquet(ROOT / f"candles_1m/{name}/2024.parquet").with_columns(time=pl.col("timestamp").dt.epoch("ms")).filter(pl.col("time").is_between(FROM + MINUTE, TO - 2 * MINUTE))
        assert [build(t, [x for x in prints if t <= x.time < t + MINUTE]) for t in candles["time"]] == [Bar(*r) for r in candles.select("time", "open", "high", "low", "close", "volume").iter_rows()]
        assert len(candles) == 10

        # The book: it begins at the one snapshot and is never unknown again.
        feed = Feed(list(SYMBOLS), grace=2000)
        ladder, best = feed.symbols[symbol].ladder, {q.version: q[1:] for q in bests[symbol]}
        assert [e[2:4] for e in mine if isinstance(e, Quote)] == [q[1:] for q in bests[symbol]]
        shared = newest = differ = 0
        waiting = iter(bests[symbol])
        quote, upcoming = None, next(waiting)
        for k, e in enumerate(mine):
            feed.on(e)
            if k == 500: assert ladder.reset(books[symbol]), "the changes before it have waited, and one of them straddles it"
            if k < 500 or not isinstance(e, BookChange): continue
            assert ladder.version == e.last and not ladder.broken
            if e.last in best:
                shared += 1
                assert ladder.best == best[e.last], "at a version that both tell they are equal"
            while upcoming and upcoming.version <= e.last: quote, upcoming = upcoming, next(waiting, None)
            newest += 1
            differ += quote is not None and ladder.best != quote[1:]
        # Between two versions that both tell the newest bookTicker is the book's best too, but for two that the stream left out.
        assert shared > 900 and newest > 6300 and differ <= 2, (symbol, shared, newest, differ)
