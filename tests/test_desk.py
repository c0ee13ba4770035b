"""The order path under attack: real desk, broker, reconciler and journal on ccxt's own client, judged by the emulator's books."""
from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from realdeal import exchange, faults
from realdeal.broker import CcxtBroker
from realdeal.decide import State, snapshot
from realdeal.desk import SEEN, Desk, Reconciler, Switch, adopt, kill_file, remember, resume, throw
from realdeal.drill import TOLERANCE, judge
from realdeal.emulator import Emulator, Limits, serve
from realdeal.exchange import Clock, Exchange
from realdeal.features import Panel
from realdeal.fills import quote_price
from realdeal.market import SIMULATED_START, generate
from realdeal.orders import Told, client_id, round_down
from realdeal.risk import Standing
from realdeal.settings import Settings, read_settings
from realdeal.stages import NOTHING, Session, keep_session, lock_account, missing_for, open_broker, order_venue, record_of, session_of, sessions
from realdeal.store import Journal
from realdeal.types import DAY, MINUTE, Account, BadData, BadSetting, Fill, Intent, Order, OrderStatus, RealdealError, Refused, Retry, Signal, settle
from realdeal.venue import NewOrder, VenueError
from realdeal.view import Log
from realdeal.wire import client_options

NOW, KEY, SYMBOLS = SIMULATED_START + DAY, "emulator-main", ("BTC/USDT", "ETH/USDT")
BTC, ETH = SYMBOLS
HISTORIES = generate("realistic", SYMBOLS, SIMULATED_START, 2 * 1440, seed=5)
LAG, UNTIL, PATIENCE = 0.15, (0.02, 0.15), 0.5   # s: as in life, in this order, and shorter
MONEY = {"USDT": 100_000, "BTC": 1, "ETH": 10}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wall takes seconds for takes a part of one; nothing else is changed."""
    monkeypatch.setattr(faults, "LAG", LAG)
    monkeypatch.setattr(faults, "UNTIL", UNTIL)
    monkeypatch.setattr(exchange, "_pause", lambda state: 0.01)


def settings_in(folder: Path, **more: dict[str, Any]) -> Settings:
    given = {"data": {"symbols": SYMBOLS, "rate_limit_ms": 1}, "live": {"stage": "testnet"}, "risk": {"pause": 1, "max_orders": 10_000}}
    return Settings(home=folder).override(**{k: {**given.get(k, {}), **more.get(k, {})} for k in {*given, *more}})


class Crash(BaseException):
    """The process dies here."""


class Life:
    """One process: everything that it knows comes from the journal's file."""
    def __init__(self, e: Emulator, s: Settings, reached: Callable[[str], None] = lambda step: None, account: str = "main"):
        self.e, self.s, self.said = e, s, list[str]()
        self.journal = Journal(s.data_dir / "journals" / "journal.sqlite")
        self.venue = Exchange(s, options=client_options(e.url, account), clock=Clock(rate=0))
        self.memory = remember(self.journal, s.risk.capital)
        self.switch = Switch(kill_file(s), self.journal, self.venue.clock.now)
        self.broker = CcxtBroker(self.venue, self.known, PATIENCE)
        self.rules: dict[str, Any] = {}
        self.desk = Desk(self.journal, self.broker, self.memory, self.switch, s, now=self.venue.clock.now, standing=self.standing, rules=self.rules, say=self.said.append, calm=0.0, reached=reached)
        self.books = Reconciler(self.venue, self.desk)
        self.venue.client.gate = self.desk.gate

    def known(self) -> set[str | None]:
        """Our orders, and those of others that a human took over."""
        return {o.venue_id for by in (self.memory.pending, self.memory.over) for o in by.values()} | set((self.journal.fact("opening") or {}).get("foreign", ()))

    def mark(self, symbol: str) -> float: return float(self.e.venue.books[symbol].last)

    def standing(self, symbol: str) -> Standing:
        return Standing(self.mark(symbol), 0.0, self.memory.account.equity({x: self.mark(x) for x in SYMBOLS}), half_spread=self.s.costs.half_spread)

    async def start(self) -> None:
        await self.venue.open()
        self.venue.clock.set(self.e.clock.now)
        self.rules.update({x: self.venue.rules(x) for x in SYMBOLS})
        await self.desk.take_up(2.0)
        await self.books.open()

    async def end(self) -> None:
        await self.venue.close()
        self.journal.close()

    def meant(self, symbol: str, side: str, amount: float, price: float | None = None, attempt: int = 0) -> Intent:
        """A decision of this moment, journalled, with its order."""
        now = self.venue.clock.now()
        i = Intent(client_id("main", "testnet", symbol, now, 0, attempt), symbol, side, round_down(amount, self.rules[symbol].lot), now, "limit" if price else "market", price, attempt)
        with self.journal.transaction():
            if self.memory.state.time != now: self.journal.add_decision(now, {}, {}, State(time=now).to_json())
            self.journal.add_intent(i)
        self.memory.state = State(time=now)
        return i

    async def send(self, *args: Any, **kw: Any) -> Order:
        i = self.meant(*args, **kw)
        await self.desk.send(i)
        return self.order(i)

    def order(self, i: Intent) -> Order:
        found = self.memory.order(i.client_id)
        assert found is not None and self.journal.orders()[i.client_id] == found, "the memory is a copy of the journal"
        return found

    async def look(self) -> list[str]:
        return await self.books.check()

    async def quiet(self, seconds: float = 10.0) -> None:
        """Follow and compare until nothing is in the air."""
        began = time.monotonic()
        while self.memory.pending and time.monotonic() - began < seconds:
            await self.desk.follow()
            await asyncio.sleep(0.02)
        for _ in range(SEEN): await self.look()

    def incidents(self, kind: str) -> list[str]: return [r["text"] for r in self.journal.rows("incidents") if r["kind"] == kind]


@asynccontextmanager
async def emulator(**kw: Any) -> AsyncIterator[Emulator]:
    async with serve(**{"histories": HISTORIES, "now": NOW, "seed": 5, "balances": MONEY, "limits": Limits(weight=10**9)} | kw) as e: yield e


@asynccontextmanager
async def alive(folder: Path, e: Emulator | None = None, account: str = "main", **more: Any) -> AsyncIterator[Life]:
    async with contextlib.AsyncExitStack() as stack:
        life = Life(e or await stack.enter_async_context(emulator()), settings_in(folder, **more), account=account)
        try:
            await life.start()
            yield life
        finally: await life.end()


def slowly(venue: Exchange, seconds: float) -> None:
    """From now on answers to orders are `seconds` on their way."""
    inner = type(venue.client).fetch
    async def fetch(url: str, method: str = "GET", headers: Any = None, body: Any = None) -> Any:
        told = await inner(venue.client, url, method, headers, body)
        if method == "POST": await asyncio.sleep(seconds)
        return told
    venue.client.fetch = fetch


