"""`python -m benchmarks.load [--rate 5000] [--minutes 10] [--json]`: a venue in a process of its own sends frames as MEXC's wire has them, over loopback, to the real client.

The client is ccxt's class with our streams and feed behind it; minutes that become known are counted and thrown away. Told at the end: time a frame, delay, memory, and that all that was sent
was received. The market is consistent: trades rebuild their candles and the book's versions follow on one another, so each minute must become known from the stream alone.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from multiprocessing.connection import Connection as Pipe
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import aiohttp
import numpy as np
from aiohttp import web
from rich.console import Console
from rich.table import Table

from realdeal.exchange import Exchange
from realdeal.feed import Feed
from realdeal.frames import Trade
from realdeal.ingest import ALL_KINDS
from realdeal.market import Tick
from realdeal.settings import Settings
from realdeal.streams import Streams
from realdeal.types import MINUTE, MarketRules, slug
from realdeal.venue import Depth, Fees
from realdeal.wire import KINDS, Day, client_options, deals_frame, depth_frame, kline_frame, market_info, mini_frame, ticker_frame

SYMBOLS = ("BTC/USDT", "ETH/USDT")
# Of a hundred frames: trades, book, best prices, running candle, day. Trades come one to three a frame.
MIX = {"deals": 40, "depth": 20, "ticker": 25, "kline": 14, "mini": 1}
CHANNEL = {"deals": "spot@public.aggre.deals.v3.api.pb@100ms@{}", "kline": "spot@public.kline.v3.api.pb@{}@Min1", "depth": "spot@public.aggre.depth.v3.api.pb@100ms@{}",
           "ticker": "spot@public.aggre.bookTicker.v3.api.pb@100ms@{}", "mini": "spot@public.miniTicker.v3.api.pb@{}@24H"}
assert set(MIX) < set(KINDS.values())


class Market:
    """One symbol whose frames agree with one another."""
    def __init__(self, symbol: str, price: float, seed: int):
        self.symbol, self.name, self.price, self.rng = symbol, slug(symbol), price, random.Random(f"{seed}{symbol}")
        self.channel = {k: c.format(self.name) for k, c in CHANNEL.items()}
        self.id, self.minute, self.volume = 0, 0, 0      # the volume in millionths, which add up exactly
        self.open = self.high = self.low = price
        self.book = self._depth(0)

    def _depth(self, version: int) -> Depth:
        def side(sign: int) -> tuple[tuple[Decimal, Decimal], ...]: return tuple((Decimal(f"{self.price + sign * (0.01 + 0.37 * k):.2f}"), Decimal(f"{self.rng.random() + 0.001:.6f}")) for k in range(5))
        return Depth(version, side(-1), side(1))

    def deals(self, now: int, n: int = 0) -> bytes:
        ticks = []
        for _ in range(n or self.rng.randint(1, 3)):
            self.price = round(self.price * (1 + self.rng.gauss(0, 1e-5)), 2)
            self.id += 1
            millionths = self.rng.randint(1, 100_000)
            ticks.append(Tick(now, self.symbol, self.id, self.price, millionths / 1e6, self.rng.random() < 0.5))
            self.open = self.open if self.volume else self.price
            self.high, self.low = (max(self.high, self.price), min(self.low, self.price)) if self.volume else (self.price, self.price)
            self.volume += millionths
        return deals_frame(self.channel["deals"], self.name, now, ticks)

    def kline(self, now: int) -> bytes:
        row = self.minute, self.open, self.high, self.low, self.price, self.volume / 1e6
        return kline_frame(self.channel["kline"], self.name, now, row, "Min1", MINUTE)

    def depth(self, now: int) -> bytes:
        before, self.book = self.book, self._depth(self.book.version + 1)
        return depth_frame(self.channel["depth"], self.name, now, before, self.book)

    def ticker(self, now: int) -> bytes: return ticker_frame(self.channel["ticker"], self.name, now, self.book)

    def mini(self, now: int) -> bytes: return mini_frame(self.channel["mini"], self.name, now, Day(self.price, self.price * 1.1, self.price / 1.1, self.price, 1234.5, 7.6e7))

    def turn(self, now: int) -> list[bytes]:
        "The last word on a minute that is over, and the first trade of the next."
        if now - now % MINUTE == self.minute: return []
        last = [self.kline(now)] if self.minute else []
        self.minute, self.volume = now - now % MINUTE, 0
        return [*last, self.deals(now)]


def frames(seed: int = 7) -> Iterator[Any]:
    """Frames without end: send the time in ms, get the frames of that moment."""
    markets = [Market(s, p, seed) for s, p in zip(SYMBOLS, (61_837.63, 2_683.8), strict=True)]
    rng, kinds, weights = random.Random(seed), list(MIX), list(MIX.values())
    now = yield markets
    while True:
        turned = [f for m in markets for f in m.turn(now)]
        now = yield [*turned, getattr(rng.choice(markets), rng.choices(kinds, weights)[0])(now)]


# The venue

def venue(pipe: Pipe, rate: int, seconds: float) -> None:
    """Serve until killed: `rate` frames a second for `seconds`, from the first subscription on."""
    asyncio.run(_venue(pipe, rate, seconds))


async def _venue(pipe: Pipe, rate: int, seconds: float) -> None:
    told = {"sent": 0, "done": 0, "late_s": 0.0}
    made = frames()
    markets: list[Market] = next(made)

    async def socket(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False)
        await ws.prepare(request)
        playing = None
        async for message in ws:
            asked = json.loads(message.data)
            if asked["method"].lower() == "ping": await ws.send_json({"id": 0, "code": 0, "msg": "PONG"})
            else:
                await ws.send_json({"id": 0, "code": 0, "msg": ",".join(asked["params"])})
                playing = playing or asyncio.create_task(play(ws))
        return ws

    async def play(ws: web.WebSocketResponse) -> None:
        began = time.monotonic()
        while (past := time.monotonic() - began) < seconds:
            await asyncio.sleep(0.002 if told["sent"] >= past * rate else 0)    # the reader of this socket needs its turn too
            told["late_s"] = max(told["late_s"], past - told["sent"] / rate)
            for _ in range(50):
                if told["sent"] >= past * rate: break
                for f in made.send(int(time.time() * 1000)):
                    await ws.send_bytes(f)
                    told["sent"] += 1
        told["done"] = 1

    async def rest(request: web.Request) -> web.Response:
        path = request.path.rpartition("/")[2]
        if path == "sent": return web.json_response(told)
        if path == "time": return web.json_response({"serverTime": int(time.time() * 1000)})
        if path == "exchangeInfo": return web.json_response({"symbols": [market_info(MarketRules(x, 1e-6, 0.01, 5.0), Fees()) for x in SYMBOLS]})
        if path == "depth":
            m = next(m for m in markets if m.name == request.query["symbol"])
            return web.json_response({"lastUpdateId": m.book.version, **{k: [[str(p), str(a)] for p, a in side] for k, side in (("bids", m.book.bids), ("asks", m.book.asks))}})
        return web.json_response({"success": True, "code": 0, "data": []})

    app = web.Application()
    app.router.add_get("/ws", socket)
    app.router.add_get("/{path:.*}", rest)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    pipe.send(runner.addresses[0][1])
    await asyncio.Event().wait()


# The client

def rss_mb() -> float:
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measured(url: str, minutes: float, say: Any) -> dict[str, Any]:
    "Take frames until the venue has sent its last, and tell how it went."
    known: Counter[str] = Counter()
    delays: list[float] = []      # ms from sending a trade until the feed has it
    parse: list[dict[str, float]] = []
    memory: list[float] = []
    feed, longest = Feed(SYMBOLS, 2000), 0
    async with aiohttp.ClientSession(url) as control, Exchange(Settings(), options=client_options(url)) as client, Streams(client, SYMBOLS, ALL_KINDS) as live:
        async def sent() -> dict[str, Any]:
            async with control.get("/sent") as answer: return dict(await answer.json())

        def count(found: list[Any]) -> None:
            for m in found: known[m.proof] += 1

        async def books() -> None:
            while True:
                for x in SYMBOLS:
                    if feed.symbols[x].ladder.version is None: feed.symbols[x].ladder.reset(await client.book(x))
                await asyncio.sleep(5)

        asking = asyncio.create_task(books())
        began = beat = time.monotonic()
        told, start = await sent(), rss_mb()
        trades = 0
        while not told["done"] or live.frames < told["sent"]:
            await live.inbox.wait(0.05)
            longest = max(longest, len(live.inbox))
            for e in live.inbox.take(5000):
                count(feed.on(e))
                if isinstance(e, Trade):
                    trades += 1
                    if not trades % 50: delays.append(time.time() * 1000 - e.time)
            count(feed.tick(client.clock.now()))
            await asyncio.sleep(0)
            if (now := time.monotonic()) - beat >= 10:
                beat, told = now, await sent()
                parse.append(live.parse_ms())
                memory.append(rss_mb())
                say(f"{now - began:5.0f} s: {live.frames:,} of {told['sent']:,} frames, {trades:,} trades, parse p95 {parse[-1]['p95']:.4f} ms, queue {len(live.inbox)}, {memory[-1]:.0f} MB, minutes {dict(known)}, in doubt {feed.missing()}")
            elif told["done"] or now - began > minutes * 60: told = await sent()
            if now - began > minutes * 60 + 60: break
        while events := live.inbox.take():
            for e in events: count(feed.on(e))
        took = time.monotonic() - began
        asking.cancel()
        memory.append(rss_mb())
        parse.append(live.parse_ms())
        p50, p95, p99 = (float(x) for x in np.percentile(delays or [0], (50, 95, 99)))
        return {"rate_asked": None, "rate": round(live.frames / took, 1), "minutes": round(took / 60, 2), "sent": told["sent"], "received": live.frames, "malformed": live.counts["malformed"], "trades": trades,
                "queue_dropped": live.inbox.dropped, "queue_longest": longest, "gaps": dict(live.gaps), "venue_late_s": round(told["late_s"], 3),
                "parse_ms": {k: round(float(np.median([x[k] for x in parse])), 5) for k in ("p50", "p95", "p99")}, "parse_ms_worst": {k: round(max(x[k] for x in parse), 5) for k in ("p50", "p95", "p99")},
                "delay_ms": {k: round(x, 2) for k, x in (("p50", p50), ("p95", p95), ("p99", p99), ("max", max(delays, default=0.0)))},
                "rss_mb": {"start": round(start, 1), "after_1_min": round(memory[min(5, len(memory) - 1)], 1), "half": round(memory[len(memory) // 2], 1), "end": round(memory[-1], 1), "most": round(max(memory), 1)}, "rss_mb_each_minute": [round(x) for x in memory[5::6]],
                "minutes_known": dict(known), "in_doubt": feed.missing(), "books_broken": {x: dict(y.ladder.broken) for x, y in feed.symbols.items()}}


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0], epilog="Example: python -m benchmarks.load --rate 5000 --minutes 10 --json")
    args.add_argument("--rate", type=int, default=5000, help="frames a second")
    args.add_argument("--minutes", type=float, default=10.0, help="how long")
    args.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = args.parse_args()
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=venue, args=(far, given.rate, given.minutes * 60), daemon=True)
    process.start()
    out = Console(stderr=True, width=200, highlight=False)
    try: told = asyncio.run(measured(f"http://127.0.0.1:{near.recv()}", given.minutes, out.print)) | {"rate_asked": given.rate}
    finally: process.kill()
    if given.json: print(json.dumps(told, indent=1))
    else:
        table = Table("what", "figure")
        for k, v in told.items(): table.add_row(k, ", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v, dict) else f"{v}")
        Console(width=150).print(table)


if __name__ == "__main__": main()
