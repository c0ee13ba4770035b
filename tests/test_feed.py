"""What a hostile review of feed, store and streams found: each a way to call something known that was not."""
from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from test_exchange import server
from test_ingest import NOW, SYMBOLS, emulator, store_at

from realdeal.exchange import Clock, Exchange
from realdeal.feed import Feed
from realdeal.frames import BookChange, BookSnapshot, Candle, Gap, Quote, Trade
from realdeal.ingest import Follower, backfill
from realdeal.settings import Settings
from realdeal.store import Store
from realdeal.streams import Inbox, Patience, Streams
from realdeal.types import DAY, HOUR, MINUTE, Bar, Minute, NotWritten, Print, Retry
from realdeal.wire import client_options

BTC = "BTC/USDT"


def trade(ms: int, price: float, amount: float = 1.0) -> Trade: return Trade(BTC, ms, price, amount, True, str(ms), ms + 5)


def word(opened: int, *trades: Trade) -> Candle:
    prices = [t.price for t in trades]
    return Candle(BTC, opened, prices[0], max(prices), min(prices), prices[-1], sum(t.amount for t in trades), trades[-1].time, trades[-1].time + 5)


def prints(*trades: Trade) -> list[Print]: return [Print(t.time, t.price, t.amount, t.is_buy) for t in trades]
def bar(opened: int, *trades: Trade) -> Bar: return Bar(*word(opened, *trades)[1:7], origin="backfilled")


A, B, C = trade(1000, 10.0), trade(2000, 12.0), trade(MINUTE + 1000, 11.0)


def fed(*events: object) -> Feed:
    feed = Feed([BTC], grace=2000)
    feed.begin(BTC, 0)
    for e in events: feed.on(e)  # type: ignore[arg-type]
    return feed


def test_the_same_tail_lost_on_both_channels_is_found_by_the_comparison() -> None:
    """B was lost as a trade and as a word on the candle: trades and candle agree, and are wrong."""
    feed = fed(A, word(0, A), C, word(MINUTE, C))
    assert feed.symbols[BTC].proofs[0] == "stream" and feed.symbols[BTC].frontier == 0, "not compared yet"
    assert feed.verify(BTC, [bar(0, A, B)]) == 1 and feed.symbols[BTC].frontier == 0
    [m] = feed.told(BTC, 0, bar(0, A, B), prints(A, B), 0)
    assert m.proof == "rest" and len(m.trades) == 2
    assert feed.verify(BTC, [bar(0, A, B)]) == 0 and feed.symbols[BTC].frontier == MINUTE


def test_an_empty_answer_compares_nothing() -> None:
    feed = fed(A, word(0, A), C, word(MINUTE, C))
    assert feed.verify(BTC, []) == 0 and feed.symbols[BTC].frontier == 0
    assert feed.verify(BTC, [bar(MINUTE, C)]) == 0 and feed.symbols[BTC].frontier == 0, "a minute that happened is not in the answer"


def test_answers_that_prove_nothing_destroy_nothing(tmp_path: Path) -> None:
    feed = Feed([BTC], grace=2000)
    feed.begin(BTC, 0)
    known = [m for e in (A, B, word(0, A, B), C, word(MINUTE, C)) for m in feed.on(e)]
    store = store_at(tmp_path)
    store.keep(known)
    feed.on(Gap(BTC, 1500, "closed", 0))
    assert 0 in feed.doubts(BTC)
    for _ in range(6): assert feed.told(BTC, 0, None, None, 0) == [], "it happened: REST will know"
    assert not feed.needs_trades(BTC, bar(0, A, B)) and feed.told(BTC, 0, bar(0, A, B), None, 0) == [] and not feed.doubts(BTC), "it stands"
    feed.on(Gap(BTC, 1500, "closed", 0))
    other = Bar(0, 10.0, 12.0, 10.0, 12.0, 5.0, "backfilled")
    for _ in range(4): changed = feed.told(BTC, 0, other, [], 0)
    [m] = changed
    assert m.proof == "venue"
    store.keep(changed)
    assert store.read(BTC, 0, MINUTE)["volume"].to_list() == [5.0] and len(store.read_trades(BTC, 0, MINUTE)) == 2, "trades that prove less replace none"


