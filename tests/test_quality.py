"""`realdeal quality`: a page for each symbol, from a followed store, from one in which every kind of minute occurs, and from a plain backfill."""
from __future__ import annotations

import asyncio
import html
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from conftest import REPO, make_home, realdeal
from test_reports import CHROMIUM, console

from realdeal import pages
from realdeal.emulator import serve
from realdeal.ingest import Follower, open_market
from realdeal.market import SIMULATED_START, generate
from realdeal.provenance import places
from realdeal.quality import STATES, Quality, example, quality
from realdeal.settings import Settings, read_settings
from realdeal.store import Store, StoreKey
from realdeal.types import DAY, MINUTE, Bar, Minute

DAYS = 10


@dataclass(frozen=True)
class Made:
    page: Path
    figures: Quality  # of the same minutes, computed here

    @property
    def html(self) -> str: return self.page.read_text()

    @property
    def text(self) -> str: return self.page.with_suffix(".md").read_text()


def opened(home: Path, market: str) -> tuple[Settings, Store]:
    s = read_settings(home / "settings.ini", env={})
    return s, Store(places(s, "simulated").store, StoreKey(source="simulated", venue="emulator", market=market))


def made(home: Path, market: str, symbol: str) -> Made:
    s, store = opened(home, market)
    candles = store.read(symbol, 0, 2**62)
    start, end = candles["time"][0], candles["time"][-1] + MINUTE
    return Made(places(s, "simulated").reports / "quality" / f"{symbol.replace('/', '')}.html", quality(candles, store.read_evidence(symbol, start, end), start, end))


