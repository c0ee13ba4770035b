"""Faults that strike at orders, each as the real ccxt client meets it, and the books that tell what is true."""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import ccxt.pro
import pytest

from realdeal.emulator import Emulator, serve
from realdeal.faults import REFUSALS, UNTIL, chosen, storm
from realdeal.market import SIMULATED_START, generate
from realdeal.types import DAY, MINUTE
from realdeal.wire import client_options

NOW, KEY, SYMBOL = SIMULATED_START + DAY, "emulator-main", "BTC/USDT"
HISTORIES = generate("realistic", (SYMBOL, "ETH/USDT"), SIMULATED_START, 2 * 1440, seed=5)


class Client(ccxt.pro.mexc):
    """ccxt's own class, told the market's time."""
    emulator: Emulator

    def nonce(self) -> int: return self.emulator.clock.now

    async def buy(self, name: str, price: float = 20_000, amount: float = 0.01, **kw: Any) -> Any:
        return await self.create_order(SYMBOL, "limit", "buy", amount, price, {"clientOrderId": name, **kw})

    async def drop(self, name: str) -> Any: return await self.cancel_order(None, SYMBOL, {"clientOrderId": name})

    async def ask(self, name: str) -> Any: return await self.fetch_order(None, SYMBOL, {"clientOrderId": name})


@asynccontextmanager
async def opened(**kw: Any) -> AsyncIterator[tuple[Client, Emulator]]:
    given = {"histories": HISTORIES, "now": NOW, "seed": 5, "balances": {"USDT": 100_000, "BTC": 1}} | kw
    async with serve(**given) as e:
        x = Client({**client_options(e.url), "enableRateLimit": False})
        x.emulator = e
        try:
            await x.load_markets()
            yield x, e
        finally: await x.close()