def test_what_was_heard_is_never_called_not_offered() -> None:
    feed = fed(A, word(0, A))
    feed.tick(MINUTE + 2000)
    for _ in range(9): assert feed.told(BTC, 0, None, None, 0) == []
    assert feed.missing() == 1


def test_rest_that_lags_behind_is_not_believed() -> None:
    feed = fed(A, B, word(0, A))
    feed.tick(MINUTE + 2000)
    for _ in range(9): assert feed.told(BTC, 0, bar(0, A), prints(A), 0) == []
    assert feed.told(BTC, 0, bar(0, A, B), None, 0)[0].proof == "rest"


def test_one_corrupt_trade_does_not_hold_a_minute_in_doubt_for_ever() -> None:
    feed = fed(A, A._replace(id="1001"), word(0, A))
    feed.tick(MINUTE + 2000)
    told = [feed.told(BTC, 0, bar(0, A), prints(A), 0) for _ in range(12)]
    assert not any(told[:11]) and told[11][0].proof == "rest" and len(told[11][0].trades) == 1


def test_nothing_absurd_stays() -> None:
    """A quote from the future, a crossed one, a version out of nowhere: none of them blocks what comes after."""
    feed = fed(Quote(BTC, 60_000, 9.0, 11.0, 10), Quote(BTC, 20, 9.5, 10.5, 20), Quote(BTC, 30, 12.0, 10.0, 30))
    s = feed.symbols[BTC]
    assert (s.quote.bid, s.quote.time) == (9.5, 20) and s.tally.crossed == 1
    for t in (Trade(BTC, 90_000, 500.0, 1.0, True, "9", 10), trade(2000, 10.0)): feed.on(t)
    assert s.price.value == 10.0
    s.ladder.reset(BookSnapshot(BTC, 0, 10, ((9.0, 1.0),), ((11.0, 1.0),)))
    for last in (10**15, 11):
        feed.on(BookChange(BTC, 0, 11, last, (), (), 0))
    assert s.ladder.version is None and s.ladder.broken == {"versions fall": 1}


def test_a_quote_is_no_proof_that_trades_still_flow() -> None:
    feed = fed(A, word(0, A), Quote(BTC, MINUTE + 10, 9.0, 11.0, MINUTE + 10))
    assert feed.tick(MINUTE + 2000) == [] and feed.doubts(BTC) == {0: "nothing heard since"}


def test_a_full_queue_tells_the_earliest_event_it_dropped() -> None:
    box = Inbox(1)
    for ms in (5, 60_010, 59_990): box.put(trade(ms, 1.0))
    box.take()
    assert box.take() == [Gap(BTC, 59_990, "queue full", 0)]
    for k in range(100):
        for x in SYMBOLS: box.put(Gap(x, k, "malformed frame", k))
    assert [e.symbol for e in box.take()] == list(SYMBOLS), "a hundred bad frames are one gap of each symbol"
    for e in (trade(1, 1.0), Gap(BTC, 1, "malformed frame", 1)): box.put(e)
    assert len(box) == 2, "what came after data is a gap of its own"


def one(k: int) -> Minute: return Minute(BTC, b := Bar(k * MINUTE, 1.0, 1.0, 1.0, 1.0, 1.0), (Print(k * MINUTE, 1.0, 1.0, True),), b, "stream")


def test_two_compactions_lose_nothing(tmp_path: Path) -> None:
    """The second one read the tail before new minutes came into the rows that the first one had emptied."""
    store = store_at(tmp_path)
    store.keep([one(0), one(1)])
    with store._tail() as db: stale = [r[0] for r in db.execute("select rowid from bars")]
    store.compact()
    store.keep([one(2), one(3)])
    with store._tail() as db: db.executemany("delete from bars where rowid=?", [(r,) for r in stale])
    assert len(store.read(BTC, 0, DAY)) == len(store.read_evidence(BTC, 0, DAY)) == len(store.read_trades(BTC, 0, DAY)) == 4


