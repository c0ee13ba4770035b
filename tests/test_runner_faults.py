"""What ends a runner, or holds it up, that should not: read from its code by somebody who did not trust it."""
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ccxt
import pytest
from conftest import REPO
from test_binance import BINANCE
from test_desk import BTC, ETH, KEY, MONEY, NOW, SYMBOLS, Life, alive, calm, emulator, lose, quick, settings_in, strange, tick  # noqa: F401

from realdeal.desk import kill_file, throw
from realdeal.emulator import Emulator
from realdeal.ensemble import load_predictor
from realdeal.exchange import Clock, Exchange
from realdeal.live import BEAT, Runner, run_clock
from realdeal.settings import Settings
from realdeal.store import Journal, Store, StoreKey
from realdeal.types import DAY, MINUTE, BadSetting, NotWritten, Observed, Order, OrderStatus, RealdealError, Refused, Rejected, Retry
from realdeal.wire import client_options


@asynccontextmanager
async def runner(folder: Path, e: Emulator, rate: float = 0, orders: Exchange | None = None, **more: Any) -> AsyncIterator[Runner]:
    """The real runner with the committed champion on an emulator of this process, not started."""
    s = settings_in(folder, **more)
    store, journal = Store(folder / "store", StoreKey(source="simulated", venue="emulator", market="realistic")), Journal(s.data_dir / "journals" / "journal.sqlite")
    try:
        async with Exchange(s, options=client_options(e.url), clock=Clock(rate)) as venue:
            yield Runner(s, venue, store, journal, load_predictor(REPO / "data" / "models", settings_in(folder), ("recorded",)), lambda text: None, orders=orders)
    finally: journal.close()


# The kill switch

async def test_flat_is_said_when_it_is_flat(tmp_path: Path) -> None:
    """After a restart no price is known yet; what cannot be sold is held, not sold, and is sold when it can be."""
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        await life.quiet()
        throw(kill_file(life.s), "a test", flatten=True)
        known = life.desk.standing
        life.desk.standing = lambda symbol: known(symbol)._replace(mark=None)
        assert not await life.desk.stand_down() and life.memory.account.positions[BTC] > 0
        life.desk.standing = known
        lose(life, "poor")
        assert not await life.desk.stand_down() and life.memory.account.positions[BTC] > 0, "the venue refused it"
        await calm(life.e)
        await tick(life)
        assert await life.desk.stand_down() and life.memory.account.positions[BTC] == 0.0