async def calm(e: Emulator) -> None:
    """Every fault ends."""
    for name in list(e.hub.faults.lasting):
        e._ends.pop(name).cancel()
        await e._end(name)


def own(books: dict[str, Any]) -> dict[str, Any]:
    """The books without what others did on the account: their orders, and what these and transfers moved."""
    foreign = {o["id"] for o in books["orders"] if not o["client_id"]}
    opening = {c: dict(b) for c, b in books["opening"].items()}
    def move(coin: str, amount: Decimal) -> None: opening[coin]["free"] = str(Decimal(opening[coin]["free"]) + amount)
    for t in books["transfers"]: move(t["asset"], Decimal(t["amount"]))
    for d in books["deals"]:
        if d["orderId"] not in foreign: continue
        sign, base = 1 if d["isBuyer"] else -1, d["symbol"].removesuffix("USDT")
        move(base, sign * Decimal(d["qty"]))
        move("USDT", -sign * Decimal(d["quoteQty"]) - Decimal(d["commission"]))
    return {**books, "opening": opening, "orders": [o for o in books["orders"] if o["id"] not in foreign], "deals": [d for d in books["deals"] if d["orderId"] not in foreign]}


AT_VENUE = {"FILLED": {"filled"}, "CANCELED": {"canceled"}, "PARTIALLY_CANCELED": {"canceled"}}
LASTING = tuple(n for n in faults.chosen("orders") if faults.lasts(n))
HIDING = {"late_order", "lookup_lag"}    # while they are on an order may be there that is not seen
STEPS = ("before the wire", "after the wire", "kept", "polled", "before the cancel", "meant")
symbols, sides, shares, offsets = st.sampled_from(SYMBOLS), st.sampled_from(("buy", "sell")), st.sampled_from((0.02, 0.1, 0.5, 1.0)), st.sampled_from((-0.001, 0.0, 0.00005, 0.0002, 0.001, 0.01))
wishes = st.lists(st.tuples(symbols, sides, shares, st.none() | offsets), min_size=1, max_size=3)
crashes = st.none() | st.none() | st.none() | st.tuples(st.sampled_from(STEPS), st.integers(1, 3))


