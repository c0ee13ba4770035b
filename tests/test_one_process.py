"""The command `realdeal live` in this process: page, terminal, signals, both ways to be driven, and what becomes of a start without a venue."""
from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Demo, realdeal
from test_runner_faults import runner
from test_desk import BTC, emulator

from realdeal.desk import kill_file, resume
from realdeal.drill import DrillPlan, drill_settings, step_args, step_plan
from realdeal.emulator import emulator_process
from realdeal.live import crashing, run_live
from realdeal.provenance import places
from realdeal.settings import Settings, read_settings
from realdeal.store import Journal
from realdeal.types import MINUTE, BadSetting, Observed, Refused, Retry, Stop

SYMBOLS = ("BTC/USDT", "ETH/USDT")


def ready(demo: Demo, folder: Path, plan: DrillPlan) -> Settings:
    """The settings of a drill in a home of its own, with the demo's models."""
    s = read_settings(drill_settings(demo.job.s, plan, folder / "home"), env={})
    shutil.copytree(demo.data / "models", places(s, "simulated").models)
    return s


@asynccontextmanager
async def living(s: Settings, url: str, said: list[str], **more: Any) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """A runner in this loop, ended by the signal an operator sends."""
    task = asyncio.create_task(run_live(s, url, None, said.append, drill=True, **more))
    try: yield task
    finally:
        if not task.done(): os.kill(os.getpid(), signal.SIGINT)
        with contextlib.suppress(Exception): await asyncio.wait_for(task, 60)


async def until(true: Callable[[], Any], task: asyncio.Task[Any], seconds: float = 60) -> Any:
    for _ in range(int(seconds / 0.05)):
        if task.done(): task.result()
        if found := true(): return found
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come")