def test_a_broken_tail_is_put_aside(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.keep([one(0)], frontiers={BTC: MINUTE})
    for f in store.folder.glob("tail.sqlite*"): f.write_bytes(b"not a database, " * 300)
    with pytest.raises(NotWritten, match="put aside as tail.corrupt-"): store.read(BTC, 0, DAY)
    store.keep([one(1)])
    assert store.read(BTC, 0, DAY)["time"].to_list() == [MINUTE] and store.frontier(BTC) is None


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file", store_at(tmp_path).key)
    for write in (lambda: store.keep([one(0)]), store.compact):
        with pytest.raises(NotWritten, match="cannot be written"): write()


def test_a_synthetic_minute_covers_no_compacted_one(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.keep([one(0)])
    store.compact()
    store.keep([Minute(BTC, Bar(0, 1.0, 1.0, 1.0, 1.0, 0.0, "synthetic"), (), None, "none")])
    assert store.read(BTC, 0, DAY)["origin"].to_list() == ["venue"] and store.read_evidence(BTC, 0, DAY)["proof"].to_list() == ["stream"]


async def test_a_long_pause_is_missing_until_it_is_repaired(tmp_path: Path) -> None:
    """Off for 30 hours: every minute of them is a doubt of the next start, and REST tells it; trades of the last day too."""
    async with emulator(now=NOW + 31 * HOUR) as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)) as venue:
        store, s = store_at(tmp_path), Settings()
        store.keep([], frontiers={x: NOW for x in SYMBOLS})
        f = Follower(venue, store, s, pause=0.0, say=lambda _: None)
        f.began, f.trades = venue.clock.now(), False
        f.begin()
        assert f.feed.missing() == 2 * 31 * 60
        await f.mend()
        await f.flush()
        assert f.feed.missing() == 0 and f.ledger()["unproven"] == 2 * 31 * 60, "without trades nothing is proven"
        assert store.missing(BTC, NOW, NOW + 31 * HOUR) == [] and await f.verify() == 0 and store.frontier(BTC) == NOW


async def test_backfill_believes_emptiness_only_of_a_venue_that_answers(tmp_path: Path) -> None:
    async with emulator() as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)) as venue:
        store = store_at(tmp_path)
        e.fault("empty_200", 1.5)
        assert await backfill(venue, store, BTC, NOW - 10 * HOUR, NOW, lambda _: None) == 600
        assert set(store.read(BTC, NOW - 10 * HOUR, NOW)["origin"]) == {"backfilled"}


async def test_a_connection_that_dies_while_its_successor_is_dialled_is_a_gap() -> None:
    async with emulator() as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)) as venue:
        class Slow(Streams):
            async def url(self, private: bool) -> str:
                for c in list(e.hub.connections): c.transport.abort()
                await asyncio.sleep(0.3)
                return await super().url(private)

        async with Slow(venue, SYMBOLS, patience=Patience(age=1.0, overlap=0.1)) as live:
            async with asyncio.timeout(10):
                while not live.reconnects: await asyncio.sleep(0.02)  # noqa: ASYNC110
            assert sum(live.gaps.values()) == 1 and live.counts["rotated"] == 0


async def test_pongs_without_data_are_silence() -> None:
    async with emulator() as e, Exchange(Settings(), options={**client_options(e.url), "streaming": {"keepAlive": 200}}, clock=Clock(rate=0)) as venue:
        async with Streams(venue, SYMBOLS, patience=Patience(silence=1.0)) as live:
            await e.clock.step(1)
            async with asyncio.timeout(10):
                while not live.gaps: await asyncio.sleep(0.02)  # noqa: ASYNC110
            assert dict(live.gaps) == {"silent": 1}