class OrderPath(RuleBasedStateMachine):
    """Anything may happen at any time; whatever happened, the books agree in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="desk-"))
        self.stack = contextlib.AsyncExitStack()
        self.due: tuple[str, int] | None = None
        self.life: Life | None = None
        self.silent: int | None = None      # placements that had come when the switch was thrown
        self.seed = 0
        self.hid = False

    def reached(self, step: str) -> None:
        if self.due is None or self.due[0] != step: return
        self.due = (step, self.due[1] - 1) if self.due[1] > 1 else None
        if self.due is None: raise Crash(step)

    @initialize(execution=st.sampled_from(("taker", "maker")), then=st.sampled_from(("give up", "take")))
    def begin(self, execution: str, then: str) -> None:
        self.s = settings_in(self.folder, orders={"execution": execution, "then": then, "patience": 3})
        self.e = self.runner.run(self.stack.enter_async_context(emulator()))
        self.be(None, self.born())

    async def born(self) -> None:
        self.life = Life(self.e, self.s, self.reached)
        await self.life.start()

    async def crash(self) -> None:
        """Nothing is left but the file, and one begins again. It may crash at once, but not for ever."""
        while True:
            if self.life is not None: await self.life.end()
            try: return await self.born()
            except Crash: pass
            except Retry: await calm(self.e)      # a start waits until the venue answers

    def be(self, crash_at: tuple[str, int] | None, work: Any) -> None:
        """Do `work`, and die where it says."""
        async def all_of_it() -> None:
            self.due = crash_at
            try: await work
            except Crash: await self.crash()
            except Retry as e: note(str(e))
            finally: self.due = None
        self.runner.run(all_of_it())

    # What the runner does.

    def chosen(self, symbol: str, side: str, share: float, offset: float | None, attempt: int = 0) -> tuple[Any, ...] | None:
        """What a plan may ask for: one order a symbol and decision, sales out of what is held, nothing for a symbol that waits or is halted."""
        m, mark = self.life.memory, self.life.mark(symbol)
        now = self.life.venue.clock.now()
        if any(o.intent.symbol == symbol and (o.intent.time == now or not o.status.is_final) for by in (m.pending, m.over) for o in by.values()) or symbol in self.life.desk.halts: return None
        amount = m.account.positions.get(symbol, 0.0) * share if side == "sell" else 1000 * share / mark
        if round_down(amount, self.life.rules[symbol].lot) * mark < 6: return None
        price = None if offset is None else quote_price(1 if side == "buy" else -1, mark, offset, self.life.rules[symbol].tick)
        return symbol, side, amount, price

    @rule(symbol=symbols, side=sides, share=shares, offset=st.none() | offsets, crash_at=crashes)
    def send(self, symbol: str, side: str, share: float, offset: float | None, crash_at: Any) -> None:
        if (what := self.chosen(symbol, side, share, offset)) is not None: self.be(crash_at, self.life.send(*what))

    @rule(wishes=wishes, human=st.booleans(), crash_at=crashes)
    def minute(self, wishes: list[Any], human: bool, crash_at: Any) -> None:
        """A minute as the runner lives it, and a human who may look at it."""
        if human:
            self.resume()
            self.adopt()
        async def live() -> None:
            await self.e.clock.step(1)
            self.life.venue.clock.set(self.e.clock.now)
            if self.life.switch.why(): await self.life.desk.stand_down()
            await self.life.desk.follow()
            if self.life.switch.why() is None: await self.life.desk.requote()
            for wish in wishes:
                if (what := self.chosen(*wish)) is not None: await self.life.send(*what)
            await self.life.desk.follow()
            await self.life.look()
        self.be(crash_at, live())

    @rule(wishes=wishes, crash_at=crashes)
    def another_minute(self, wishes: list[Any], crash_at: Any) -> None: self.minute(wishes, True, crash_at)

    @rule(wishes=wishes)
    def a_minute_in_peace(self, wishes: list[Any]) -> None: self.minute(wishes, True, None)

    @rule(symbol=symbols, side=sides, share=shares, offset=st.none() | offsets)
    def mean_and_die(self, symbol: str, side: str, share: float, offset: float | None) -> None:
        if (what := self.chosen(symbol, side, share, offset)) is None: return
        self.life.meant(*what)
        self.be(None, self.crash())

    @rule(act=st.sampled_from(("requote", "cancel", "follow", "wait", "look", "die")), crash_at=crashes)
    def act(self, act: str, crash_at: Any) -> None:
        async def do() -> None:
            desk = self.life.desk
            match act:
                case "requote" if self.life.switch.why() is None: await desk.requote()
                case "cancel": await desk.end([o for o in desk.memory.pending.values() if o.status is OrderStatus.OPEN])
                case "follow": await desk.follow()
                case "wait": await asyncio.sleep(PATIENCE)
                case "look":
                    for _ in range(SEEN): await self.life.look()
                case "die": raise Crash(act)
        self.be(crash_at, do())

    # What the operator does.

    @rule(flatten=st.booleans(), crash_at=crashes)
    def kill(self, flatten: bool, crash_at: Any) -> None:
        throw(kill_file(self.s), "a test", flatten)
        if not self.life.switch.order().get("flatten"): self.silent = len(self.e.arrivals(KEY).sent)
        self.be(crash_at, self.life.desk.stand_down())

    def resume(self) -> None:
        resume(kill_file(self.s), [self.life.journal.path], "go on")
        self.silent = None

    def adopt(self) -> None: adopt([self.life.journal.path], "it was me")

    @rule(symbol=symbols, side=sides, share=shares, offset=st.none() | offsets, after=st.sampled_from((0.0, 0.003, 0.01)), slow=st.sampled_from((0.0, 0.05)), flatten=st.booleans())
    def kill_meanwhile(self, symbol: str, side: str, share: float, offset: float | None, after: float, slow: float, flatten: bool) -> None:
        """An order leaves, its answer takes its time, the books are compared and the switch is thrown, all at once, as in the runner."""
        if self.life.switch.why() or (what := self.chosen(symbol, side, share, offset)) is None: return
        slowly(self.life.venue, slow)
        async def killed() -> None:
            await asyncio.sleep(after)
            throw(kill_file(self.s), "meanwhile", flatten)
            await self.life.desk.stand_down()
        async def all_of_it() -> None:
            results = await asyncio.gather(self.life.send(*what), self.life.look(), self.life.desk.follow(), killed(), return_exceptions=True)
            for error in results:
                if isinstance(error, BaseException) and not isinstance(error, Retry): raise error
            self.silent = None if flatten else len(self.e.arrivals(KEY).sent)
        self.be(None, all_of_it())

    # What the venue and others do.

    @rule(name=st.sampled_from(LASTING))
    def fault(self, name: str) -> None:
        self.seed += 1
        self.hid |= name in HIDING
        async def begin() -> None: self.e.fault(name, 3600, self.seed)
        self.be(None, begin())

    @rule()
    @precondition(lambda self: self.life is not None and self.e.hub.faults.lasting)
    def faults_end(self) -> None: self.be(None, calm(self.e))

    @rule(what=st.sampled_from(("order", "transfer", "user_lost")), symbol=symbols, side=st.sampled_from(("BUY", "SELL")), offset=st.none() | st.sampled_from((0.001, 0.01)), coin=st.sampled_from(tuple(MONEY)))
    def stranger(self, what: str, symbol: str, side: str, offset: float | None, coin: str) -> None:
        price = None if offset is None else Decimal(str(quote_price(1 if side == "BUY" else -1, self.life.mark(symbol), offset, 0.01)))
        async def strike() -> None:
            match what:
                case "order":
                    with contextlib.suppress(VenueError): await self.e.place(KEY, NewOrder(symbol, side, "MARKET" if price is None else "LIMIT_MAKER", Decimal("0.003") if symbol == BTC else Decimal("0.05"), price))
                case "transfer": await self.e.transfer(KEY, coin, Decimal("0.01") * (1 if side == "BUY" else -1))
                case _: self.e.fault("user_lost")
        self.be(None, strike())

    # What must hold.

    @invariant()
    @precondition(lambda self: self.life is not None)
    def nothing_is_bought_twice(self) -> None:
        books = self.e.books(KEY)
        assert books["duplicates"] == []
        there = {o["client_id"]: o for o in books["orders"] if o["client_id"]}
        orders = self.life.journal.orders()
        assert not there.keys() - orders.keys(), "what is there was meant"
        absent = set()
        for name, order in orders.items():
            known = self.life.memory.order(name)
            assert known == order, "the memory is a copy of the journal"
            if not order.status.is_final: continue
            if order.status in (OrderStatus.HELD, OrderStatus.REJECTED): assert name not in there, f"{order} never left"
            elif order.status is OrderStatus.ABSENT:
                if name in there: absent.add((order.intent.symbol, order.intent.time))
                assert name not in there or self.hid, f"{order} is at the venue"
            else:
                assert order.status.value in AT_VENUE[there[name]["status"]], f"{order}, but {there[name]}"
                assert order.filled == pytest.approx(float(there[name]["executed"])) == sum(f.amount for f in self.life.journal.fills(name))
        chains: dict[tuple[str, int], list[Order]] = {}
        for order in orders.values():
            if order.intent.client_id != client_id("main", "testnet", order.intent.symbol, order.intent.time, 1): chains.setdefault((order.intent.symbol, order.intent.time), []).append(order)
        for key, chain in chains.items():
            bought = sum(float(there[o.intent.client_id]["executed"]) for o in chain if o.intent.client_id in there)
            assert key in absent or bought <= max(o.intent.amount for o in chain) + 1e-9, f"more than was meant: {chain}"

    @invariant()
    @precondition(lambda self: self.life is not None)
    def a_kill_lets_nothing_out(self) -> None:
        if self.silent is not None: assert len(self.e.arrivals(KEY).sent) == self.silent

    def teardown(self) -> None:
        try:
            if self.life is not None: self.runner.run(self.settle())
        finally:
            self.runner.run(self.ended())
            self.runner.close()
            shutil.rmtree(self.folder)

    async def ended(self) -> None:
        if self.life is not None: await self.life.end()
        await self.stack.aclose()

    async def settle(self) -> None:
        """Faults end; what is open is cancelled; a human explains what others did; then everything agrees."""
        self.due = None
        await calm(self.e)
        await asyncio.sleep(UNTIL[1] + LAG)
        life = self.life
        throw(kill_file(self.s), "the end")
        began = time.monotonic()
        while not await life.desk.stand_down():
            assert time.monotonic() - began < 10, f"never stands down: {life.memory.pending}"
            await life.look()
            adopt([life.journal.path], "whoever it was")      # an order of unknown fate may wait for this
            await life.desk.follow()
        for _ in range(SEEN): await life.look()
        for _ in range(2):
            adopt([life.journal.path], "whoever it was")
            for _ in range(SEEN): await life.look()
        assert not life.desk.halts and await life.look() == []
        books = own(self.e.books(KEY))
        found = judge(books, life.journal.orders(), life.journal.fills())
        assert found.clean, found
        held, cash = {x: 0.0 for x in SYMBOLS}, self.s.risk.capital
        for o in books["orders"]: held[o["symbol"].removesuffix("USDT") + "/USDT"] += float(o["executed"]) * (1 if o["side"] == "BUY" else -1)
        for d in books["deals"]: cash -= float(d["quoteQty"]) * (1 if d["isBuyer"] else -1) + float(d["commission"])
        account = remember(life.journal, self.s.risk.capital).account
        assert account == life.memory.account and account.cash == pytest.approx(cash, abs=TOLERANCE)
        assert {x: account.positions.get(x, 0.0) for x in SYMBOLS} == pytest.approx(held, abs=TOLERANCE)


def test_order_path(quick: None) -> None:
    """A few lives here; a hunt is DESK_RANDOM=1 DESK_EXAMPLES=500 DESK_STEPS=50."""
    examples, steps = int(os.environ.get("DESK_EXAMPLES", "25")), int(os.environ.get("DESK_STEPS", "30"))
    run_state_machine_as_test(OrderPath, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize="DESK_RANDOM" not in os.environ, database=None, phases=(Phase.generate,), report_multiple_bugs=False, suppress_health_check=list(HealthCheck)))


# One thing at a time.

async def test_an_answer_comes_after_the_fill(tmp_path: Path) -> None:
    """The order is filled and asked about, by a kill meanwhile, before the answer to it is here."""
    async with alive(tmp_path) as life:
        slowly(life.venue, 0.3)
        i = life.meant(BTC, "buy", 0.01)
        sending = asyncio.create_task(life.desk.send(i))
        async with asyncio.timeout(5):
            while not life.e.venue.all_orders(): await asyncio.sleep(0.01)  # noqa: ASYNC110
        await life.desk.follow()
        assert life.order(i).status is OrderStatus.FILLED and not sending.done()
        await sending
        assert life.order(i).status is OrderStatus.FILLED and life.memory.account.positions == {BTC: 0.01}


def lose(life: Life, name: str = "lost_order") -> None:
    """From now on every order is struck by `name`."""
    life.e.fault(name, 3600, 1)
    life.e.hub.faults.lasting[name].rng = Always()


class Always:
    def random(self) -> float: return 0.0
    def uniform(self, low: float, high: float) -> float: return high


async def strange(e: Emulator, symbol: str = BTC, side: str = "BUY", price: str | None = None, amount: str = "0.01") -> str:
    made = await e.place(KEY, NewOrder(symbol, side, "LIMIT" if price else "MARKET", Decimal(amount), Decimal(price) if price else None))
    return made.id


async def test_an_order_of_unknown_fate_waits_for_a_human(tmp_path: Path) -> None:
    """The venue has a trade that may be the lost order's. A human says whose it was, and it counts as never arrived."""
    async with alive(tmp_path) as life:
        lose(life)
        i = life.meant(ETH, "buy", 0.05)
        await life.desk.send(i)
        await calm(life.e)
        await strange(life.e, ETH, amount="0.05")
        await life.quiet(2 * PATIENCE)
        assert life.order(i).status is OrderStatus.UNKNOWN and set(life.desk.halts) == {ETH}
        for _ in range(2):      # what moved the balances is seen when no fate is open any more, and asks once more
            adopt([life.journal.path], "mine")
            await life.look()
            await life.quiet(2 * PATIENCE)
            assert life.order(i).status is OrderStatus.ABSENT
        assert not life.desk.halts and life.incidents("adopted")[-1].startswith("mine: {")


