"""The order path under attack: real desk, broker, reconciler and journal on ccxt's own client, judged by the emulator's books."""
from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from realdeal import exchange, faults
from realdeal.broker import CcxtBroker
from realdeal.decide import State
from realdeal.desk import SEEN, Desk, Reconciler, Switch, adopt, kill_file, remember, resume, throw
from realdeal.drill import TOLERANCE, judge
from realdeal.emulator import SIMULATED_START, Emulator, Limits, serve
from realdeal.exchange import Clock, Exchange
from realdeal.fills import quote_price
from realdeal.market import generate
from realdeal.orders import client_id, round_down
from realdeal.risk import Standing
from realdeal.settings import Settings
from realdeal.stages import NOTHING, Session, record_of
from realdeal.store import Journal
from realdeal.types import DAY, MINUTE, Intent, Order, OrderStatus, Retry
from realdeal.venue import NewOrder, VenueError
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
    def __init__(self, e: Emulator, s: Settings, reached: Callable[[str], None] = lambda step: None):
        self.e, self.s, self.said = e, s, list[str]()
        self.journal = Journal(s.data_dir / "journals" / "journal.sqlite")
        self.venue = Exchange(s, options=client_options(e.url), clock=Clock(rate=0))
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
async def alive(folder: Path, e: Emulator | None = None, **more: Any) -> AsyncIterator[Life]:
    async with contextlib.AsyncExitStack() as stack:
        life = Life(e or await stack.enter_async_context(emulator()), settings_in(folder, **more))
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
        self.steps = 0

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
        self.steps += 1
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
            await life.desk.follow()
            await asyncio.sleep(0.02)
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
        if "DESK_STAT" in os.environ:
            from collections import Counter
            print("STAT", self.steps, Counter(o.status.value for o in life.journal.orders().values()), Counter(r["kind"] for r in life.journal.rows("incidents")), dict(self.e.hub.faults.bit), len(life.journal.fills()))
        account = remember(life.journal, self.s.risk.capital).account
        assert account == life.memory.account and account.cash == pytest.approx(cash, abs=TOLERANCE)
        assert {x: account.positions.get(x, 0.0) for x in SYMBOLS} == pytest.approx(held, abs=TOLERANCE)


def test_order_path(quick: None) -> None:
    examples, steps = int(os.environ.get("DESK_EXAMPLES", "12")), int(os.environ.get("DESK_STEPS", "30"))
    run_state_machine_as_test(OrderPath, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize="DESK_RANDOM" not in os.environ, database=None, phases=(Phase.generate,), report_multiple_bugs=False, suppress_health_check=list(HealthCheck)))


# One thing at a time.

async def test_an_answer_comes_after_the_fill(tmp_path: Path) -> None:
    """The order is filled and asked about, by a kill meanwhile, before the answer to it is here."""
    async with alive(tmp_path) as life:
        slowly(life.venue, 0.3)
        i = life.meant(BTC, "buy", 0.01)
        sending = asyncio.create_task(life.desk.send(i))
        while not life.e.venue.all_orders(): await asyncio.sleep(0.01)
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