def minutes(candles: pl.DataFrame, evidence: pl.DataFrame) -> list[Minute]:
    """Rows of the store as what the feed hands over."""
    bars = {r["time"]: Bar(**r) for r in candles.iter_rows(named=True)}
    def built(r: dict) -> Bar: return Bar(r["time"], *(r[f"built_{x}"] for x in ("open", "high", "low", "close", "volume")))
    return [Minute("BTC/USDT", bars[r["time"]], (), built(r), r["proof"], r["cause"], r["lag"], r["known"]) for r in evidence.iter_rows(named=True)]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """BTC with every kind of minute, ETH as a backfill leaves it: one store, one command."""
    home = make_home(tmp_path_factory.mktemp("every") / "home")
    _, store = opened(home, "null-7")
    candles, evidence = example(SIMULATED_START, DAYS)
    store.write("BTC/USDT", candles)
    store.keep(minutes(candles, evidence), trades=False)
    store.write("ETH/USDT", candles.filter(pl.col("time") < SIMULATED_START + 2 * DAY).with_columns(origin=pl.lit("backfilled")))
    done = realdeal("quality", "--source", "simulated", "--market", "null", "--days", "30", home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report 2/2: " in done.stdout and "reports/demo/quality/BTCUSDT.html" in done.stdout
    assert not (home / "reports" / "quality").exists(), "simulated pages live apart"
    return {x: made(home, "null-7", f"{x}/USDT") for x in ("BTC", "ETH")}


def pictures(page: str) -> list[str]:
    return [html.unescape(x) for x in re.findall(r'<img alt="([^"]*)" src="data:image/svg', page)]


def test_every_kind_of_minute_is_on_the_page(every: dict[str, Made]) -> None:
    page, q = every["BTC"].html, every["BTC"].figures
    assert all(q.count(x) for x in STATES) and q.count("missing") == 37
    assert pages.check_offline(page, "quality") and page.index("SIMULATED") < page.index("<strong>Usable, with care.</strong>") < page.index("Minutes known") < page.index("<figure>")
    calendar, gaps, latency = pictures(page)
    assert "37 missing. Of 240 hours 1 lacks a minute" in calendar and gaps.startswith("Most minutes: closed ") and "trade to receipt: half within" in latency
    text = every["BTC"].text
    assert f"**37 of {DAYS * 1440:,} minutes missing**" in text and f"| followed | {q.followed:,} | 100 % |" in text and f"| the same | {q.exact:,} | " in text
    for r in q.gaps.iter_rows(named=True): assert f"| {r['cause']} | {r['minutes']:,} | {r['stretches']:,} | {r['longest']:,} |" in text
    [hole] = q.stretches.filter(pl.col("missing") > 0).iter_rows(named=True)
    assert hole["minutes"] == 37 and re.search(r"\| from \| until \| minutes \|\n.*\n\| 2024-01-06 00:00 UTC \| 2024-01-06 00:37 UTC \| 37 \|", text)
    assert "import " not in page and "Traceback" not in page and "Warning" not in page and "<script" not in page


def test_a_backfill_has_a_page_that_claims_nothing(every: dict[str, Made]) -> None:
    text = every["ETH"].text
    assert "no trade proves these candles" in text and "- **Trades make the candle** –: not judged (no minute was followed live)" in text
    assert f"**{8 * DAY // MINUTE:,} of {10 * DAY // MINUTE:,} minutes missing**" in text, "the other symbol went on: this one stopped"
    assert len(pictures(every["ETH"].html)) == 2 and "Nothing was followed into this store." in text


async def test_a_followed_store_has_its_page(tmp_path: Path) -> None:
    """The feed on an emulator that breaks its connection and swallows trades; then the command, while the emulator still answers."""
    home = make_home(tmp_path / "home")
    ini = home / "settings.ini"
    ini.write_text(ini.read_text().replace("symbols = BTC/USDT, ETH/USDT", "symbols = BTC/USDT"))
    s = read_settings(ini, env={}).override(data={"close_grace_ms": 20_000, "time_sync": 1, "verify_every": 10})
    async with serve(histories=generate("null", ["BTC/USDT"], SIMULATED_START, 180, seed=7), now=SIMULATED_START + 30 * MINUTE, seed=7, speed=240, name="null-7") as e:
        async with open_market(s, e.url) as market:
            follower, stop = Follower(market.venue, opened(home, "null-7")[1], s, say=lambda _: None), asyncio.Event()
            follower.begin()
            await follower.streams.open()
            running = asyncio.create_task(follower.run(stop))
            await asyncio.sleep(1)
            e.fault("drop")
            await asyncio.sleep(1)
            e.fault("deaf", seconds=1)
            await asyncio.sleep(2)
            await e.clock.pause()
            stop.set()
            await running
        command = await asyncio.create_subprocess_exec(sys.executable, "-m", "realdeal", "quality", "--emulator", e.url, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = (await asyncio.wait_for(command.communicate(), 60))[0].decode()
    assert command.returncode == 0, said
    x = made(home, "null-7", "BTC/USDT")
    q, text, told = x.figures, x.text, follower.ledger()
    assert q.count("missing") == 0 and q.count("rest") > 0 and q.followed == q.exact == told["minutes"] and pages.check_offline(x.html, "quality")
    assert f"all {q.total} minutes known" in text and "- **Minutes known** 100 %: good" in text and "- **Trades make the candle** 100 %: good" in text
    assert "not judged (half within" in text and "market time of an emulator" in text, "its delays are as long as its speed makes them"
    received = told["symbols"]["BTC/USDT"]["received"]
    assert "| runs | 1, " in text and f"trades {received['trades']:,}" in text and "| minutes that the last run left open | 0 |" in text
    assert len(pictures(x.html)) == 3
    if CHROMIUM: assert console(x.page, tmp_path / "profile")[0] == []


def test_by_hand_from_the_key_of_a_store(every: dict[str, Made]) -> None:
    """papermill with the folder of a store and its key: the span is what it holds, the provenance is made from the settings it finds."""
    home = every["ETH"].page.parents[3]
    s, store = opened(home, "null-7")
    page = pages.execute_report(REPO / "nbs/reports/quality.ipynb", home / "reports/demo/mine.html", {"store": store.root, "market": "null-7", "symbol": "ETH/USDT"}, s, "simulated", text=True)
    text = page.with_suffix(".md").read_text()
    assert f"all {2 * 1440:,} minutes known" in text and f"| data hash | {store.data_hash(['ETH/USDT'], SIMULATED_START, SIMULATED_START + 2 * DAY)} |" in text and s.hash in text


def test_bad_input(home: Path) -> None:
    """One sentence and the right exit code, and no page."""
    asked = {("--source", "simulated", "--symbol", "XRP/USDT"): (78, "--symbol XRP/USDT: not one of BTC/USDT, ETH/USDT"), ("--source", "simulated"): (66, "no minute of BTC/USDT; bring some with `realdeal ingest`"),
        ("--emulator", "http://127.0.0.1:9"): (75, "no emulator answers"), ("--days", "0"): (2, "--days")}
    runs = [subprocess.Popen([sys.executable, "-m", "realdeal", "quality", *args], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"}) for args in asked]
    for run, (code, words) in zip(runs, asked.values(), strict=True):
        said = run.communicate(timeout=60)[0]
        assert run.returncode == code and words in said and "Traceback" not in said, said
    assert not (home / "reports").exists()