async def test_a_kill_sells_what_it_can(tmp_path: Path) -> None:
    """The fate of one symbol's order is open, for good it seems: the others are sold all the same."""
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        lose(life)
        await life.send(ETH, "buy", 0.05)
        await calm(life.e)
        await strange(life.e, ETH, amount="0.05")
        throw(kill_file(life.s), "a test", flatten=True)
        for _ in range(3): assert not await life.desk.stand_down(), "nobody can say that nothing is open"
        assert life.memory.account.positions == {BTC: 0.0}


async def test_an_order_that_the_switch_held_back_says_nothing_of_the_venue(tmp_path: Path) -> None:
    """Four failures, one order that never left, and the fifth failure."""
    async with alive(tmp_path) as life:
        lose(life, "poor")
        for _ in range(4): await failed(life)
        await tick(life)
        i = life.meant(BTC, "buy", 0.01)
        life.venue.client.gate = lambda text: "killed: meanwhile"
        await life.desk.send(i)
        assert life.order(i).status is OrderStatus.HELD
        life.venue.client.gate = life.desk.gate
        await failed(life)
        assert life.desk.breaker.state(life.venue.clock.now()) == "open"


async def failed(life: Life) -> None:
    await tick(life)
    assert (await life.send(BTC, "buy", 0.01)).status is OrderStatus.REJECTED


async def tick(life: Life, minutes: int = 1) -> None:
    await life.e.clock.step(minutes)
    life.venue.clock.set(life.e.clock.now)