async def control(e: Emulator, method: str, path: str, **kw: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.request(method, f"{e.url}/emulator/{path}", params=kw) as r: return r.status, await r.json()


async def books(e: Emulator) -> Any: return (await control(e, "GET", "books", account=KEY))[1]


async def tried(names: list[str], call: Callable[[str], Awaitable[Any]], error: type[Exception]) -> set[str]:
    """Those of `names` for which `call` raised `error`."""
    failed = set()
    for name in names:
        try: await call(name)
        except error as e:
            assert type(e) is error, repr(e)
            failed.add(name)
    return failed


async def until(ready: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not ready(): await asyncio.sleep(0.02)  # noqa: ASYNC110


NAMES = [f"o{k}" for k in range(16)]


async def test_a_lost_answer_is_of_a_done_order() -> None:
    async with opened() as (x, e):
        e.fault("lost_ack", 30, seed=1)
        lost = await tried(NAMES, x.buy, ccxt.RequestTimeout)
        told = await books(e)
        assert 3 < len(lost) < 13 and len(lost) == e.hub.faults.bit["lost_ack"]
        assert [o["client_id"] for o in told["orders"]] == NAMES and told["requests"] == 16 and told["refused"] == told["duplicates"] == []
        assert 3 < len(await tried(NAMES, x.drop, ccxt.RequestTimeout)) < 13 and not e.venue.open_orders()
        assert {o["status"] for o in (await books(e))["orders"]} == {"CANCELED"}


async def test_a_lost_order_never_arrives() -> None:
    async with opened() as (x, e):
        e.fault("lost_order", 30, seed=1)
        lost = await tried(NAMES, x.buy, ccxt.RequestTimeout)
        told, there = await books(e), [n for n in NAMES if n not in lost]
        assert 3 < len(lost) < 13 and [o["client_id"] for o in told["orders"]] == there and told["requests"] == len(there)
        kept = await tried(there, x.drop, ccxt.RequestTimeout)
        assert kept and {o.request.client_id for o in e.venue.open_orders()} == kept


async def test_a_late_order_arrives_or_is_too_old_then() -> None:
    async with opened() as (x, e):
        e.fault("late_order", 30, seed=1)
        began = time.time()
        late = await tried(NAMES[:8], x.buy, ccxt.RequestTimeout)
        assert late and not {o["client_id"] for o in (await books(e))["orders"]} & late
        await asyncio.sleep(UNTIL[1] + 0.2)
        arrived = {o["client_id"]: o["arrived"] for o in (await books(e))["orders"]}
        assert set(arrived) == set(NAMES[:8]) and all(arrived[n] - began > UNTIL[0] for n in late)
        stale = await tried(NAMES[8:], x.buy, ccxt.RequestTimeout)
        await e.clock.step(1)   # every stamp is a minute old now
        await asyncio.sleep(UNTIL[1] + 0.2)
        told = await books(e)
        assert stale and {o["client_id"] for o in told["orders"]} == set(NAMES) - stale and told["requests"] == len(NAMES)
        assert {(r["client_id"], r["code"], r["injected"]) for r in told["refused"]} == {(n, 700003, False) for n in stale}


@pytest.mark.parametrize(("name", "error"), [("reject", ccxt.ExchangeError), ("poor", ccxt.InsufficientFunds), ("untradable", ccxt.BadSymbol)])
async def test_a_refusal_is_recorded_as_made(name: str, error: type[Exception]) -> None:
    async with opened() as (x, e):
        e.fault(name, 30, seed=1)
        refused = await tried(NAMES, x.buy, error)
        told = await books(e)
        assert 3 < len(refused) < 13 and {o["client_id"] for o in told["orders"]} == set(NAMES) - refused and told["requests"] == 16
        assert [(r["client_id"], r["code"], r["injected"]) for r in told["refused"]] == [(n, REFUSALS[name][0], True) for n in NAMES if n in refused]
        assert await tried(sorted(set(NAMES) - refused), x.drop, ccxt.ExchangeError) == set(), "a cancel is not refused"
        for k in range(8):   # an order that is wrong itself is its sender's fault, whatever strikes
            with pytest.raises(ccxt.InsufficientFunds): await x.buy(f"rich{k}", amount=100)
        assert {(r["code"], r["injected"]) for r in (await books(e))["refused"][len(refused):]} == {(10101, False)}


async def test_maintenance_is_an_outage() -> None:
    async with opened() as (x, e):
        await x.buy("before")
        e.fault("maintenance", 2)
        for call in (x.fetch_balance, lambda: x.buy("during"), lambda: x.drop("before"), lambda: x.ask("before"), lambda: x.fetch_open_orders(SYMBOL), lambda: x.fetch_my_trades(SYMBOL)):
            with pytest.raises(ccxt.ExchangeNotAvailable): await call()
        assert await x.fetch_time() == NOW and (await x.fetch_order_book(SYMBOL))["bids"]
        await e.clock.step(2)
        assert (await books(e))["outages"] == [{"name": "maintenance", "from": NOW, "to": e.clock.now}]
        await until(lambda: not e.hub.faults.lasting)
        await e.clock.step(1)
        told = await books(e)
        assert told["outages"] == [{"name": "maintenance", "from": NOW, "to": NOW + 2 * MINUTE + 2000}] and (told["requests"], told["refused"]) == (1, [])
        assert (await x.ask("before"))["status"] == "open"


async def test_a_look_up_lags() -> None:
    async with opened() as (x, e):
        await x.buy("old")
        await asyncio.sleep(2.1)
        e.fault("lookup_lag", 30)
        await x.buy("new")
        await x.create_order(SYMBOL, "market", "sell", 0.01, None, {"clientOrderId": "sold"})
        async def seen() -> list[Any]: return [{o["clientOrderId"] for o in await x.fetch_open_orders(SYMBOL)}, {o["clientOrderId"] for o in await x.fetch_orders(SYMBOL)}, len(await x.fetch_my_trades(SYMBOL))]
        with pytest.raises(ccxt.ExchangeError, match="-2013"): await x.ask("new")
        assert await seen() == [{"old"}, {"old"}, 0] and (await x.ask("old"))["status"] == "open" and (await x.fetch_balance())["BTC"]["total"] == 0.99
        assert len((await books(e))["deals"]) == 1, "the books do not lag"
        await asyncio.sleep(2.1)
        assert await seen() == [{"old", "new"}, {"old", "new", "sold"}, 1] and (await x.ask("new"))["status"] == "open"
        await x.buy("newest")
        assert (await x.drop("newest"))["id"], "where orders are matched nothing lags"


async def test_executions_come_in_pieces() -> None:
    async with opened() as (x, e):
        e.fault("partial", 2, seed=1)
        for name in NAMES[:8]: await x.create_order(SYMBOL, "market", "buy", 0.01, None, {"clientOrderId": name})
        states = [await x.ask(n) for n in NAMES[:8]]
        deals = await x.fetch_my_trades(SYMBOL)
        assert {o["status"] for o in states} == {"closed", "canceled"} and all(0 < o["filled"] <= 0.01 for o in states) and len(deals) >= 16
        assert sum(d["amount"] for d in deals) == pytest.approx(sum(o["filled"] for o in states)) and e.hub.faults.bit["partial"] == len(deals)
        assert {o["status"] for o in (await books(e))["orders"]} == {"FILLED", "PARTIALLY_CANCELED"}
        await until(lambda: not e.hub.faults.lasting)
        await x.create_order(SYMBOL, "market", "buy", 0.01, None, {"clientOrderId": "whole"})
        assert (await x.ask("whole"))["status"] == "closed" and len(await x.fetch_my_trades(SYMBOL)) == len(deals) + 1


async def test_a_cancel_comes_too_late() -> None:
    async with opened() as (x, e):
        for name in NAMES: await x.buy(name, amount=0.001)
        e.fault("cancel_race", 30, seed=1)
        filled = await tried(NAMES, x.drop, ccxt.BadRequest)
        states = {n: await x.ask(n) for n in NAMES}
        assert filled == {n for n, o in states.items() if o["status"] == "closed"} != set() and all(states[n]["filled"] == 0.001 for n in filled)
        some = {n for n, o in states.items() if 0 < o["filled"] < 0.001}
        assert some and {states[n]["status"] for n in some} == {"canceled"} and e.hub.faults.bit["cancel_race"] == len(filled | some) < 16
        with pytest.raises(ccxt.BadRequest, match="-2011"): await x.drop(min(filled))
        for name in NAMES: await x.buy(name, amount=0.001)
        await x.cancel_all_orders(SYMBOL)
        assert not e.venue.open_orders(), "one that was filled does not keep the others"


async def test_the_users_stream_is_lost() -> None:
    async with opened() as (x, e):
        orders, book = asyncio.create_task(x.watch_orders(SYMBOL)), asyncio.create_task(x.watch_order_book(SYMBOL))
        await until(lambda: len(e.hub.listeners) == 2)
        key = x.options["listenKey"]
        e.fault("user_lost")
        with pytest.raises(ccxt.NetworkError): await asyncio.wait_for(orders, 5)
        with pytest.raises(ccxt.ExchangeError, match="listenKey not exist"): await x.spotPrivatePutUserDataStream({"listenKey": key})
        assert e.hub.faults.bit["user_lost"] == 1 and [c.key for c in e.hub.connections] == [""], "public ones stay"
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{e.ws_url}?listenKey={key}") as ws: assert (await ws.receive()).data == "Invalid listen key"
        assert (await x.spotPrivatePostUserDataStream())["listenKey"] != key
        book.cancel()


async def test_foreign_orders_and_transfers_are_in_the_books() -> None:
    async with opened() as (x, e):
        heard = asyncio.create_task(x.watch_balance())
        await until(lambda: bool(e.hub.listeners))
        assert (await control(e, "POST", "transfer", account=KEY, asset="USDT", amount="-5"))[1]["USDT"]["free"] == "99995"
        assert (await asyncio.wait_for(heard, 5))["USDT"]["free"] == 99_995
        status, made = await control(e, "POST", "order", account=KEY, symbol="BTCUSDT", side="BUY", quantity="0.01")
        assert status == 200 and (made["status"], made["clientOrderId"]) == ("FILLED", None)
        told = await books(e)
        row, = told["orders"]
        assert (row["client_id"], row["id"], row["executed"], row["symbol"], row["created"]) == ("", made["orderId"], "0.01", "BTCUSDT", NOW) and abs(row["arrived"] - time.time()) < 5
        deal, = told["deals"]
        assert told["opening"] == {"USDT": {"free": "100000", "locked": "0"}, "BTC": {"free": "1", "locked": "0"}} and told["requests"] == 0
        assert told["transfers"] == [{"asset": "USDT", "amount": "-5", "time": NOW}] and told["balances"]["BTC"] == {"free": "1.01", "locked": "0"}
        assert float(told["balances"]["USDT"]["free"]) == pytest.approx(99_995 - float(deal["quoteQty"]) - float(deal["commission"]), abs=1e-9)
        assert (await x.fetch_my_trades(SYMBOL))[0]["order"] == made["orderId"]
        for wrong in ({"asset": "USDT", "amount": "-1e9"}, {"asset": "USDT", "amount": "0"}, {"asset": "USDT", "amount": "nan"}, {"amount": "5"}, {"account": "mx0real", "asset": "USDT", "amount": "5"}):
            assert (await control(e, "POST", "transfer", **({"account": KEY} | wrong)))[0] in (400, 409), wrong
        assert (await control(e, "GET", "books"))[0] == 409 and (await control(e, "POST", "order", account=KEY, symbol="NO", side="BUY", quantity="1"))[0] == 400
        assert await books(e) == told, "what was refused left no trace"


async def test_a_client_id_that_bought_twice_is_told() -> None:
    async with opened() as (x, e):
        await x.buy("once")
        for _ in range(2): await x.create_order(SYMBOL, "market", "buy", 0.01, None, {"clientOrderId": "twice"})
        with pytest.raises(ccxt.BadRequest, match="603"): await x.buy("once")
        told = await books(e)
        assert (told["duplicates"], told["requests"], [r["code"] for r in told["refused"]]) == (["twice"], 4, [603]) and (await control(e, "GET", "books", account="emulator-other"))[1]["orders"] == []


async def test_which_faults_are_outages() -> None:
    async with opened() as (_, e):
        for name in chosen("all"):
            if name not in ("stall", "kill", "disk_full"): e.fault(name, 30)
        e.fault("mute", 30)
        names = [o["name"] for o in (await books(e))["outages"]]
        assert len(names) == len(set(names)) and {"maintenance", "no_connect", "mute", "http_429", "empty_200", "contract_down"} <= set(names) and not {"lost_ack", "deaf", "refuse", "skew"} & set(names)


async def test_the_same_seed_strikes_the_same_orders() -> None:
    async def fates(seed: int) -> list[Any]:
        async with opened() as (x, e):
            for name in ("lost_ack", "lost_order", "reject", "partial"): e.fault(name, 30, seed)
            met = []
            for name in NAMES:
                try: met.append((await x.create_order(SYMBOL, "market", "buy", 0.01, None, {"clientOrderId": name}))["id"])
                except ccxt.BaseError as error: met.append(type(error))
            return [met, [{k: v for k, v in o.items() if k != "arrived"} for o in (await books(e))["orders"]]]
    assert await fates(3) == await fates(3) != await fates(4)


def test_a_listeners_storm_is_what_it_was() -> None:
    """Soaks go on and are compared by seed: these plans were printed before orders had faults."""
    assert [(p.at, p.name, p.seconds, p.seed) for p in storm(7, 120, chosen("storm"))] == [(6.439, "close", 0.0, 155217082), (21.718, "empty_200", 29.8, 1068846654), (64.66, "html_200", 24.6, 1501036642)]
    assert {p.name for p in storm(7, 3600, chosen("orders"))} == set(chosen("orders"))
