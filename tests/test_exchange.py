"""The client over ccxt's own class: against the emulator, and against a hostile server."""
from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from realdeal.broker import CcxtBroker
from realdeal.emulator import Emulator, Limits, serve
from realdeal.exchange import Clock, Exchange
from realdeal.emulator import SIMULATED_START
from realdeal.market import funding, generate
from realdeal.settings import Settings
from realdeal.types import DAY, HOUR, MINUTE, BadSetting, Intent, OrderStatus, Refused, Retry
from realdeal.wire import client_options

SYMBOLS = ("BTC/USDT", "ETH/USDT")
NOW = SIMULATED_START + DAY


@asynccontextmanager
async def opened(**kw: object) -> AsyncIterator[tuple[Exchange, Emulator]]:
    histories = generate("realistic", SYMBOLS, SIMULATED_START, 2 * 1440, seed=5)
    async with serve(histories=histories, funding={x: funding(x, SIMULATED_START, 2 * 1440, seed=5) for x in SYMBOLS}, now=NOW, seed=5, **kw) as e:
        async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=3) as venue: yield venue, e


async def test_reads() -> None:
    async with opened() as (venue, _):
        quote = await venue.quote("BTC/USDT")
        assert 0 < quote.bid < quote.ask
        assert await venue.open_interest("BTC/USDT") > 0
        rates = await venue.funding("BTC/USDT", SIMULATED_START, NOW + DAY)
        assert rates["time"].to_list() == [SIMULATED_START + k * 8 * HOUR for k in range(4)]
        page = await venue.candles("BTC/USDT", NOW - 100 * MINUTE, NOW + DAY)
        assert page["time"][-1] == NOW - MINUTE, "only closed bars"
        assert (await venue.balance())["USDT"] == 100_000
        assert venue.rules("BTC/USDT").min_notional == 5


async def test_limit_order_lives_and_dies() -> None:
    async with opened() as (venue, e):
        broker, price = CcxtBroker(venue), (await venue.quote("BTC/USDT")).bid
        intent = Intent("rdlimit", "BTC/USDT", "buy", 0.01, NOW, kind="limit", price=round(price * 0.9, 2))
        order = await broker.submit(intent)
        assert order.status is OrderStatus.OPEN and [o["clientOrderId"] for o in await venue.open_orders("BTC/USDT")] == ["rdlimit"]
        await venue.cancel(order)
        done, fills = await broker.poll(order)
        assert done.status is OrderStatus.CANCELED and fills == [] and not e.venue.open_orders()


async def test_rejected_is_not_unknown() -> None:
    async with opened() as (venue, e):
        order = await CcxtBroker(venue).submit(Intent("rdrich", "BTC/USDT", "sell", 5.0, NOW))
        assert order.status is OrderStatus.REJECTED and "Insufficient" in order.reason and not e.venue.all_orders()


@asynccontextmanager
async def server(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """A hostile venue on loopback; its address."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try: yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally: await runner.cleanup()


@pytest.mark.parametrize("status", [429, 418])
async def test_retry_after_is_honoured(status: int) -> None:
    """The venue says how long to wait: nothing is asked before that, and then the read succeeds."""
    asked: list[float] = []

    async def answer(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        if len(asked) == 1: return web.json_response({"code": status, "msg": "too much"}, status=status, headers={"Retry-After": "2"})
        return web.json_response({"serverTime": NOW})

    async with opened() as (venue, _), server(answer) as url:
        venue.client.urls["api"]["spot"]["public"] = url
        await venue.sync_time()
    assert len(asked) >= 2 and asked[1] - asked[0] >= 2


async def test_limits_of_the_venue_are_survived() -> None:
    """More than the venue allows in a window: refused, waited for, and all of it arrives."""
    async with opened(limits=Limits(weight=10, window=1.0)) as (venue, _):
        pages = [await venue.candles("BTC/USDT", NOW - (k + 1) * MINUTE, NOW) for k in range(25)]
    assert [len(p) for p in pages] == list(range(1, 26))


@pytest.mark.parametrize("body", ["", "[]", "{}", "<html>busy</html>", '{"orderId": ""}'])
async def test_garbled_answers_about_orders(body: str) -> None:
    """A body with status 200 that says nothing: the order is unknown, never open, and looking it up is asked again."""
    async def answer(_: web.Request) -> web.Response: return web.Response(text=body, content_type="application/json")

    async with opened() as (venue, _), server(answer) as url:
        venue.client.urls["api"]["spot"]["private"] = url
        intent = Intent("rdlost", "BTC/USDT", "buy", 0.01, NOW)
        order = await venue.submit(intent)
        assert order.status is OrderStatus.UNKNOWN and "busy" not in str(order.venue_id)
        with pytest.raises(Retry): await venue.look_up(intent)


async def test_never_arrived_needs_patience_and_proof() -> None:
    async with opened() as (venue, e):
        lost = Intent("rdlost", "BTC/USDT", "buy", 0.01, NOW)
        patient, quick = CcxtBroker(venue, patience=60), CcxtBroker(venue, patience=0)
        from realdeal.types import Order

        order = Order(lost, OrderStatus.UNKNOWN)
        assert (await patient.poll(order))[0].status is OrderStatus.UNKNOWN, "the venue may still accept it"
        assert (await quick.poll(order))[0].status is OrderStatus.REJECTED, "nobody knows it, and no trade is its own"
        await quick.submit(Intent("rdother", "BTC/USDT", "buy", 0.01, NOW))
        assert (await quick.poll(order))[0].status is OrderStatus.UNKNOWN, "a trade that no known order explains may be its own"
        assert len(e.venue.all_orders()) == 1


async def test_unknown_symbol() -> None:
    histories = generate("null", ["BTC/USDT"], SIMULATED_START, 1440, seed=5)
    async with serve(histories=histories, now=SIMULATED_START + HOUR) as e:
        with pytest.raises(BadSetting, match=r"\[data\] symbols: ETH/USDT: not a market of mexc"):
            async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)): pass


async def test_unreachable_exchange() -> None:
    with pytest.raises(Retry, match="mexc: server time: ExchangeNotAvailable"):
        async with Exchange(Settings(), options=client_options("http://127.0.0.1:9"), tries=2): pass


def test_real_keys_are_not_sent_to_strangers() -> None:
    with pytest.raises(Refused, match="emulator keys only"): Exchange(Settings(), options={**client_options("http://127.0.0.1:9"), "apiKey": "mx0real"})
