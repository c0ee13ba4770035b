"""The client's reads and the follower, against the emulator in its bad hours; the long proof is `realdeal soak`."""
from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import realdeal

from realdeal.emulator import Emulator, emulator_process, serve
from realdeal.exchange import TRADES_PAGE, Clock, Exchange
from realdeal.frames import OrderUpdate
from realdeal.ingest import Follower, open_market
from realdeal.market import SUMS, checksum, funding, generate
from realdeal.settings import Settings
from realdeal.store import Store, StoreKey
from realdeal.streams import Streams
from realdeal.types import DAY, MINUTE, Intent, Minute, Retry
from realdeal.wire import client_options

START, SYMBOLS = 1_704_067_200_000, ("BTC/USDT", "ETH/USDT")
NOW = START + DAY
SETTINGS = Settings().override(data={"close_grace_ms": 20_000, "time_sync": 1, "stream_silence": 2})


@asynccontextmanager
async def emulator(**kw: object) -> AsyncIterator[Emulator]:
    rates = {x: funding(x, START, 3 * 1440, seed=5) for x in SYMBOLS}
    async with serve(**{"histories": generate("null", SYMBOLS, START, 3 * 1440, seed=5), "funding": rates, "now": NOW, "seed": 5, "name": "null-5", **kw}) as e: yield e


def store_at(folder: Path) -> Store: return Store(folder, StoreKey(source="simulated", venue="emulator", market="null-5"))


def kept(store: Store, symbol: str) -> dict[int, tuple[int, int]]:
    """Number and checksum of the trades of each minute in the store."""
    found: dict[int, tuple[int, int]] = {}
    for t, price, amount, is_buy, _ in store.read_trades(symbol, START, START + 9 * DAY).iter_rows():
        n, total = found.get(t - t % MINUTE, (0, 0))
        found[t - t % MINUTE] = n + 1, (total + checksum(t, price, amount, is_buy)) % SUMS
    return found


async def test_contract_outage_does_not_stop_spot() -> None:
    async with emulator() as e:
        e.fault("contract_down", 60.0)
        async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=2) as venue:
            assert venue.rules("BTC/USDT").active and await venue.open_interest("BTC/USDT") is None, "unknown is None, never 0"
            await e._end("contract_down")
            assert (await venue.open_interest("BTC/USDT") or 0) > 0, "known as soon as the endpoints are back"
            assert len(await venue.funding("BTC/USDT", START, NOW)) == 3


@pytest.mark.parametrize("fault", ["html_200", "truncated_200", "empty_200"])
async def test_garbage_with_status_200_is_asked_again(fault: str) -> None:
    async with emulator() as e:
        async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=2) as venue:
            e.fault(fault, 60.0)
            with pytest.raises(Retry): await venue.sync_time()
            with pytest.raises(Retry): await venue.book("BTC/USDT")
            if fault != "empty_200":  # an empty list is what the venue says of a minute without trades
                for read in (venue.candles, venue.trades):
                    with pytest.raises(Retry): await read("BTC/USDT", START, START + 5 * MINUTE)
        with pytest.raises(Retry):
            async with Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0), tries=2): pass


async def test_trades_page_exactly() -> None:
    """A minute with many more trades than a page: all of them, once, though pages end within a millisecond."""
    busy = {"BTC/USDT": {START + 5 * MINUTE: 7_500}}
    async with emulator(busy=busy) as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)) as venue:
        got = await venue.trades("BTC/USDT", START + 5 * MINUTE, START + 6 * MINUTE)
        wanted = list(e.tape.ticks(START + 5 * MINUTE - 1, START + 6 * MINUTE - 1))
    wanted = [t for t in wanted if t.symbol == "BTC/USDT"]
    assert len(wanted) == 7_500 > 7 * TRADES_PAGE
    assert [t[:4] for t in got] == [(t.time, t.price, t.amount, t.is_buy) for t in wanted]


async def test_own_orders_are_heard_and_a_lost_key_is_renewed() -> None:
    async with emulator() as e, Exchange(Settings(), options=client_options(e.url), clock=Clock(rate=0)) as venue:
        async with Streams(venue, SYMBOLS, private=True) as live:
            key = venue.client.options["listenKey"]
            for connection in list(e.hub.connections): connection.transport.abort()
            async with asyncio.timeout(10):
                while len(live.reconnects) < 2: await asyncio.sleep(0.02)  # noqa: ASYNC110
            assert venue.client.options["listenKey"] != key and not any(key in reason for reason in live.gaps)
            await venue.submit(Intent("rdone", "BTC/USDT", "buy", 0.01, NOW))
            async with asyncio.timeout(5):
                while not any(isinstance(x, OrderUpdate) and x.client_id == "rdone" for x in live.inbox.take()): await asyncio.sleep(0.02)  # noqa: ASYNC110