async def test_a_kill_that_sells_leaves_out_what_may_not_be_traded(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        for symbol, amount in ((BTC, 0.01), (ETH, 0.05)): await life.send(symbol, "buy", amount)
        await life.quiet()
        market = life.venue.client.markets[BTC]
        market["active"] = False
        life.rules[BTC] = life.venue.rules(BTC)
        throw(kill_file(life.s), "a test", flatten=True)
        assert not await life.desk.stand_down(), "one of them is held still"
        assert life.memory.account.positions[ETH] == 0.0 < life.memory.account.positions[BTC]


async def test_a_sale_may_follow_a_kill(tmp_path: Path) -> None:
    """The switch was thrown, by a fall of the equity perhaps, and now its owner wants out: no other way leads there that lets nothing be bought."""
    async with emulator() as e:
        async with alive(tmp_path, e) as life:
            await life.send(BTC, "buy", 0.01)
            await life.quiet()
        async with runner(tmp_path, e) as r:
            r.journal.db.execute("delete from decisions")      # that of a test says nothing of the market
            await r.start()
            throw(kill_file(r.s), "it fell")
            await r.guard()
            assert r.stood and r.memory.account.positions[BTC] > 0
            throw(kill_file(r.s), "out", flatten=True)
            throw(kill_file(r.s), "again", flatten=False)
            r.feed.symbols[BTC].price = Observed(float(e.venue.books[BTC].last), e.clock.now, e.clock.now)
            for _ in range(3): await r.guard()
            assert r.stood and r.memory.account.positions[BTC] == 0.0 and r.switch.why() == "it fell"


# The books

async def test_our_own_trade_is_no_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Binance tells no client id with a trade: while the answer to an order is lost, its trade belongs to no order that we know."""
    async with alive(tmp_path) as life:
        told = life.venue.account_trades
        async def nameless(*args: Any) -> Any: return [t._replace(client_id="") for t in await told(*args)]
        monkeypatch.setattr(life.venue, "account_trades", nameless)
        lose(life, "lost_ack")
        order = await life.send(BTC, "buy", 0.01)
        assert order.status is OrderStatus.UNKNOWN and not order.venue_id
        await calm(life.e)
        assert await life.look() == [] and not life.desk.halts
        await life.quiet()
        assert life.order(order.intent).status is OrderStatus.FILLED and not life.desk.halts
        other = await strange(life.e, BTC)
        assert other in str(await life.look()), "a stranger's is one all the same"


async def test_an_old_open_question_makes_no_stranger_of_us(tmp_path: Path) -> None:
    """While the fate of an order is open, trades are read from its time on; orders that old are still known."""
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        await life.quiet()
        await tick(life)
        lose(life)
        stuck = await life.send(ETH, "buy", 0.05)
        assert stuck.status is OrderStatus.UNKNOWN
        life.memory.forget(life.venue.clock.now() + 3 * DAY)
        assert await life.look() == [] and not life.desk.halts


# What the venue refuses or garbles ends no runner

async def test_a_refused_look_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01)
        def no(*args: Any, **kw: Any) -> None: raise ccxt.AuthenticationError("401 Unauthorized")
        with monkeypatch.context() as m:
            m.setattr(life.venue.client, "fetch_my_trades", no)
            await life.desk.follow()
        assert life.order(order.intent).status is OrderStatus.OPEN and "cannot be asked for now" in life.said[-1]
        await life.quiet()
        assert life.order(order.intent).status is OrderStatus.FILLED


@pytest.mark.parametrize("row", [{}, {"side": None}, {"amount": None}])
async def test_a_garbled_trade_is_asked_for_again(row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01)
        told = life.venue.client.fetch_my_trades
        async def garbled(*args: Any) -> Any: return [{**t, **row} if row else dict.fromkeys(t) for t in await told(*args)]
        with monkeypatch.context() as m:
            m.setattr(life.venue.client, "fetch_my_trades", garbled)
            await life.desk.follow()
            with pytest.raises(Retry, match="garbled"): await life.look()
        await life.quiet()
        assert life.order(order.intent).status is OrderStatus.FILLED


async def test_a_market_that_ended_is_known_still(tmp_path: Path) -> None:
    """It is traded no more; what was done there can still be asked for, and the others go on."""
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        await life.quiet()
        del life.e.venue.rules[BTC]
        await life.venue.reload()
        assert not life.venue.rules(BTC).active and life.venue.rules(ETH).active
        await life.venue.reload()
        assert not life.venue.rules(BTC).active


# Binance

async def test_a_testnets_key_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its account always says canWithdraw (github.com/JKorf/Binance.Net/issues/180), and there is no money."""
    venue = Exchange(BINANCE, venue="binance", sandbox=True)
    venue.client.apiKey = venue.client.secret = "x" * 20
    async def balance() -> Any: return {"info": {"canTrade": True, "canWithdraw": True}}
    monkeypatch.setattr(venue.client, "fetch_balance", balance)
    assert await venue.check_key() == ""
    await venue.close()


async def test_an_orders_trades_are_asked_for_as_binance_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """orderId with startTime is refused: -1128, combination of optional parameters invalid."""
    from realdeal.types import Intent
    venue, asked = Exchange(BINANCE, venue="binance"), list[Any]()
    async def trades(symbol: str, since: int | None, limit: int, only: Any) -> Any: asked.append((since, only)); return []
    monkeypatch.setattr(venue.client, "fetch_my_trades", trades)
    await venue.fills_of(Order(Intent("rd1", BTC, "buy", 0.01, NOW), OrderStatus.FILLED, "7", 0.01))
    assert asked == [(None, {"orderId": "7"})]
    await venue.close()


# The runner

async def rested(folder: Path, e: Emulator) -> str:
    """A process dies while an order of it rests at the venue; its name."""
    async with alive(folder, e) as life:
        order = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        life.journal.db.execute("delete from decisions")      # that of a test says nothing of the market
        return order.intent.client_id


async def test_what_a_human_took_over_answers_for_no_order(tmp_path: Path) -> None:
    """A lost order waits while there are trades of somebody; once they are explained it never arrived."""
    async with emulator() as e, runner(tmp_path, e) as r:
        r.journal.put_fact("opening", {"time": NOW, "balances": {}, "foreign": ["7"], "adopted": {}})
        assert "7" in r.desk.broker.known()


async def test_the_switch_is_obeyed_while_a_start_is_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candles do not come, and an order of the last life rests: the switch cancels it now."""
    async with emulator() as e:
        await rested(tmp_path, e)
        assert e.venue.open_orders()
        async with runner(tmp_path, e) as r:
            async def never(*args: Any) -> None: await asyncio.sleep(3600)
            monkeypatch.setattr(r, "catch_up", never)
            starting = asyncio.create_task(r.start())
            await asyncio.sleep(1.0)
            throw(kill_file(r.s), "a test")
            for _ in range(100):
                if r.stood: break
                await asyncio.sleep(0.05)
            assert r.stood and not e.venue.open_orders() and not starting.done()
            starting.cancel()
            with pytest.raises(asyncio.CancelledError): await starting
            assert not [t for t in asyncio.all_tasks() if "_every" in repr(t)]


async def test_what_is_too_old_rests_no_longer_while_a_start_is_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with emulator() as e:
        name = await rested(tmp_path, e)
        await e.clock.step(Settings().strategy.decision_every)
        assert e.venue.open_orders()
        async with runner(tmp_path, e) as r:
            async def never(*args: Any) -> None: raise Retry("no candles")
            monkeypatch.setattr(r, "catch_up", never)
            with pytest.raises(Retry, match="no candles"): await r.start()
            assert not e.venue.open_orders() and r.memory.order(name).status is OrderStatus.CANCELED


async def test_no_funding_holds_up_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the contracts alone: a decision goes on without, and so does a start."""
    async with emulator() as e, runner(tmp_path, e) as r:
        async def no(*args: Any) -> None: raise Retry("contracts are in maintenance")
        monkeypatch.setattr(r.follower, "slow_facts", no)
        await r.start()
        assert r.due >= NOW


async def test_a_dropped_symbol_that_is_held_is_told(tmp_path: Path) -> None:
    async with emulator() as e:
        async with alive(tmp_path, e) as life:
            await life.send(ETH, "buy", 0.05)
            await life.quiet()
        async with runner(tmp_path, e, data={"symbols": (BTC,), "rate_limit_ms": 1}) as r:
            with pytest.raises(Refused, match="ETH/USDT.*symbols"): await r.start()


@pytest.mark.parametrize("error", [Rejected("401"), BadSetting("the venue does not know this symbol")])
async def test_what_the_venue_refuses_ends_no_runner(error: RealdealError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The books cannot be read, the rules not renewed, candles of a market that ended not asked for."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        async def no(*args: Any, **kw: Any) -> Any: raise error
        monkeypatch.setattr(r.venue, "account_trades", no)
        await r.calmly("reconcile", r.reconciler.check)
        monkeypatch.setattr(r.venue, "reload", no)
        await r.renew_rules()
        monkeypatch.setattr(r.follower, "mend", no)
        await r.gather(r.due)


async def test_a_stop_leaves_nothing_at_rest(tmp_path: Path) -> None:
    """Nobody looks after it from now on."""
    async with emulator(speed=1.0) as e:
        name = await rested(tmp_path, e)
        e.clock.run()
        async with runner(tmp_path, e, rate=1) as r:
            await r.start()
            assert e.venue.open_orders()
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(0.5, stop.set)
            await run_clock(r, stop)
            assert not e.venue.open_orders() and r.memory.order(name).status is OrderStatus.CANCELED


async def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """While the journal takes nothing, nothing is decided and the runner waits; the decision that was due meanwhile is made as soon as it can be kept."""
    async with emulator(speed=240.0) as e:
        e.clock.run()
        async with runner(tmp_path, e, rate=240) as r:
            told: list[str] = []
            r.say = told.append
            await r.start()
            first, stop, db = r.due, asyncio.Event(), r.journal.db
            pages = db.execute("pragma page_count").fetchone()[0]
            db.execute(f"pragma max_page_count={pages}")
            running = asyncio.create_task(run_clock(r, stop))

            async def until(what: Callable[[], bool]) -> None:
                for _ in range(2000):
                    if what() or running.done(): return
                    await asyncio.sleep(0.02)

            await until(lambda: r.full > 0 and r.venue.clock.now() > first + 3 * MINUTE)
            assert not running.done() and r.due == first and r.journal.last_decision() is None
            db.execute("pragma max_page_count=1000000")
            await until(lambda: r.due > first)
            stop.set()
            await running
            assert r.journal.last_decision()["time"] == first
            assert sum("cannot be written or read" in x for x in told) == 1, "told once"


async def test_the_clock_of_the_orders_venue_is_set_as_well(tmp_path: Path) -> None:
    """It is another venue than that of the data, and its signed requests are of its own clock: a machine that slept would be refused for ever."""
    async with emulator(speed=1.0) as e:
        e.clock.run()
        s = settings_in(tmp_path)
        async with Exchange(s, options=client_options(e.url), clock=Clock(1)) as orders, runner(tmp_path, e, rate=1, orders=orders) as r:
            await r.start()
            orders.clock.set(orders.clock.now() - 20_000)
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(1.0, stop.set)
            await run_clock(r, stop)
            assert abs(orders.clock.now() - r.venue.clock.now()) < 2_000


async def test_the_runner_looks_when_a_decision_is_due(tmp_path: Path) -> None:
    """Not up to a beat later: all bars may be known by then, and nothing else wakes it."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        for left, seconds in ((60_000, BEAT), (10, 0.01), (0, BEAT), (-10, BEAT)):
            r.venue.clock.set(r.due - left)
            assert r.pause() == pytest.approx(seconds)


async def wait(e: Emulator, r: Runner, minutes: int) -> None:
    await e.clock.step(minutes)
    r.venue.clock.set(e.clock.now)
    await asyncio.sleep(0.3)      # until the frames are here


def hear(e: Emulator, r: Runner) -> None:
    while r.follower.drain(): pass
    r.follower.tick(e.clock.now + r.s.data.close_grace_ms)


async def test_nothing_is_decided_without_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes no minutes, though it would take the decision: there is none until they can be looked at."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        due = e.clock.now // MINUTE * MINUTE + r.every
        for minutes in (r.every // MINUTE - 1, 1):
            await wait(e, r, minutes)
            hear(e, r)

        def full(*_: object, **__: object) -> None: raise NotWritten("no space left")

        with monkeypatch.context() as m:
            m.setattr(r.store, "keep", full)
            with pytest.raises(NotWritten, match="what is known is not on the disk"): await r.step(due)
        assert r.knows(BTC, due) and r.follower.unwritten and r.journal.last_decision() is None
        await r.step(due)
        told = r.journal.last_decision()
        assert told and told["time"] == due and told["inputs"]["snapshot"]["prices"] == {x: r.store.read(x, due - MINUTE, due)["close"][-1] for x in SYMBOLS}


async def test_paper_quotes_by_minutes_that_are_not_on_the_disk_yet(tmp_path: Path) -> None:
    """The price at which an order rests is that of the minute before, written or not: the backtest has it."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        for _ in range(3):
            await wait(e, r, 1)
            hear(e, r)
        time, paper = e.clock.now // MINUTE * MINUTE - MINUTE, r._paper()
        bar, before = r.bar_at(BTC, time), r.bar_at(BTC, time - MINUTE)
        assert bar and before and r.store.read(BTC, time - MINUTE, time).is_empty()
        met = paper.met(BTC, bar, 0)
        assert met.before == before.close
        while not r.store.read(BTC, time - MINUTE, time).height:
            await r.follower.mend()
            await r.follower.flush()
        assert paper.met(BTC, bar, 0) == met


async def test_what_becomes_known_while_a_decision_gathers_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last minute is told when the others are written already: it counts as known, so the decision must see it."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        due, flush, late = e.clock.now // MINUTE * MINUTE + r.every, r.follower.flush, [True]

        async def flushed() -> bool:
            done = await flush()
            if late: late.clear(), hear(e, r)
            return done

        await wait(e, r, r.every // MINUTE - 1)
        hear(e, r)
        await flush()
        await wait(e, r, 1)
        assert not r.knows(BTC, due)
        monkeypatch.setattr(r.follower, "flush", flushed)
        await r.step(due)
        told = r.journal.rows("decisions")[-1]
        assert r.knows(BTC, due) and not late and told["time"] == due and "blind" not in told["inputs"]
        assert told["inputs"]["snapshot"]["prices"] == {x: r.store.read(x, due - MINUTE, due)["close"][-1] for x in SYMBOLS}
