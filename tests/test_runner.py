"""The runner as its owner runs it: processes on the emulator, killed, struck and judged by the venue's books."""
from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
from conftest import REPO, Demo, realdeal

from realdeal import soak
from realdeal.drill import DrillPlan, Drill, live_through, run_crash_points, run_random_kills, step_plan
from realdeal.emulator import emulator_process
from realdeal.settings import Settings, read_settings
from realdeal.store import Journal
from realdeal.types import OrderStatus

SYMBOLS = ("BTC/USDT", "ETH/USDT")
FAULTS = "lost_ack,late_order,reject,partial,cancel_race,user_lost,drop"


def settings(demo: Demo) -> Settings: return read_settings(demo.home / "settings.ini", env={})


async def drilled(demo: Demo, folder: Path, monkeypatch: pytest.MonkeyPatch, **plan):
    monkeypatch.setattr(soak, "CALM", 5.0)
    monkeypatch.setattr(soak, "GAP", 1.5)
    said: list[str] = []
    return await Drill(settings(demo), DrillPlan(2.0, 240, FAULTS, 0, SYMBOLS, kills=1, **plan), folder, said.append).run(), said


async def test_a_drill_on_the_testnet(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, said = await drilled(demo, tmp_path / "drill", monkeypatch, stage="testnet")
    assert told["passed"], (told, said[-5:])
    assert told["orders"] >= 3 and set(told["faults"]) == set(FAULTS.split(",")) and len(told["kills"]) == 1
    assert told["memory_mib"]["peak"] < 400, "two symbols and both models: 320 are usual"
    again = realdeal("report", "--session", "--json", "--settings", str(tmp_path / "drill" / "settings.ini"), home=demo.home)
    assert again.returncode == 0 and json.loads(again.stdout)["parity"]["share"] == 1.0, again.stderr


async def test_a_drill_on_paper(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, said = await drilled(demo, tmp_path / "drill", monkeypatch, stage="paper", execution="taker")
    assert told["passed"] and told["by_status"].get("filled"), (told, said[-5:])


@pytest.mark.parametrize(("execution", "points"), [("taker", ["decided:1", "decided:2", "journalled:1", "after the wire:1", "polled:1"]), ("maker", ["before the wire:1", "kept:2", "before the cancel:1", "meant:1", "meant:40"])])
async def test_killed_at_every_step(demo: Demo, tmp_path: Path, execution, points) -> None:
    told = await run_crash_points(settings(demo), tmp_path, points, 7, execution, lambda text: None)
    assert told["passed"] and told["orders"] >= 3 and told["points"] == [x for x in points if x != "meant:40"], told


async def test_killed_at_random(demo: Demo, tmp_path: Path) -> None:
    told = await run_random_kills(settings(demo), tmp_path, 2, 7, lambda text: None)
    told = await run_random_kills(settings(demo), tmp_path, 4, 7, lambda text: None)
    assert told["passed"] and (told["kills"], told["rounds"]) == (4, 2), told


async def test_a_runner_that_forgets_is_seen(demo: Demo, tmp_path: Path) -> None:
    """The crash test turns red when a restart loses what it knew."""
    s = settings(demo)
    whole = await live_through(s, step_plan(s, 22, 7, "taker"), tmp_path / "whole", lambda text: None)
    assert whole.found.clean and whole.orders
    journal = Journal(next((tmp_path / "whole").rglob("*-testnet.sqlite")))
    journal.db.execute("delete from fills")
    from realdeal.drill import judge
    books = {"orders": [], "refused": [], "duplicates": [], "deals": [{"id": f.trade_id} for f in whole.fills], "opening": {}, "balances": {}}
    assert judge(books, journal.orders(), journal.fills()).fills_missing == len(whole.fills)
    journal.close()


@pytest.mark.parametrize("at", ["nowhere:1", "kept", "kept:0"])
def test_a_step_that_is_none(demo: Demo, at: str) -> None:
    told = realdeal("live", "--drill", "--emulator", "http://127.0.0.1:9", "--crash-at", at, home=demo.home)
    assert told.returncode == 78 and "expected STEP:N" in told.stderr


async def test_a_runner_and_its_owner(demo: Demo, tmp_path: Path) -> None:
    """A second runner on the account refuses; page, signal and resume do what they say; a restart goes on; no secret lies anywhere."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(demo.data / "models", home / "data" / "demo" / "models")
    text = (REPO / "settings.ini").read_text().replace("stage = paper", "stage = testnet").replace("band = 0.05", "band = 0.0")
    (home / "settings.ini").write_text(text)
    plan = DrillPlan(24, 120, "none", 5, SYMBOLS)
    async with emulator_process(plan.emulator_args(plan.begin - 1)) as url:
        args = [sys.executable, "-m", "realdeal", "live", "--drill", "--emulator", url, "--json"]
        first = await asyncio.create_subprocess_exec(*args, "--port", "0", cwd=home, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "REALDEAL_NOTIFY": "json://127.0.0.1:9/planted-secret"})
        lines = [await asyncio.wait_for(first.stderr.readline(), 60)]
        while not lines[-1].startswith(b"stage "): lines.append(await asyncio.wait_for(first.stderr.readline(), 60))
        page = next(x for x in lines if x.startswith(b"page: ")).decode().split()[1]
        address, token = page.split("#token=")

        second = await asyncio.to_thread(subprocess.run, args, cwd=home, capture_output=True, text=True, timeout=60)
        assert second.returncode == 77 and "another runner trades on this account" in second.stderr

        async with aiohttp.ClientSession() as http:
            async def state():
                async with http.get(f"{address}state", headers={"X-Realdeal-Token": token}) as r: return await r.json()
            seen = await state()
            assert seen["stage"] == "testnet" and seen["source"] == "simulated" and len(seen["feeds"]) == 2 and seen["killed"] is None
            async with http.get(f"{address}metrics") as r: assert "realdeal_equity" in await r.text()
            async def when(true):
                until = time.monotonic() + 60
                while not true(seen := await state()):
                    assert time.monotonic() < until, seen
                    await asyncio.sleep(0.1)
                return seen
            await when(lambda seen: seen["counts"]["orders"])
            first.send_signal(signal.SIGUSR1)
            seen = await when(lambda seen: seen["killed"] and any(x["kind"] == "stood down" for x in seen["incidents"]))
            assert seen["killed"] == "signal SIGUSR1" and seen["orders"] == []
            async with http.get(f"{address}healthz") as r: assert r.status == 503
            told = await asyncio.to_thread(realdeal, "resume", "--why", "a test", home=home)
            assert told.returncode == 0 and "testnet" in told.stdout and (await state())["killed"] is None
            async with http.post(f"{address}kill", json={"reason": "the button", "flatten": True}, headers={"X-Realdeal-Token": token}) as r: assert r.status == 200, await r.text()
            await when(lambda seen: not any(p["amount"] for p in seen["positions"]) and not seen["orders"])
        first.send_signal(signal.SIGTERM)
        out, _ = await asyncio.wait_for(first.communicate(), 60)
        assert first.returncode == 0 and json.loads(out)["failed_orders"] == 0
        async with aiohttp.ClientSession(url) as http:
            async with http.get("/emulator/books?account=emulator-main") as r: books = await r.json()
        assert books["duplicates"] == [] and float(books["balances"]["BTC"]["free"]) < 1e-5 and float(books["balances"]["ETH"]["free"]) < 1e-4
    journal = Journal(next((home / "data").rglob("*-testnet.sqlite")))
    assert {o.status for o in journal.orders().values()} <= {OrderStatus.FILLED, OrderStatus.CANCELED, OrderStatus.HELD}
    journal.close()
    from realdeal.wire import client_options
    secrets = [client_options(url)["secret"], token, "planted-secret"]
    for file in (x for x in home.rglob("*") if x.is_file() and x.name != "token"):
        for planted in secrets: assert planted.encode() not in file.read_bytes(), (file, planted)


def test_stages_are_told(demo: Demo, home: Path) -> None:
    shutil.copytree(demo.data / "models", home / "data" / "models")
    told = realdeal("stage", "--json", home=home)
    assert told.returncode == 0, told.stderr
    missing = json.loads(told.stdout)["missing"]
    assert missing["paper"] == [] and missing["testnet"] == [] and any("48 hours" in x for x in missing["live"]) and any("armed" in x for x in missing["live"])
    assert realdeal("stage", home=home, REALDEAL_LIVE_STAGE="live").returncode == 78
    assert realdeal("kill", "--why", " ", home=home).returncode == 77 and not (home / "data" / "KILL").exists()
    assert realdeal("kill", "--why", "now", home=home).returncode == 0 and (home / "data" / "KILL").exists()
    assert json.loads(realdeal("stage", "--json", home=home).stdout)["killed"] == "now"
    assert realdeal("resume", "--why", " ", home=home).returncode == 77 and (home / "data" / "KILL").exists()
    assert realdeal("adopt", "--why", "mine", home=home).returncode == 66


@pytest.mark.parametrize(("stage", "why"), [("testnet", "mexc has no testnet"), ("live", "0.0 of 48 hours")])
def test_a_stage_is_refused_before_the_venue_is_asked(home: Path, stage: str, why: str) -> None:
    """Nothing in the refusal needs the venue, which no machine of a test reaches."""
    shutil.copytree(REPO / "data" / "models", home / "data" / "models")
    (home / "settings.ini").write_text((REPO / "settings.ini").read_text().replace("stage = paper", f"stage = {stage}"))
    told = realdeal("live", home=home)
    assert told.returncode == 77 and why in told.stderr, told.stderr


async def test_who_asks_twice_ends_it_at_once(demo: Demo, tmp_path: Path) -> None:
    """The venue is gone: the first signal waits for what can be settled, the second waits for nothing; no signed address is told."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(demo.data / "models", home / "data" / "demo" / "models")
    (home / "settings.ini").write_text((REPO / "settings.ini").read_text().replace("stage = paper", "stage = testnet"))
    plan = DrillPlan(24, 60, "none", 5, SYMBOLS)
    async with emulator_process(plan.emulator_args(plan.begin - 1)) as url:
        p = await asyncio.create_subprocess_exec(sys.executable, "-m", "realdeal", "live", "--emulator", url, "--json", cwd=home, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
        lines = [await asyncio.wait_for(p.stderr.readline(), 60)]
        while not lines[-1].startswith(b"stage "): lines.append(await asyncio.wait_for(p.stderr.readline(), 60))
    await asyncio.sleep(6)
    p.send_signal(signal.SIGINT)
    await asyncio.sleep(1)
    p.send_signal(signal.SIGINT)
    _, told = await asyncio.wait_for(p.communicate(), 10)
    assert p.returncode == 130 and b"once more ends at once" in told and b"signature=" not in told and b"Traceback" not in told, told[-2000:]