@pytest.mark.parametrize("plant", ["file", "folder", "dangling link", "link to itself"])
async def test_whatever_kill_is_it_kills(plant: str, tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        kill = kill_file(life.s)
        match plant:
            case "file": kill.write_bytes(b"\xff\x00 no JSON")
            case "folder": kill.mkdir()
            case "dangling link": kill.symlink_to("nowhere")
            case _: kill.symlink_to(kill.name)
        await nothing_leaves(life)
        assert (await life.send(BTC, "buy", 0.01)).status is OrderStatus.HELD and not life.e.arrivals(KEY).sent


async def nothing_leaves(life: Life) -> None:
    """Neither by the desk nor past it."""
    assert life.switch.why()
    direct = await life.venue.submit(Intent("rddirect", BTC, "buy", 0.01, life.venue.clock.now()))
    assert direct.status is OrderStatus.HELD and not life.e.arrivals(KEY).sent


async def test_a_folder_that_cannot_be_looked_into_kills(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        closed = life.s.data_dir.parent / "closed"
        (closed / "in").mkdir(parents=True)
        life.switch.file = closed / "in" / "KILL"
        assert life.switch.why() is None
        closed.chmod(0)
        user = os.geteuid()
        if not user: os.seteuid(65534)      # root sees everything
        try: assert life.switch.why() == "the kill latch cannot be read"
        finally:
            if not user: os.seteuid(user)
            closed.chmod(0o700)
        shutil.rmtree(closed)
        closed.write_text("a file where a folder was")
        await nothing_leaves(life)


async def test_every_stranger_is_told(tmp_path: Path) -> None:
    """Orders without a client id are different orders: all of them are told and taken over at once."""
    async with alive(tmp_path) as life:
        mark = life.mark(BTC)
        ids = [await strange(life.e, price=f"{mark * share:.2f}") for share in (0.9, 0.8)]
        told, = await life.look()
        assert all(name in told for name in ids)
        adopt([life.journal.path], "mine")
        assert await life.look() == [] and not life.desk.halts
        await life.e.cancel(KEY, BTC, ids[1], "")
        assert await life.look() == [] and not life.desk.halts


def test_code_of_no_version_opens_nothing(tmp_path: Path) -> None:
    """Without git nobody knows which code ran: two runs of it may be of two programs."""
    journal = Journal(tmp_path / "testnet.sqlite")
    here = Session(0.0, 49 * 3600.0, "unversioned", "s", "m", "binance-testnet", False)
    journal.put_fact("sessions", [asdict(here)])
    assert record_of(journal, here, 15) == NOTHING
    journal.put_fact("sessions", [asdict(replace(here, code="abc"))])
    assert record_of(journal, replace(here, code="abc"), 15).hours == 49
    journal.close()


async def test_a_fill_counts_once(tmp_path: Path) -> None:
    """Told twice, told late, told of an order that is over."""
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01)
        assert order.status is OrderStatus.OPEN
        told = await life.broker.poll(order)
        for _ in range(2): life.desk.apply(order, told)
        life.desk.apply(order, Told("", told.fills))
        once = life.memory.account
        again = remember(life.journal, life.s.risk.capital)
        assert once.positions == {BTC: 0.01} and again.account == once and again.moved == life.memory.moved
        known, = life.journal.fills()
        life.desk.apply(life.order(order.intent), Told("filled", [replace(known, trade_id="more", amount=0.002)]))
        assert life.order(order.intent).filled == 0.012 and life.memory.account.positions == {BTC: 0.012}, "what the venue tells is what happened"
        with pytest.raises(Refused, match="cannot follow 'filled'"): life.desk.apply(life.order(order.intent), Told("rejected"))


async def test_a_cancel_crosses_a_fill(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        orders = [await life.send(BTC, "buy", 0.001, round(life.mark(BTC) * 0.985, 2), attempt=k) for k in range(12)]
        life.e.fault("cancel_race", 60, 1)
        await life.desk.end([o for o in life.memory.pending.values()])
        await life.quiet()
        ends = [life.order(o.intent) for o in orders]
        assert {o.status for o in ends} == {OrderStatus.FILLED, OrderStatus.CANCELED} and any(0 < o.filled < 0.001 for o in ends)
        assert life.memory.account.positions[BTC] == pytest.approx(sum(o.filled for o in ends)) and judge(own(life.e.books(KEY)), life.journal.orders(), life.journal.fills()).clean


async def test_an_order_appears_after_all(tmp_path: Path) -> None:
    """It counted as never arrived, and then it rests at the venue, or is filled there: it is followed again, and that is told."""
    async with alive(tmp_path) as life:
        life.broker.patience = 0.0
        lose(life, "late_order")
        resting = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        filled = await life.send(ETH, "buy", 0.05)
        assert {resting.status, filled.status} == {OrderStatus.UNKNOWN}
        await life.desk.follow()
        assert {life.order(o.intent).status for o in (resting, filled)} == {OrderStatus.ABSENT} and not life.memory.pending
        await asyncio.sleep(2 * UNTIL[1])
        assert await life.look() == []
        assert life.order(resting.intent).status is OrderStatus.OPEN and len(life.incidents("late")) == 2
        await life.desk.follow()
        assert life.order(filled.intent).status is OrderStatus.FILLED and life.memory.account.positions == {ETH: 0.05}


async def test_an_id_that_the_venue_does_not_know(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        i = life.meant(BTC, "buy", 0.01)
        life.desk.keep(Order(i, OrderStatus.SENT))
        await life.desk.follow()
        assert life.order(i).status is OrderStatus.UNKNOWN
        await asyncio.sleep(PATIENCE)
        await life.desk.follow()
        assert life.order(i).status is OrderStatus.ABSENT and "nor any trade" in life.incidents("absent")[0]
        life.desk.keep(Order(i, OrderStatus.OPEN, venue_id="C02__9"))
        for _ in range(2):
            await life.desk.follow()
            assert life.order(i).status is OrderStatus.UNKNOWN, "it was there once: it never counts as absent"


@pytest.mark.parametrize(("coin", "halted"), [("BTC", {BTC}), ("USDT", set(SYMBOLS))])
async def test_a_transfer_halts(coin: str, halted: set[str], tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        await life.e.transfer(KEY, coin, Decimal("0.5"))
        for _ in range(SEEN - 1): assert await life.look() == [] and not life.desk.halts
        assert f"+0.5 {coin}" in (await life.look())[0] and set(life.desk.halts) == halted
        assert (await life.send(BTC, "buy", 0.01)).reason.startswith("BTC/USDT is halted")
        assert (await life.send(ETH, "buy", 0.05)).status is (OrderStatus.HELD if ETH in halted else OrderStatus.OPEN)
        with pytest.raises(Refused, match="say what it was"): adopt([life.journal.path], " ")
        assert adopt([life.journal.path], "savings") == [life.journal.path]
        for _ in range(SEEN): await life.quiet()
        await tick(life)
        assert not life.desk.halts and (await life.send(BTC, "buy", 0.01)).status is OrderStatus.OPEN and adopt([life.journal.path], "again") == []


async def test_the_capital_must_be_there(tmp_path: Path) -> None:
    async with emulator(balances={"USDT": 9_999}) as e:
        with pytest.raises(Refused, match=r"holds 9999 USDT, \[risk\] capital is 10000"):
            async with alive(tmp_path, e): pass


def test_fees_in_any_coin() -> None:
    """What the account loses is what the venue takes."""
    for coin, amount, worth, cash, held, moved in (("", 0.0, 0.5, -500.5, 0.01, {"BTC": 0.01, "USDT": -500.5}), ("BTC", 1e-5, 0.5, -500.0, 0.00999, {"BTC": 0.00999, "USDT": -500.0}),
            ("BNB", 0.001, 0.5, -500.5, 0.01, {"BTC": 0.01, "USDT": -500.0, "BNB": -0.001}), ("USDT", 0.5, 0.5, -500.5, 0.01, {"BTC": 0.01, "USDT": -500.5})):
        fill = Fill("rd", BTC, "buy", 0.01, 50_000.0, worth, 0, trade_id="t", fee_coin=coin, fee_amount=amount)
        after = settle(Account(1000.0), fill)
        assert after.cash == 1000 + cash and after.positions == {BTC: pytest.approx(held)} and fill.moved == pytest.approx(moved), coin


async def test_the_breaker(tmp_path: Path) -> None:
    """Five failures open it; a reduction leaves all the same; after the pause one order is let through, and its success closes it."""
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        await life.quiet()
        lose(life, "poor")
        for _ in range(5): await failed(life)
        assert "5 failures in a row" in life.incidents("breaker")[0] and remember(life.journal, 0.0).over and life.journal.fact("breaker")["failures"] == 5
        assert (await life.send(ETH, "buy", 0.05)).reason.startswith("the circuit breaker is open")
        await tick(life, 2)
        await failed(life)      # half-open: one more failure opens it again
        assert (await life.send(ETH, "buy", 0.05)).status is OrderStatus.HELD
        await calm(life.e)
        await tick(life, 2)
        lose(life, "lost_order")
        await life.send(ETH, "buy", 0.05)
        await tick(life, 2)
        assert "half-open" in (await life.send(BTC, "buy", 0.01)).reason, "the fate of the one is open"
        await calm(life.e)
        await tick(life)
        assert (await life.send(BTC, "sell", 0.01)).status is OrderStatus.OPEN
        assert life.desk.breaker.state(life.venue.clock.now()) == "closed" and Desk(life.journal, life.broker, life.memory, life.switch, life.s, now=life.desk.now, standing=life.standing, rules=life.rules, say=print).breaker == life.desk.breaker


@pytest.mark.parametrize(("change", "why"), [({"mark": None}, "the price is unknown"), ({"age": 91_000.0}, "91 s old"), ({"skew": 1_500.0}, "the clock is 1500 ms away"),
    ({"equity": 100.0}, "max_order allows"), ({"mark": 60_000.0}, "collar allows"), ({"recent": 1}, "max_orders allows 1")])
async def test_what_holds_an_order(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    async with alive(tmp_path, risk={"max_orders": 1}) as life:
        if "recent" in change: await life.send(ETH, "buy", 0.05)
        sent, usual = len(life.e.arrivals(KEY).sent), life.standing
        life.desk.standing = lambda symbol: usual(symbol)._replace(**{k: v for k, v in change.items() if k != "recent"})
        held = await life.send(BTC, "buy", 0.01, life.mark(BTC) - 100)
        assert held.status is OrderStatus.HELD and why in held.reason and any(why in x for x in life.incidents("held")) and len(life.e.arrivals(KEY).sent) == sent


async def test_what_may_be_too_little_for_the_venue_stays_here(tmp_path: Path) -> None:
    """A limit order is judged by its own price, a market order by one that moves until it is there; the venue's own rule is the emulator's."""
    async with alive(tmp_path) as life:
        bought = await life.send(BTC, "buy", 0.01)
        await life.quiet()
        least, usual = life.rules[BTC].min_notional, life.standing
        def worth(at: float) -> None: life.desk.standing = lambda symbol: usual(symbol)._replace(mark=least / 0.01 * at)
        sent = len(life.e.arrivals(KEY).sent)
        for at, price in ((1.004, None), (1.004, least / 0.01 * 0.999)):
            await tick(life)
            worth(at)
            held = await life.send(BTC, "sell", 0.01, price)
            assert held.status is OrderStatus.HELD and "takes at least" in held.reason and len(life.e.arrivals(KEY).sent) == sent
        assert not life.desk._enough(BTC, 0.01) and life.desk._enough(BTC, 0.01, least / 0.01), "worth as much as it says, where nothing moves"
        worth(1.006)
        assert life.desk._enough(BTC, 0.01)
        life.desk.standing = usual
        refused = await life.broker.submit(replace(bought.intent, client_id="rdsmall", amount=life.rules[BTC].lot, kind="market"))
        assert refused.status is OrderStatus.REJECTED and "minimum" in refused.reason, "what would have come of it"


async def test_what_is_left_of_a_maker_is_too_little(tmp_path: Path) -> None:
    """Worth enough at the market, not at the price at which it would rest: nothing follows, and nothing is held back."""
    async with alive(tmp_path, orders={"execution": "maker", "patience": 5}) as life:
        await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        usual, mark = life.standing, life.rules[BTC].min_notional / 0.01 * 1.001
        life.desk.standing = lambda symbol: usual(symbol)._replace(mark=mark, half_spread=0.002)
        await tick(life)
        await life.desk.requote()
        await life.quiet()
        await life.desk.requote()
        assert [o.status for o in life.journal.orders().values()] == [OrderStatus.CANCELED] and not life.incidents("held")
        mark *= 1.01
        await life.desk.requote()
        assert len(life.journal.orders()) == 2


async def test_a_reduction_is_free_of_size_and_collar(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        await life.send(BTC, "buy", 0.01)
        await life.quiet()
        await tick(life)
        usual = life.standing
        life.desk.standing = lambda symbol: usual(symbol)._replace(equity=1.0)
        assert (await life.send(BTC, "sell", 0.01, round(life.mark(BTC) * 1.2, 2))).status is OrderStatus.OPEN


async def test_a_kill_while_an_order_waits_in_the_throttle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passed every check of the desk; the gate stands behind the throttle."""
    monkeypatch.setattr(exchange, "WINDOW", 0.4)
    async with alive(tmp_path) as life:
        i, client = life.meant(BTC, "buy", 0.01), life.venue.client
        endpoint = client.calculate_rate_limiter_cost(["spot", "private"], "POST", "order", {}, {"cost": 1}).endpoint
        client.weights.spent[endpoint] = deque([(time.monotonic(), client.weights.most)])
        sending = asyncio.create_task(life.desk.send(i))
        await asyncio.sleep(0.1)
        assert life.order(i).status is OrderStatus.SENT and not sending.done()
        throw(kill_file(life.s), "meanwhile")
        await sending
        assert life.order(i).status is OrderStatus.HELD and life.order(i).reason == "killed: meanwhile" and life.e.books(KEY)["sent"] == [] and not client.left


async def test_a_kill_that_sells(tmp_path: Path) -> None:
    """What rests is cancelled and what is held is sold, through the gate, and nothing else passes it; the venue says that nothing is open."""
    async with alive(tmp_path) as life:
        for symbol, amount in ((BTC, 0.01), (ETH, 0.05)): await life.send(symbol, "buy", amount)
        await life.quiet()
        await tick(life)
        resting = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        throw(kill_file(life.s), "a test", flatten=True)
        throw(kill_file(life.s), "a second time", flatten=False)
        assert (await life.venue.submit(Intent("rdother", BTC, "buy", 0.01, NOW))).status is OrderStatus.HELD
        assert await life.desk.stand_down() and life.order(resting.intent).status is OrderStatus.CANCELED
        assert life.memory.account.positions == {BTC: 0.0, ETH: 0.0} and not life.e.venue.open_orders() and len(life.desk.closing) == 2
        assert await life.desk.stand_down() and len(life.e.arrivals(KEY).sent) == 5
        assert life.switch.why() == "a test"
        with pytest.raises(Refused, match="say why"): resume(kill_file(life.s), [life.journal.path], "")
        assert life.switch.why() == "a test" and resume(kill_file(life.s), [life.journal.path], "over") == [life.journal.path] and life.switch.why() is None
        assert resume(kill_file(life.s), [life.journal.path], "twice") == []


async def test_standing_down_is_seen_at_the_venue(tmp_path: Path) -> None:
    """While the cancel is lost, nothing is said to be over."""
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        lose(life)
        throw(kill_file(life.s), "a test")
        assert not await life.desk.stand_down() and life.e.venue.open_orders() and life.order(order.intent).status is OrderStatus.OPEN
        await calm(life.e)
        assert await life.desk.stand_down() and not life.e.venue.open_orders()


@pytest.mark.parametrize("then", ["give up", "take"])
async def test_a_maker_quotes_anew(then: str, tmp_path: Path) -> None:
    """Each minute at the price of the backtest's rule, until patience ends; never more than was meant."""
    async with alive(tmp_path, orders={"execution": "maker", "patience": 3, "then": then}) as life:
        price = quote_price(1, life.mark(BTC), 0.002, life.rules[BTC].tick)
        usual = life.standing
        life.desk.standing = lambda symbol: usual(symbol)._replace(half_spread=0.002)
        first = await life.send(BTC, "buy", 0.01, price)
        marks = [life.mark(BTC)]
        for _ in range(5):
            await tick(life)
            marks.append(life.mark(BTC))
            await life.desk.requote()
            await life.desk.follow()
            await life.desk.requote()
        chain = sorted(life.journal.orders().values(), key=lambda o: o.intent.attempt)
        quotes = [o.intent for o in chain if o.intent.kind == "limit"]
        assert [i.attempt for i in quotes] == [0, 1, 2] and [i.price for i in quotes] == [quote_price(1, m, 0.002, life.rules[BTC].tick) for m in marks[:3]]
        assert [i.client_id for i in quotes] == [client_id("main", "testnet", BTC, first.intent.time, 0, k) for k in range(3)]
        assert all(i.amount == pytest.approx(0.01 - sum(o.filled for o in chain[:k])) for k, i in enumerate(o.intent for o in chain))
        got = sum(o.filled for o in chain)
        assert got == pytest.approx(0.01) and chain[-1].intent.kind == "market" if then == "take" else got < 0.01 and len(chain) == 3
        assert judge(own(life.e.books(KEY)), life.journal.orders(), life.journal.fills()).clean


async def test_what_never_arrived_is_sent_again_twice(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        life.broker.patience = 0.0
        lose(life)
        await life.send(BTC, "buy", 0.01)
        for _ in range(5):
            await life.desk.follow()
            await life.desk.requote()
        orders = life.journal.orders().values()
        assert [o.intent.attempt for o in orders] == [0, 1, 2] and {o.status for o in orders} == {OrderStatus.ABSENT} and {o.intent.amount for o in orders} == {0.01} and not life.e.venue.all_orders()


async def test_the_last_decisions_orders_end_with_the_next(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        old = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        await tick(life)
        await life.send(ETH, "buy", 0.05)
        await life.desk.requote()
        assert life.order(old.intent).status is OrderStatus.CANCELED
        life.memory.forget(life.venue.clock.now())
        assert life.memory.order(old.intent.client_id) is None and old.intent.client_id in life.journal.orders()


async def test_the_venue_cannot_be_asked(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01)
        life.e.fault("maintenance", 60)
        await life.desk.follow()
        assert life.order(order.intent).status is OrderStatus.OPEN and life.desk.counts["not asked"] == 1 and "cannot be asked for now" in life.said[-1]
        with pytest.raises(Retry): await life.look()
        life.desk.calm = 60.0
        await calm(life.e)
        await life.desk.follow()
        assert life.order(order.intent).status is OrderStatus.OPEN, "it was asked for just now"
        life.desk.hear(order.intent.client_id)
        await life.desk.follow()
        assert life.order(order.intent).status is OrderStatus.FILLED


async def test_a_crash_between_meaning_and_sending(tmp_path: Path) -> None:
    """The decision of now is sent after all; one that is over is not."""
    async with emulator() as e:
        async with alive(tmp_path, e) as life: now = life.meant(BTC, "buy", 0.01)
        async with alive(tmp_path, e) as life:
            assert life.order(now).status in (OrderStatus.OPEN, OrderStatus.FILLED)
            await life.quiet()
            await tick(life)
            old = life.meant(BTC, "buy", 0.01)
        await e.clock.step(15)
        async with alive(tmp_path, e) as life: assert life.order(old).status is OrderStatus.HELD and "too old" in life.order(old).reason and len(e.venue.all_orders()) == 1


def test_one_runner_an_account(tmp_path: Path) -> None:
    """Another process holds the lock until it ends, however it ends."""
    path = tmp_path / "journal.sqlite"
    code = f"import time; from pathlib import Path; from realdeal.stages import lock_account; lock = lock_account(None, Path({str(path)!r})); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(Refused, match="another runner trades on this account"): lock_account(None, path)
        other.kill()
        other.wait()
        lock_account(None, path).release()


async def test_one_account_at_a_time(tmp_path: Path) -> None:
    async with alive(tmp_path) as life, emulator() as e, alive(tmp_path / "other", e) as other:
        held = lock_account(life.venue, tmp_path / "a")
        with pytest.raises(Refused): lock_account(life.venue, tmp_path / "b")
        lock_account(other.venue, tmp_path / "a").release()
        held.release()


@pytest.mark.parametrize("name", ["STAGE", "ARMED"])
def test_the_environment_opens_no_stage(name: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.ini"
    shutil.copy(Path(__file__).parents[1] / "settings.ini", file)
    with pytest.raises(BadSetting, match=name.lower()): read_settings(file, env={f"REALDEAL_LIVE_{name}": "live" if name == "STAGE" else "yes"})


def test_what_is_missing_for_a_stage(tmp_path: Path) -> None:
    """A perfect record of a loopback venue opens nothing; a real one does, with the switch in the settings."""
    s = settings_in(tmp_path, live={"stage": "live"})
    now = Session(0.0, 0.0, "abc", "s", "m", "", True)
    assert missing_for("paper", s, now, s.data_dir) == missing_for("testnet", s, now, s.data_dir) == []
    perpetual = s.override(orders={"market": "perpetual"})
    assert [x for x in missing_for("testnet", perpetual, now, s.data_dir)] == ["[orders] market = perpetual: the runner keeps no account of funding so far"]
    path = s.data_dir / "journals" / "exchange-binance-spot-testnet.sqlite"
    journal = Journal(path)
    for k in range(1, 197): journal.add_decision(k * 15 * MINUTE, {}, {}, {})
    for n, kind in enumerate(("killed", "stood down", "resumed")): journal.db.execute("insert into incidents values (0,?,?,?,?)", (3600.0 + n, kind, "", ""))
    def ran(**other: Any) -> list[str]:
        journal.put_fact("sessions", [asdict(replace(now, until=49 * 3600.0, loopback=False, **other))] if "loopback" not in other else [asdict(replace(now, until=49 * 3600.0, **other))])
        return missing_for("live", s, now, s.data_dir)
    armed = "[live] armed = yes in settings.ini"
    assert ran() == [armed]
    nothing = missing_for("live", s, now, tmp_path / "nowhere")
    assert nothing[0] == armed and nothing[1].startswith("0.0 of 48 hours on a testnet") and nothing[2].startswith("uptime 0.00%") and nothing[3].startswith("a drilled kill switch")
    for other in ({"loopback": True}, {"code": "def"}, {"settings": "t"}, {"model": "n"}): assert ran(**other) == nothing, other
    ran()
    s = s.override(live={"stage": "live", "armed": True})
    assert missing_for("live", s, now, s.data_dir) == []
    journal.put_order(Order(Intent("rd", BTC, "buy", 0.01, 3_600_000), OrderStatus.UNKNOWN))
    assert missing_for("live", s, now, s.data_dir) == ["1 failed orders"]
    journal.close()


async def test_an_open_stage_takes_its_own_venue_only(tmp_path: Path) -> None:
    async with alive(tmp_path) as life:
        now = session_of(life.s, "m", life.venue)
        assert now.loopback and isinstance(open_broker(life.venue, None, life.known, life.s, now, tmp_path), CcxtBroker)
        keep_session(life.journal, now)
        keep_session(life.journal, now)
        assert sessions(life.journal) == [now]
        life.venue.is_emulated = False
        with pytest.raises(Refused, match="a venue with real money"): open_broker(life.venue, None, life.known, life.s, now, tmp_path)
        life.venue.is_emulated = True
        life.venue.client.markets[ETH]["active"] = False
        with pytest.raises(Refused, match="does not let the API trade it"): open_broker(life.venue, None, life.known, life.s, now, tmp_path)
        with pytest.raises(Refused, match="does not let the API trade it"): await life.venue.submit(Intent("rd", ETH, "buy", 0.05, NOW))
        for stage, where in (("paper", None), ("testnet", life.venue)):
            async with order_venue(life.s.override(live={"stage": stage}), life.venue) as orders: assert orders is where


async def test_no_secret_is_written(tmp_path: Path) -> None:
    """Every order fault strikes a runner with a planted key; nothing that it leaves or says holds the key, its secret, a signature or a listenKey."""
    async with alive(tmp_path, account="pl4nted") as life:
        client, said = life.venue.client, life.said
        secrets = [client.apiKey, client.secret]
        assert "pl4nted" in secrets[0] and len(secrets[1]) > 8
        log = Log(life.s.data_dir / "log.jsonl", secrets)
        for name in LASTING:
            lose(life, name)
            await tick(life)
            for symbol, amount in ((BTC, 0.01), (ETH, 0.05)): await life.send(symbol, "buy", amount, round(life.mark(symbol) * 0.985, 2))
            try: await life.look()
            except Retry as e: said.append(f"{e!r}")
            await life.desk.end([o for o in life.memory.pending.values() if o.status is OrderStatus.OPEN])
            await calm(life.e)
        life.desk.breaker = life.desk.breaker.worked()
        client.secret = "another"
        try: await life.look()
        except RealdealError as e: said.append(f"{e!r}")
        client.secret = secrets[1]
        with contextlib.suppress(RealdealError): await life.quiet(1.0)
        for text in (*said, f"GET /api/v3/order?timestamp=1&signature={'0' * 64}", f"X-MEXC-APIKEY: {secrets[0]}, {secrets[1]}"): log("said", text=text)
        log.close()
        left = files(tmp_path)
        assert {p.name for p in left} >= {"journal.sqlite", "log.jsonl"}
        for place, text in (*left.items(), ("said", "\n".join(said).encode())):
            for planted in (*secrets, "pl4nted"): assert planted.encode() not in text, place
        assert b"signature=" not in "\n".join(said).encode()


def files(folder: Path) -> dict[Path, bytes]: return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_stage_command_tells_no_secret(tmp_path: Path) -> None:
    from conftest import REPO
    env = {**os.environ, "MEXC_API_KEY": "pl4nted-key", "MEXC_SECRET": "pl4nted-secret"}
    for how in ([], ["--json"]):
        told = subprocess.run([sys.executable, "-m", "realdeal", "stage", *how], cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
        assert "live" in told.stdout and "pl4nted" not in told.stdout + told.stderr


async def test_a_fill_on_its_way_is_not_taken_over(tmp_path: Path) -> None:
    """A human explains a foreign order while a fill of ours is in the balance and not yet in the list of trades: only what stays unexplained is theirs."""
    async with alive(tmp_path) as life:
        foreign = await strange(life.e, ETH, price=f"{life.mark(ETH) * 0.9:.2f}", amount="0.1")
        await life.look()
        assert set(life.desk.halts) == {ETH}
        life.e.fault("lookup_lag", 60)
        await life.send(BTC, "buy", 0.01)
        adopt([life.journal.path], "mine")
        await life.look()
        await calm(life.e)
        await life.quiet()
        assert not life.desk.halts and life.journal.fact("opening") | {"adopted": {}, "foreign": [foreign]} == life.journal.fact("opening")


def test_a_snapshot_is_of_one_time() -> None:
    s, t = Settings(), 15 * MINUTE
    p = Panel(SYMBOLS, np.array([0, t, 0, t]), np.array([0, 0, 1, 1]), np.zeros((4, 1)), *(np.array([1.0, 2.0, 3.0, 4.0]) for _ in range(3)), np.array([0.0, 0.01, 0.0, 0.02]), np.ones(4, bool), ("x",))
    told = snapshot(p, [1, 3], [Signal(BTC, t, 0.7, "long", 0.4)], Account(1000.0, {ETH: 2.0}), s)
    assert told.time == t and told.prices == {BTC: 2.0, ETH: 4.0} and told.sigma == {BTC: 0.04, ETH: 0.08} and list(told.signals) == [BTC] and told.equity == 1008
    with pytest.raises(BadData, match="rows of one time"): snapshot(p, [0, 3], [], Account(1000.0), s)


async def test_an_order_is_over_when_its_fills_are_told(tmp_path: Path) -> None:
    """The venue shows the order as filled and its deals not yet: it is asked about again."""
    async with alive(tmp_path) as life:
        order = await life.send(BTC, "buy", 0.01, round(life.mark(BTC) * 0.985, 2))
        await asyncio.sleep(LAG)
        for name in ("cancel_race", "lookup_lag"): lose(life, name)
        await life.desk.end([order])
        assert life.order(order.intent).status is OrderStatus.OPEN and not life.journal.fills()
        await asyncio.sleep(LAG)
        await life.desk.follow()
        assert life.order(order.intent).status is OrderStatus.FILLED and life.memory.account.positions == {BTC: 0.01}