async def test_seen_and_killed(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The button kills and sells, a signal kills, another one ends it; the terminal shows it, the log holds no secret."""
    monkeypatch.setenv("REALDEAL_NOTIFY", "json://127.0.0.1:9/planted-secret")
    plan, said = DrillPlan(24, 120, "none", 5, SYMBOLS, execution="taker"), []
    s = ready(demo, tmp_path, plan)
    async with emulator_process(plan.emulator_args(plan.begin - 1)) as url, living(s, url, said, port=0, watch=True) as task:
        page = (await until(lambda: next((x for x in said if x.startswith("page: ")), None), task)).split()[1]
        address, token = page.split("#token=")
        async with aiohttp.ClientSession(headers={"X-Realdeal-Token": token}) as http:
            async def state() -> dict[str, Any]:
                async with http.get(f"{address}state") as r: return await r.json()
            seen = await state()
            for _ in range(1200):
                if (seen := await state())["counts"]["fills"]: break
                await asyncio.sleep(0.05)
            assert seen["counts"]["fills"] and seen["decisions"] and seen["latency"]["order_ms"]
            assert any(p["value"] for p in seen["positions"]) and seen["positions"][0]["reason"]
            async with http.post(f"{address}kill", json={"reason": "the button", "flatten": True}) as r: told = await r.json()
            assert told["killed"] == "the button"
            journal = next(s.data_dir.rglob("*-testnet.sqlite"))
            for _ in range(1200):
                if (seen := await state())["latency"]["kill_ms"] is not None and not any(p["amount"] * (p["price"] or 0) > 1 for p in seen["positions"]): break
                await asyncio.sleep(0.05)
            assert seen["killed"] == "the button" and not seen["orders"]
            resume(kill_file(s), [journal], "a test")
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(1200):
                if (seen := await state())["killed"] == "signal SIGUSR1": break
                await asyncio.sleep(0.05)
            assert seen["killed"] == "signal SIGUSR1" and {x["kind"] for x in seen["incidents"]} >= {"killed", "stood down"}
        os.kill(os.getpid(), signal.SIGINT)
        told = await asyncio.wait_for(task, 60)
        assert told["failed_orders"] == 0 and told["decisions"] >= 1 and any("stopping" in x for x in said)
    log = next(s.data_dir.rglob("*-testnet.jsonl")).read_text()
    assert "planted-secret" not in log and token not in log and "the button" in log


async def test_a_halted_runner_goes_on_when_its_owner_says_so(demo: Demo, tmp_path: Path) -> None:
    """Somebody takes coins out of the account: the symbol is halted, and traded again after `realdeal adopt`, which needs a reason."""
    plan, said = DrillPlan(24, 60, "none", 5, SYMBOLS, execution="taker"), []
    s = ready(demo, tmp_path, plan)
    settings = ("--settings", str(tmp_path / "home" / "settings.ini"))
    async with emulator_process(plan.emulator_args(plan.begin - 1)) as url, living(s, url, said, port=0) as task:
        page = (await until(lambda: next((x for x in said if x.startswith("page: ")), None), task)).split()[1]
        address, token = page.split("#token=")
        async with aiohttp.ClientSession(headers={"X-Realdeal-Token": token}) as http:
            async def halted(wanted: bool) -> set[str]:
                for _ in range(800):
                    async with http.get(f"{address}state") as r: found = {x["symbol"] for x in (await r.json())["feeds"] if x["halted"]}
                    if bool(found) is wanted: return found
                    await asyncio.sleep(0.05)
                raise AssertionError(f"halted: {found}")
            assert not await halted(False)
            assert (await asyncio.to_thread(realdeal, "adopt", "--why", "nothing yet", *settings)).returncode == 66
            async with aiohttp.ClientSession() as other, other.post(f"{url}/emulator/transfer?account=emulator-main&asset=ETH&amount=0.5") as r: assert r.status == 200, await r.text()
            assert await halted(True) == {"ETH/USDT"}
            assert (await asyncio.to_thread(realdeal, "adopt", "--why", " ", *settings)).returncode == 77
            told = await asyncio.to_thread(realdeal, "adopt", "--why", "a gift", *settings)
            assert told.returncode == 0 and "testnet" in told.stdout, told.stderr
            assert not await halted(False)
    journal = Journal(next(s.data_dir.rglob("*-testnet.sqlite")))
    assert any(x["kind"] == "adopted" and "a gift" in x["text"] for x in journal.rows("incidents", "wall"))
    journal.close()


async def test_step_by_step(demo: Demo, tmp_path: Path) -> None:
    plan = step_plan(demo.job.s, 120, 7, "taker")
    s = ready(demo, tmp_path, plan)
    async with emulator_process(step_args(plan)) as url:
        told = await run_live(s, url, 45, lambda text: None, drill=True)
    assert told["decisions"] >= 3 and told["missed"] == 0 and told["by_status"].get("filled")


async def test_a_coin_decides_on_an_emulator_only(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="on an emulator only"): await run_live(ready(demo, tmp_path, DrillPlan(1, 60, "none", 5, SYMBOLS)), None, None, drill=True)


async def test_a_venue_that_does_not_answer_is_asked_again(demo: Demo, tmp_path: Path) -> None:
    """A start waits for the venue, and whoever does not want to wait ends it."""
    plan, said = DrillPlan(24, 60, "none", 5, SYMBOLS), []
    s = ready(demo, tmp_path, plan)
    async with emulator_process(plan.emulator_args(plan.begin - 1)) as url:
        async with aiohttp.ClientSession(url) as http, http.post("/emulator/fault?name=http_503&seconds=600&seed=1") as r: assert r.status == 200
        async with living(s, url, said) as task:
            await until(lambda: len(said) >= 1, task, 120)
            assert not task.done()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Retry): await asyncio.wait_for(task, 120)


def test_crash_points_count(monkeypatch: pytest.MonkeyPatch) -> None:
    struck = []
    monkeypatch.setattr(os, "kill", lambda pid, sig: struck.append((pid, sig)))
    at = crashing("kept:2")
    for step in ("kept", "meant", "kept", "kept"): at(step)
    assert struck == [(os.getpid(), signal.SIGKILL)], "at the second, and once"
    assert crashing(None)("kept") is None
    for wrong in ("kept", "kept:0", "nowhere:1"):
        with pytest.raises(BadSetting, match="expected STEP:N"): crashing(wrong)


async def test_a_fall_throws_the_switch(tmp_path: Path) -> None:
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        r.feed.symbols[BTC].price = Observed(100.0, e.clock.now, e.clock.now)
        high = r.memory.account.cash / (1 - r.s.risk.kill_drawdown) + 1
        r.memory.state = replace(r.memory.state, guard=replace(r.memory.state.guard, peak=high))
        await r.watch()
        assert "kill_drawdown" in str(r.switch.why()) and r.stood


async def test_what_comes_too_late_is_missed(tmp_path: Path) -> None:
    """A machine that slept does not make the decision of an hour ago; it says that it was missed, and goes on with the next."""
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        due = r.due
        r.venue.clock.set(due + 2 * r.every + MINUTE)
        made = []
        async def step(at: int) -> None: made.append(at)
        r.step = step
        await r.tend()
        assert made == [due + 2 * r.every] and [x["kind"] for x in r.journal.rows("incidents", "wall")].count("missed") == 2


async def test_frames_that_never_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step mode every frame that was sent must arrive: a stream that loses one ends the run, loudly."""
    from realdeal import live
    monkeypatch.setattr(live, "range", lambda n: iter(range(3)), raising=False)
    async with emulator() as e, runner(tmp_path, e) as r:
        await r.start()
        with pytest.raises(Stop, match="the stream lost some"): await live._arrived(r, r.follower.streams.frames + 1)


async def test_a_reconnect_has_the_books_compared(tmp_path: Path) -> None:
    """Not only once a minute."""
    from realdeal import live
    async with emulator(speed=1.0) as e:
        e.clock.run()
        async with runner(tmp_path, e, rate=1) as r:
            await r.start()
            looked, ended = [], asyncio.Event()
            async def check() -> None: looked.append(1)
            r.reconciler.check = check
            task = asyncio.create_task(live._reconciling(r, ended))
            await asyncio.sleep(0.6)
            assert not looked, "the minute is not over"
            r.follower.streams.reconnects.append(0.1)
            await asyncio.sleep(0.6)
            ended.set()
            await task
            assert looked == [1]
