"""The client over ccxt's own class: against the emulator, and against a hostile server."""
from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import keyring
import keyring.backend
import pytest
from aiohttp import web

from realdeal import exchange
from realdeal.broker import CcxtBroker
from realdeal.emulator import Emulator, Limits, serve
from realdeal.exchange import Clock, Exchange
from realdeal.market import SIMULATED_START, funding, generate
from realdeal.settings import Settings
from realdeal.types import DAY, HOUR, MINUTE, BadSetting, Intent, OrderStatus, Refused, Retry, RealdealError
from realdeal.venue import NewOrder
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
        broker, price = CcxtBroker(venue, set), (await venue.quote("BTC/USDT")).bid
        intent = Intent("rdlimit", "BTC/USDT", "buy", 0.01, NOW, kind="limit", price=round(price * 0.9, 2))
        order = await broker.submit(intent)
        assert order.status is OrderStatus.OPEN and [o["clientOrderId"] for o in await venue.open_orders("BTC/USDT")] == ["rdlimit"]
        await venue.cancel(order)
        told = await broker.poll(order)
        assert told.event == "canceled" and told.fills == [] and not e.venue.open_orders()


async def test_rejected_is_not_unknown() -> None:
    async with opened() as (venue, e):
        order = await CcxtBroker(venue, set).submit(Intent("rdrich", "BTC/USDT", "sell", 5.0, NOW))
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
        patient, quick = CcxtBroker(venue, set, patience=60), CcxtBroker(venue, set, patience=0)
        from realdeal.types import Order

        order = Order(lost, OrderStatus.UNKNOWN)
        assert (await patient.poll(order)).event == "lost", "the venue may still accept it"
        assert (await quick.poll(order)).event == "never arrived", "nobody knows it, and no trade is its own"
        await quick.submit(Intent("rdother", "BTC/USDT", "buy", 0.01, NOW))
        assert (await quick.poll(order)).event == "never arrived", "a trade that names another order is not its own"
        await e.place("emulator-main", NewOrder("BTC/USDT", "BUY", "MARKET", Decimal("0.01")))
        assert (await quick.poll(order)).event == "lost", "a trade that no known order explains may be its own"
        assert len(e.venue.all_orders()) == 2


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


async def test_markets_are_kept_for_a_day(tmp_path: Path) -> None:
    """A restart asks for no market; after a day, or for another venue, it does."""
    async with opened() as (_, e):
        def asked() -> int: return sum(n for (endpoint, _), (_, n) in e.throttle.spent.items() if endpoint.endswith("exchangeInfo"))
        before, file = asked(), tmp_path / "markets.json"
        for _ in range(3):
            async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), cache=file) as venue:
                assert venue.rules("BTC/USDT").lot == 1e-6 and len(await venue.funding("BTC/USDT", SIMULATED_START, NOW)) == 3
        once = asked() - before
        kept = json.loads(file.read_text())
        for other in ({"time": time.time() - 90_000}, {"venue": "binance"}):
            file.write_text(json.dumps(kept | other))
            async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), cache=file): pass
        assert once > 0 and asked() - before == 3 * once
        file.write_text("{")
        async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), cache=file): pass


async def test_an_endpoint_waits_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are counted by endpoint, as the venue does: reading the books holds up no order."""
    monkeypatch.setattr(exchange, "WINDOW", 1.0)
    async with opened() as (venue, e):
        began = time.monotonic()
        for _ in range(5): await venue.account_trades("BTC/USDT", NOW - HOUR)       # 50 of 40 that one second allows
        assert time.monotonic() - began > 0.5
        began = time.monotonic()
        assert (await venue.submit(Intent("quick", "BTC/USDT", "buy", 0.01, NOW))).status is OrderStatus.OPEN
        assert time.monotonic() - began < 0.5
        assert not any(n > e.limits.weight for _, n in e.throttle.spent.values())


async def test_a_key_that_may_too_much_or_too_little() -> None:
    async with opened() as (venue, e):
        assert await venue.check_key() == ""
        for change, why in (({"canWithdraw": True}, "may withdraw"), ({"canTrade": False}, "may not trade")):
            before, e.permissions = e.permissions, e.permissions | change
            with pytest.raises(Refused, match=why): await venue.check_key()
            e.permissions = before
        e.permissions = {}
        assert "does not tell" in await venue.check_key()
        venue.client.secret = ""
        with pytest.raises(Refused, match="MEXC_API_KEY"): await venue.check_key()


async def test_an_order_is_rehearsed() -> None:
    """MEXC checks an order without placing it; what it would not take is told before the first one is meant."""
    async with opened() as (venue, e):
        await venue.rehearse("BTC/USDT")
        assert not e.venue.all_orders()
        venue.client.secret = "another"
        with pytest.raises(RealdealError): await venue.rehearse("BTC/USDT")


def test_a_secret_comes_from_the_environment_or_the_key_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store(keyring.backend.KeyringBackend):
        priority = 1
        def get_password(self, service: str, username: str) -> str | None: return f"{service} {username}" if username == "MEXC_SECRET" else None
        def set_password(self, service: str, username: str, password: str) -> None: raise NotImplementedError
        def delete_password(self, service: str, username: str) -> None: raise NotImplementedError
    before = keyring.get_keyring()
    try:
        keyring.set_keyring(Store())
        monkeypatch.setenv("MEXC_API_KEY", "from the environment")
        assert (exchange.secret("MEXC_API_KEY"), exchange.secret("MEXC_SECRET"), exchange.secret("OKX_SECRET")) == ("from the environment", "realdeal MEXC_SECRET", "")
    finally: keyring.set_keyring(before)


@pytest.mark.parametrize("venue", exchange.TESTNETS)
async def test_testnets(venue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of the stage testnet go to the venue's own testnet, with keys of their own."""
    monkeypatch.setenv(f"{venue.upper()}_TESTNET_API_KEY", "test key")
    monkeypatch.setenv(f"{venue.upper()}_API_KEY", "real key")
    made = Exchange(Settings(), venue=venue, sandbox=True)
    try:
        assert made.is_sandbox and made.client.apiKey == "test key" and made.client.isSandboxModeEnabled
        assert "test" in json.dumps(made.client.urls["api"]) or made.client.headers.get("x-simulated-trading") == "1" or made.client.options.get("sandboxMode")
    finally: await made.close()


@pytest.mark.parametrize(("venue", "path", "api"), [("mexc", "order", ["spot", "private"]), ("binance", "order", ["private"]), ("bybit", "v5/order/create", ["private"]), ("okx", "trade/batch-orders", ["private"]), ("okx", "trade/order", ["private"])])
async def test_the_gate_knows_what_places_an_order(venue: str, path: str, api: list[str]) -> None:
    """The addresses that ccxt sends orders to, as it makes them itself."""
    made = Exchange(Settings(), options={"apiKey": "k", "secret": "s", "password": "p"}, venue=venue)
    try: assert exchange._PLACES.search(made.client.sign(path, api, "POST", {"a": 1})["url"].partition("?")[0])
    finally: await made.close()


async def test_an_order_of_many_executions_is_told_whole() -> None:
    async with opened() as (venue, e):
        low = round(float(e.venue.books["BTC/USDT"].last) * 0.9, 2)
        order = await venue.submit(Intent("many", "BTC/USDT", "buy", 0.05, NOW, "limit", low))
        for k in range(230): e.venue._fill(e.venue.orders[str(order.venue_id)], Decimal(str(low)), Decimal("0.0001"), NOW - 1000 + k * 4, is_maker=True)
        fills = await venue.fills_of(order)
        assert len({f.trade_id for f in fills}) == len(fills) == 230