async def test_one_symbol_in_trouble_does_not_hold_up_another(tmp_path: Path) -> None:
    async with emulator() as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=1) as venue:
        f = Follower(venue, store_at(tmp_path), Settings(), pause=0.0, say=lambda _: None)
        f.began = NOW
        f.begin()
        for x in SYMBOLS: f.feed.symbols[x].doubts.clear()
        for x in SYMBOLS: f.feed.begin(x, NOW, [NOW - MINUTE])

        async def answer(request: web.Request) -> web.Response:
            if request.query["symbol"] == "BTCUSDT": return web.Response(text="[[null]]", content_type="application/json")
            async with ClientSession() as client, client.get(f"{e.url}{request.rel_url}") as told: return web.Response(text=await told.text(), content_type="application/json")

        async with server(answer) as url:
            venue.client.urls["api"]["spot"]["public"] = url
            with pytest.raises(Retry, match="BTC/USDT"): await f.mend()
        assert {x: len(y.doubts) for x, y in f.feed.symbols.items()} == {BTC: 1, "ETH/USDT": 0}


def test_a_tail_that_another_process_writes_is_waited_for(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    store.keep([one(0)])
    with sqlite3.connect(store.folder / "tail.sqlite") as db:
        db.execute("insert into sessions values (1, '{}')")
        db.commit()
        store.keep([one(1)])
    assert len(store.read(BTC, 0, DAY)) == 2


async def test_a_settled_rate_goes_to_the_disk_with_the_minutes(tmp_path: Path) -> None:
    """Known at the very moment of its settlement; what the disk does not take waits; a second life asks the disk before the venue."""
    async with emulator(now=NOW + 8 * HOUR) as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=1) as venue:
        store, life = store_at(tmp_path), lambda: Follower(venue, store, Settings(), pause=0.0, say=lambda _: None)
        first = life()
        await first.funding()
        newest = first.feed.symbols[BTC].funding
        assert newest is not None and newest.event_time == venue.clock.now() == NOW + 8 * HOUR and store.read_funding(BTC, 0, NOW + DAY).is_empty()
        store.folder.mkdir(parents=True, exist_ok=True)
        (store.folder / "tail.sqlite").mkdir()
        await first.flush()
        assert first.disk_errors == 1
        (store.folder / "tail.sqlite").rmdir()
        await first.flush()
        rates = store.read_funding(BTC, 0, NOW + DAY)
        assert rates["time"].to_list() == list(range(NOW - DAY, NOW + 8 * HOUR + 1, 8 * HOUR)) and rates.row(-1) == (newest.event_time, newest.value)
        e.fault("contract_down", 60.0)
        await first.funding()
        second = life()
        await second.funding()
        assert second.feed.symbols[BTC].funding == newest
        await e._end("contract_down")
        await e.clock.step(8 * 60)
        venue.clock.set(e.clock.now)
        await second.funding()
        await second.flush()
        assert store.read_funding(BTC, 0, NOW + DAY)["time"].to_list()[-2:] == [NOW + 8 * HOUR, NOW + 16 * HOUR] and len(store.read_funding(BTC, 0, NOW + DAY)) == len(rates) + 1
        store.compact()
        assert store.read_funding(BTC, 0, NOW + DAY).height == len(rates) + 1 and store.missing(BTC, NOW, NOW) == []


async def test_a_rate_that_was_not_told_is_asked_for_each_minute(tmp_path: Path) -> None:
    """The venue's contracts were down when it was settled."""
    settled = NOW + 8 * HOUR
    async with emulator(now=settled - 5 * MINUTE, speed=240.0) as e:
        e.clock.run()
        async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=240.0), tries=1) as venue:
            f, stop = Follower(venue, store_at(tmp_path), Settings(), say=lambda _: None), asyncio.Event()
            await f.funding()
            e.fault("contract_down", 600.0)
            f.begin()
            await f.streams.open()
            running = asyncio.create_task(f.run(stop))
            async with asyncio.timeout(20):
                while venue.clock.now() < settled + 5 * MINUTE: await asyncio.sleep(0.02)  # noqa: ASYNC110
                assert f.feed.symbols[BTC].funding.event_time == NOW
                await e._end("contract_down")
                while any(f.feed.symbols[x].funding.event_time < settled for x in SYMBOLS): await asyncio.sleep(0.02)  # noqa: ASYNC110
            assert venue.clock.now() < settled + 20 * MINUTE
            stop.set()
            await running
            await f.streams.close()