async def passes(e: Emulator, minutes: int) -> None:
    """Until the market is so many minutes further, however slow the machine is."""
    goal = e.clock.now + minutes * MINUTE
    async with asyncio.timeout(60):
        while e.clock.now < goal: await asyncio.sleep(0.05)  # noqa: ASYNC110


async def follow(e: Emulator, folder: Path, minutes: int, queue: int | None = None) -> Follower:
    """Follow for some minutes of the market, then settle while it stands."""
    async with open_market(SETTINGS, e.url) as market:
        f = Follower(market.venue, store_at(folder), SETTINGS, say=lambda _: None)
        if queue: f.streams.inbox.limit = queue
        f.begin()
        await f.streams.open()
        stop = asyncio.Event()
        running = asyncio.create_task(f.run(stop))
        await passes(e, minutes)
        await e.clock.pause()
        stop.set()
        await running
        return f


async def test_a_full_queue_is_a_gap_that_is_repaired(tmp_path: Path) -> None:
    async with emulator(speed=240, busy={x: {NOW + m * MINUTE: 1_500 for m in range(3, 120, 4)} for x in SYMBOLS}) as e:
        f = await follow(e, tmp_path, 20, queue=300)
        told = f.ledger()
        assert told["queue_dropped"] > 0 and told["dropped"] == 0
        for x in SYMBOLS:
            mine = kept(f.store, x)
            truth = {m[0]: (m[1], m[2]) for m in await e.minutes(x, f.began, NOW + DAY)}
            assert len(truth) > 10 and {t: mine.get(t) for t in truth} == truth


async def test_a_new_start_repairs_what_the_last_one_left_open(tmp_path: Path) -> None:
    """Nothing is saved at the end: minutes without evidence are doubts of the next start."""
    async with emulator(speed=240) as e:
        first = await follow(e, tmp_path, 6)
        e.clock.run()
        await passes(e, 10)
        second = await follow(e, tmp_path, 6)
        assert sum(s.tally.doubts["not running"] for s in second.feed.symbols.values()) >= 2 * 8
        for x in SYMBOLS:
            mine = kept(second.store, x)
            truth = {m[0]: (m[1], m[2]) for m in await e.minutes(x, first.began, NOW + DAY)}
            assert {t: mine.get(t) for t in truth} == truth


def test_minutes_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    """A kill in the middle of a write leaves the minutes of before."""
    from realdeal.types import Bar, Print

    store = store_at(tmp_path)
    def minutes() -> list[Minute]:
        return [Minute("BTC/USDT", bar := Bar(k * MINUTE, 1.0, 1.0, 1.0, 1.0, 1.0), (Print(k * MINUTE, 1.0, 1.0, True),), bar, "stream") for k in range(3)]
    def interrupted():
        yield from minutes()[:2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): store.keep(interrupted())
    assert store.read("BTC/USDT", 0, DAY).is_empty() and store.read_trades("BTC/USDT", 0, DAY).is_empty()
    store.keep(minutes())
    assert len(store.read_evidence("BTC/USDT", 0, DAY)) == 3


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_the_command(home: Path) -> None:
    """As a user runs it: follow an emulator, read the metrics, stop it, ask for the ledger."""
    port = free_port()
    async with emulator_process(["--market", "null", "--days", "2", "--speed", "120"]) as url:
        args = [sys.executable, "-m", "realdeal", "ingest", "--follow", "--emulator", url, "--metrics-port", str(port), "--json"]
        p = await asyncio.create_subprocess_exec(*args, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
        assert p.stderr is not None
        assert b"following BTC/USDT, ETH/USDT" in await asyncio.wait_for(p.stderr.readline(), 60)
        page = ""
        async with asyncio.timeout(30):
            while 'proof="stream"' not in page:
                await asyncio.sleep(0.5)
                page = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
        p.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(p.communicate(), 60)
        assert p.returncode == 0, err.decode()
        told = json.loads(out)
        assert told["dropped"] == 0 and told["minutes"] > 0 and told["symbols"]["BTC/USDT"]["known"]["stream"] > 0
        again = await asyncio.to_thread(realdeal, "ingest", "--status", "--emulator", url, "--json", home=home)
        assert json.loads(again.stdout)["minutes"] == told["minutes"]
        text = await asyncio.to_thread(realdeal, "ingest", "--status", "--emulator", url, home=home)
        assert text.stdout.startswith(f"dropped 0 of {told['minutes']:,} minutes")


def test_no_ledger_yet(home: Path) -> None:
    done = realdeal("ingest", "--status", home=home)
    assert done.returncode == 66 and "nothing was fed into this store yet" in done.stderr
