"""What is seen of a runner from outside, and that nobody but the operator touches it: raw requests, a hostile page, a real browser."""
from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import os
import re
import shutil
import socket
import stat
import threading
import time
from pathlib import Path
from urllib.parse import quote

import aiohttp
import pytest
import yaml
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from test_architecture import HEAVY, loaded_by

from realdeal import view
from realdeal.types import Refused, Rejected
from realdeal.view import Latency, Log, Page, Redact, RunnerMetrics, example_seen, notify, plain, read_token, terminal, thin, unwell

REPO = Path(__file__).parent.parent
PLANTED = "pl4nted-s3cret"


class Runner:
    """A runner that is seen, and whose kill switch remembers who threw it."""

    def __init__(self) -> None: self.seen, self.kills, self.hold, self.error = dict(example_seen()), [], 0.0, None

    async def kill(self, reason: str, flatten: bool) -> dict[str, int]:
        await asyncio.sleep(self.hold)
        if self.error: raise self.error
        self.kills.append((reason, flatten))
        self.seen["killed"] = reason
        return {"cancelled": 1}


@pytest.fixture
async def served(tmp_path):
    """(runner, page, its address without the token)."""
    runner = Runner()
    page = Page(lambda: runner.seen, runner.kill, tmp_path / "token", [RunnerMetrics(lambda: runner.seen)])
    url = await page.start()
    yield runner, page, url.split("/#")[0]
    await page.stop()


async def ask(page: Page, url: str, method: str, path: str, token: str | None = "own", **more):
    headers = {**({"X-Realdeal-Token": page.token if token == "own" else token} if token is not None else {}), **more.pop("headers", {})}
    async with aiohttp.ClientSession() as c, c.request(method, url + path, headers=headers, **more) as r: return r.status, await r.text(), r.headers


async def raw(page: Page, *lines: str, body: str = "") -> int:
    """The status of a request, byte by byte."""
    reader, writer = await asyncio.open_connection(*page.hosts[0].split(":"))
    writer.write("\r\n".join([*lines, f"Content-Length: {len(body)}", "", body]).encode("latin-1"))
    status = (await reader.readline()).split()[1]
    writer.close()
    return int(status)


# The gate

KILL = {"json": {"reason": "drill", "flatten": True}}


async def test_the_operators_own_page_may(served):
    runner, page, url = served
    assert (await ask(page, url, "GET", "/state"))[0] == 200
    assert (await ask(page, url, "POST", "/kill", headers={"Origin": url}, **KILL))[0] == 200
    assert (await ask(page, url.replace("127.0.0.1", "localhost"), "POST", "/kill", **KILL))[0] == 200
    assert runner.kills == [("drill", True)] * 2


@pytest.mark.parametrize(("status", "method", "path", "more"), [
    (401, "GET", "/state", {"token": None}),
    (401, "POST", "/kill", {"token": None, **KILL}),
    (401, "POST", "/kill", {"token": "", **KILL}),
    (401, "POST", "/kill", {"token": "x" * 43, **KILL}),
    (403, "POST", "/kill", {"headers": {"Host": "evil.example"}, **KILL}),
    (403, "GET", "/", {"headers": {"Host": "127.0.0.1"}}),
    (403, "GET", "/metrics", {"headers": {"Host": "evil.example"}}),
    (403, "GET", "/healthz", {"headers": {"Host": "evil.example"}}),
    (403, "POST", "/kill", {"headers": {"Origin": "http://evil.example"}, **KILL}),
    (403, "POST", "/kill", {"headers": {"Origin": "null"}, **KILL}),
    (403, "GET", "/state", {"headers": {"Origin": "http://127.0.0.1:1"}}),
    (415, "POST", "/kill", {"data": json.dumps(KILL["json"]), "headers": {"Content-Type": "text/plain"}}),
    (415, "POST", "/kill", {"data": KILL["json"]["reason"], "headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
    (404, "GET", "/kill", {}),
    (404, "PUT", "/kill", KILL),
    (404, "OPTIONS", "/kill", {"headers": {"Access-Control-Request-Method": "POST"}}),
    (404, "POST", "/state", KILL),
    (404, "GET", "/../token", {}),
    (413, "POST", "/kill", {"json": {"reason": "x" * 9000, "flatten": False}}),
    *[(400, "POST", "/kill", {"json": bad}) for bad in ([], {"reason": "x"}, {"reason": "", "flatten": False}, {"reason": "x" * 201, "flatten": False}, {"reason": "x", "flatten": "no"}, {"reason": None, "flatten": False}, {"reason": "x", "flatten": False, "more": 1})],
    (400, "POST", "/kill", {"data": "{", "headers": {"Content-Type": "application/json"}}),
    (400, "POST", "/kill", {"data": "[" * 4000, "headers": {"Content-Type": "application/json"}}),
    (400, "POST", "/kill", {"data": "{}", "headers": {"Content-Type": "application/json; charset=nonsense"}}),
])
async def test_everything_else_is_refused(served, status, method, path, more):
    runner, page, url = served
    got, text, headers = await ask(page, url, method, path, **more)
    assert got == status and runner.kills == [] and "error" in json.loads(text)
    assert not [h for h in headers if h.lower().startswith("access-control")] and page.token not in text


async def test_odd_requests_are_refused(served):
    runner, page, _ = served
    own = [f"Host: {page.hosts[0]}", f"X-Realdeal-Token: {page.token}", "Content-Type: application/json"]
    body = json.dumps(KILL["json"])
    assert await raw(page, "POST /kill HTTP/1.0", *own[1:], body=body) == 403
    assert await raw(page, "POST /kill HTTP/1.1", own[0], "Host: evil.example", *own[1:], body=body) in (400, 403)
    assert await raw(page, "POST /kill HTTP/1.1", *own, "Origin: http://" + page.hosts[0], "Origin: http://evil.example", body=body) in (400, 403)
    assert await raw(page, "POST /kill HTTP/1.1", own[0], own[2], "X-Realdeal-Token: \xff\xfe", body=body) == 401
    assert runner.kills == []
    assert await raw(page, "POST /kill HTTP/1.1", *own, body=body) == 200 and len(runner.kills) == 1      # the same without the oddity passes


async def test_headers_stand_on_every_answer(served):
    _, page, url = served
    for path in ("/", "/state", "/healthz", "/metrics", "/nothing"):
        _, text, headers = await ask(page, url, "GET", path)
        assert headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert "unsafe" not in headers["Content-Security-Policy"] and "default-src 'none'" in headers["Content-Security-Policy"] and "aiohttp" not in headers["Server"]
    page_text = (await ask(page, url, "GET", "/", token=None))[1]
    assert not re.search(r"(?:src|href|action)=(?!\"data:,\")|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page_text) and page.token not in page_text


async def test_it_listens_on_loopback_alone(served):
    assert {a[0] for a in served[1]._runner.addresses} == {"127.0.0.1"}


# What it says

async def test_state_is_json_whatever_is_seen(served):
    runner, page, url = served
    runner.seen |= {"equity": math.nan, "drawdown": math.inf, "curve": [[i, math.nan if i == 5 else -i] for i in range(5000)]}
    told = json.loads((await ask(page, url, "GET", "/state"))[1], parse_constant=lambda x: pytest.fail(x))
    assert told["equity"] is None and told["drawdown"] is None and len(told["curve"]) <= 401 and told["curve"][-1] == [4999, -4999]
    runner.seen = {k: None for k in runner.seen}
    told = json.loads((await ask(page, url, "GET", "/state"))[1])
    assert told["feeds"] is None and told["unwell"] == ["no decision is planned yet", "no feed is open yet"]


async def test_health(served):
    runner, page, url = served
    assert (await ask(page, url, "GET", "/healthz", token=None))[:2] == (200, '{"ok": true, "why": []}')
    for change, why in (({"killed": "drill"}, "killed: drill"), ({"next": runner.seen["time"] - 61_000}, "overdue by 61 s"), ({"feeds": [runner.seen["feeds"][0] | {"age_ms": 121_000}]}, "BTC/USDT: the last price is 121 s old")):
        before, runner.seen = runner.seen, runner.seen | change
        status, text, _ = await ask(page, url, "GET", "/healthz", token=None)
        assert status == 503 and len(json.loads(text)["why"]) == 1 and why in text
        runner.seen = before


async def test_a_fault_tells_its_kind_and_no_secret(served):
    runner, page, url = served
    runner.error = ValueError(PLANTED)
    status, text, _ = await ask(page, url, "POST", "/kill", **KILL)
    assert status == 500 and "the kill switch failed: ValueError" in text and PLANTED not in text
    runner.error = Rejected("the venue cancels nothing")
    assert (await ask(page, url, "POST", "/kill", **KILL))[:2] == (500, '{"error": "the venue cancels nothing"}')
    def broken(): raise ValueError(PLANTED)
    page.seen = broken
    for path in ("/state", "/healthz"):
        status, text, _ = await ask(page, url, "GET", path)
        assert status == 503 and "cannot be read: ValueError" in text and PLANTED not in text


@pytest.mark.parametrize("patience", [0.1, None], ids=["the browser leaves", "the page stops"])
async def test_a_kill_that_has_begun_is_carried_out(served, patience):
    runner, page, url = served
    runner.hold = 1.5
    asking = asyncio.create_task(ask(page, url, "POST", "/kill", timeout=aiohttp.ClientTimeout(total=patience), **KILL))
    await asyncio.sleep(0.3)
    await page.stop()
    assert runner.kills == [("drill", True)]
    await asyncio.gather(asking, return_exceptions=True)


# The token

def test_token_files_that_are_not_safe_are_refused(tmp_path):
    for name, why in (("fifo", "not a file"), ("folder", "not a file|directory"), ("short", "holds no token"), ("bytes", "not text")):
        file = tmp_path / name
        if name == "fifo": os.mkfifo(file, 0o600)
        elif name == "folder": file.mkdir(0o700)
        else: file.write_bytes(b"abc" if name == "short" else b"\xff" * 43); file.chmod(0o600)
        with pytest.raises(Refused, match=why): read_token(file)
    read_token(tmp_path / "own")
    for mode in (0o604, 0o640, 0o620, 0o602):
        (tmp_path / "own").chmod(mode)
        with pytest.raises(Refused, match="others can read it"): read_token(tmp_path / "own")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_anothers_token_file_is_refused(tmp_path):
    read_token(tmp_path / "token")
    os.chown(tmp_path / "token", 65534, 65534)
    with pytest.raises(Refused, match="not owned by this user"): read_token(tmp_path / "token")


def test_who_starts_at_the_same_time_has_the_same_token(tmp_path):
    old, found = os.umask(0), []
    try:
        threads = [threading.Thread(target=lambda: found.append(read_token(tmp_path / "new" / "token"))) for _ in range(16)]
        for t in threads: t.start()
        for t in threads: t.join()
    finally: os.umask(old)
    assert len(found) == 16 and len(set(found)) == 1 and stat.S_IMODE((tmp_path / "new/token").stat().st_mode) == 0o600 and len(list((tmp_path / "new").iterdir())) == 1


# A browser

CHROMIUM = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


class Browser:
    """A headless Chromium that is driven through its own debugging port; `said`: what its console complained about."""

    def __init__(self, profile: Path): self.profile, self.said, self.n = profile, [], 0

    async def __aenter__(self):
        self.process = await asyncio.create_subprocess_exec(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
            "--remote-debugging-port=0", f"--user-data-dir={self.profile}", "--window-size=1180,1160", "about:blank", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
        port = self.profile / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not port.exists() or not port.read_text(): await asyncio.sleep(0.05)  # noqa: ASYNC110
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{port.read_text().split()[0]}")
        async with self.http.get("/json/list") as r: tab = next(t for t in await r.json() if t["type"] == "page")
        self.socket = await self.http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        for x in ("Runtime", "Log", "Page"): await self.call(f"{x}.enable")
        return self

    async def __aexit__(self, *_):
        await self.http.close()
        self.process.terminate()
        await self.process.wait()

    async def call(self, method: str, **params):
        self.n += 1
        await self.socket.send_json({"id": self.n, "method": method, "params": params})
        async with asyncio.timeout(60):
            while True:
                got = await self.socket.receive_json()
                if got.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") or (got.get("method") == "Runtime.consoleAPICalled" and got["params"]["type"] in ("error", "warning", "assert")): self.said.append(got["params"])
                if got.get("id") == self.n: return got["result"]

    async def js(self, code: str):
        got = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    async def until(self, code: str, seconds: float = 20):
        end = time.monotonic() + seconds
        while not (got := await self.js(code)):
            assert time.monotonic() < end, f"{code}: {await self.js('document.body.innerText')}"
            await asyncio.sleep(0.05)
        return got

    async def open(self, url: str):
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def picture(self) -> bytes: return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


def picture_file(folder: Path) -> Path: return Path(os.environ.get("SCREENSHOTS", folder)).resolve() / "runner.png"


def shown(id_: str) -> str: return f"document.getElementById('{id_}').checkVisibility() && document.getElementById('{id_}').innerText"


@needs_browser
async def test_an_operator_looks_kills_and_is_told_when_it_is_gone(served, tmp_path):
    runner, page, url = served
    hostile = "<img src=x onerror=alert(1)>"
    runner.seen["positions"][1]["reason"] = hostile
    async with Browser(tmp_path / "profile") as b:
        await b.open(f"{url}/#token={page.token}")
        body = await b.until("document.getElementById('tiles').innerText.includes('Equity') && document.body.innerText")
        assert f"{runner.seen['equity']:,.2f}" in body and "0.0412" in body and "rd-5f0c1a9e27b84d36" in body and hostile in body and "in 10:48" in body
        assert await b.js("location.href") == f"{url}/" and await b.js("history.length") <= 3 and page.token not in await b.js("document.documentElement.outerHTML")
        assert "nothing about money" in await b.js(shown("simulated")) and (await b.js("document.title")).startswith("SIMULATED")
        assert len((await b.js("document.querySelector('#curve polyline').getAttribute('points')")).split()) == 384 and await b.js("document.images.length") == 0

        await b.js("document.getElementById('kill').click()")
        assert await b.js("document.getElementById('sure').disabled") and runner.kills == []           # no kill without a reason
        await b.call("Input.insertText", text="drill: a look at the button")
        await b.js("document.getElementById('cancel').click()")
        assert runner.kills == [] and not await b.js("document.getElementById('ask').open")
        await b.js("document.getElementById('kill').click()")
        await b.call("Input.insertText", text="drill: a look at the button")
        await b.js("document.getElementById('sure').click()")
        assert "drill: a look at the button" in await b.until(shown("killed"))
        assert runner.kills == [("drill: a look at the button", False)] and not await b.js("document.getElementById('ask').open")

        runner.seen |= {"source": "exchange", "equity": 4321.0, "killed": None, "next": runner.seen["time"] - 90_000}
        await b.until("document.body.innerText.includes('4,321.00')")                                # it looks again by itself
        assert not await b.js(shown("simulated")) and "overdue by 90 s" in await b.js(shown("ails"))
        runner.seen = {k: None for k in runner.seen}
        await b.until("document.getElementById('tiles').innerText.includes('–') && document.getElementById('range').innerText.includes('not enough')")
        assert b.said == []
        await page.stop()
        assert "does not answer since" in await b.until(shown("silent")) and await b.js("document.body.className") == "old" and await b.js("document.getElementById('health').textContent") == "silent"


@needs_browser
async def test_a_kill_that_fails_is_not_called_done(served, tmp_path):
    runner, page, url = served
    runner.error = Rejected("the venue cancels nothing")
    async with Browser(tmp_path / "profile") as b:
        await b.open(f"{url}/#token={page.token}")
        await b.until("document.getElementById('tiles').innerText")
        await b.js("document.getElementById('kill').click()")
        await b.call("Input.insertText", text="now")
        await b.js("document.getElementById('flatten').click(); document.getElementById('sure').click()")
        assert await b.until("document.getElementById('answer').className === 'bad' && document.getElementById('answer').innerText") == "NOT confirmed: the venue cancels nothing"
        runner.error = None
        await b.js("document.getElementById('sure').click()")
        await b.until("!document.getElementById('ask').open")
        assert runner.kills == [("now", True)]


@needs_browser
async def test_another_page_in_the_same_browser_can_do_nothing(served, tmp_path):
    runner, page, url = served
    async def evil(_): return web.Response(text="<p>evil</p>", content_type="text/html")
    app = web.Application()
    app.router.add_get("/", evil)
    other = web.AppRunner(app)
    await other.setup()
    await web.TCPSite(other, "127.0.0.1", 0).start()
    async with Browser(tmp_path / "profile") as b:
        await b.open(f"{url}/")
        assert "no token" in await b.until(shown("silent"))
        await b.open(f"http://127.0.0.1:{other.addresses[0][1]}/")
        attack = "fetch('%s/kill', {method: 'POST', mode: '%s', headers: {'Content-Type': '%s'}, body: '{\"reason\": \"evil\", \"flatten\": true}'}).then(r => r.type + r.status, () => 'refused')"
        assert [await b.js(attack % (url, mode, kind)) for mode, kind in (("no-cors", "text/plain"), ("cors", "text/plain"), ("cors", "application/json"))] == ["refused"] * 3
        assert await b.js(f"fetch('{url}/healthz').then(r => r.status, () => 'refused')") == "refused" and runner.kills == []
    await other.cleanup()


@needs_browser
async def test_the_page_is_photographed(served, tmp_path):
    "SCREENSHOTS=docs makes the picture that the README shows."
    _, page, url = served
    pictures = {}
    async with Browser(tmp_path / "profile") as b:
        for scheme in ("dark", "light"):
            await b.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            await b.open(f"{url}/#token={page.token}")
            await b.until("document.getElementById('tiles').innerText")
            pictures[await b.js("getComputedStyle(document.body).backgroundColor")] = last = await b.picture()
        assert len(pictures) == 2 and all(len(p) > 50_000 for p in pictures.values()) and b.said == []
        await b.call("Emulation.setDeviceMetricsOverride", width=380, height=800, deviceScaleFactor=1, mobile=True)
        assert await b.js("document.documentElement.scrollWidth") <= 380                              # nothing sticks out on a phone
    picture_file(tmp_path).write_bytes(last)


# The terminal

def test_the_terminal_shows_what_there_is():
    import io

    from rich.console import Console
    seen = example_seen()
    def screen(**change):
        c = Console(width=120, record=True, file=io.StringIO())
        c.print(terminal({**seen, **change}))
        return c.export_text()
    text = screen()
    for told in ("SIMULATED", "PAPER", f"{seen['equity']:,.2f}", "0.0412", "62,418.30", "rd-5f0c1a9e27b84d36", "0.08 of 0.22", "in 10:48", "armed", "10.00 %", "closed", "renewed"): assert told in text
    assert "killed: drill" in screen(killed="drill") and "armed" not in screen(killed="drill") and "1:30 overdue" in screen(next=seen["time"] - 90_000)
    assert "positions: none" in screen(positions=[]) and "SIMULATED" not in screen(source="recorded")


# Metrics and alerts

def exported(*collectors) -> str:
    registry = CollectorRegistry()
    for c in collectors: registry.register(c)
    return generate_latest(registry).decode()


def names(text: str) -> set[str]: return set(re.findall(r"^# TYPE (\w+)", text, re.M))


async def test_alerts_watch_metrics_that_exist(tmp_path):
    """Exported by the collectors of a runner themselves."""
    from realdeal.emulator import serve
    from realdeal.ensemble import load_predictor
    from realdeal.ingest import Follower, Metrics, open_market
    from realdeal.live import Forecaster, ModelMetrics
    from realdeal.market import generate
    from realdeal.settings import read_settings
    from realdeal.store import Store
    s, start = read_settings(REPO / "settings.ini", env={}), 1_704_067_200_000
    async with serve(histories=generate("null", s.data.symbols, start, 30, seed=7), funding={}, now=start + 10 * 60_000, seed=7, speed="step", name="null-7") as e, open_market(s, e.url) as market:
        store = Store(tmp_path, market.key)
        forecaster = Forecaster(store, s.data.symbols, load_predictor(REPO / "data" / "models", s))
        there = names(exported(RunnerMetrics(example_seen), Metrics(Follower(market.venue, store, s)), ModelMetrics(forecaster)))
        forecaster.close()
    rules = [r for g in yaml.safe_load((REPO / "docs" / "alerts.yml").read_text())["groups"] for r in g["rules"]]
    watched = {m for r in rules for m in re.findall(r"realdeal_\w+", r["expr"])}
    assert watched <= there, watched - there
    assert all(set(r) <= {"alert", "expr", "for", "labels", "annotations"} and r["labels"]["severity"] in ("page", "warn") for r in rules)
    assert {"realdeal_killed", "realdeal_next_decision_seconds", "realdeal_drawdown", "realdeal_price_age_seconds", "realdeal_orders_open", "realdeal_uptime", "realdeal_drift", "realdeal_minutes_missing"} <= watched


def test_the_tables_name_every_metric():
    latencies = [Latency("decision", "", view.DECISION_MS), Latency("order", "", view.ORDER_MS)]
    there = names(exported(RunnerMetrics(example_seen), *latencies))
    for document in (REPO / "README.md", REPO / "nbs" / "40_view.ipynb"):
        rows = [line for line in document.read_text().splitlines() if re.search(r"\| `realdeal_", line)]
        assert {m for line in rows for m in re.findall(r"`(realdeal_\w+)", line)} == there, document.name


@given(st.lists(st.floats(0, 1e5) | st.integers(0, 5000), max_size=40), st.lists(st.integers(1, 5000), min_size=1, max_size=6, unique=True).map(sorted))
def test_buckets_count_what_they_should(values, edges):
    x = Latency("x", "", edges)
    for v in values: x.add(v)
    (family,) = x.collect()
    told = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert told == {**{str(e / 1000): sum(v <= e for v in values) for e in edges}, "+Inf": len(values)}
    q = x.quantiles()
    assert q["p50"] is None if not values else sum(v <= q["p50"] for v in values) >= len(values) / 2 and sum(v < q["p99"] for v in values) < 0.99 * len(values)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))), max_size=60), st.integers(1, 9))
def test_a_thin_curve_keeps_the_lowest_and_the_last(curve, points):
    whole = [p for p in curve if p[1] is not None and math.isfinite(p[1])]
    few = thin(curve, points)
    assert len(few) <= max(points + 1, len(few) if len(whole) <= points else 0)
    if whole: assert min(p[1] for p in few) == min(p[1] for p in whole) and few[-1] == whole[-1]


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), st.text()), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=12))
def test_plain_is_strict_json(x): json.dumps(plain(x), allow_nan=False)


def test_unwell_knows_every_gap():
    seen = example_seen()
    for missing in ("time", "next", "feeds"): assert unwell({**seen, missing: None})
    assert unwell({**seen, "feeds": [{**seen["feeds"][0], "age_ms": math.nan}]}) and unwell({**seen, "killed": ""})


# Log, secrets, notifications

@given(st.text('ABCÜ09+/="\\ \n', min_size=6, max_size=30), st.text("abc ,.{}", max_size=20), st.text("abc ,.{}", max_size=20))
def test_a_known_secret_is_nowhere(secret, before, after):
    r = Redact([secret, "short", ""])
    for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], base64.b64encode(secret.encode()).decode()):
        assert r.deep({before + form: [before + form + after, {"x": form}]}) == {f"{before}***": [f"{before}***{after}", {"x": "***"}]}


def test_what_is_named_like_a_secret_is_hidden():
    r = Redact()
    for text in (f"signature={PLANTED}&x=1", f'{{"apiKey": "{PLANTED}"}}', f"Authorization: Bearer {PLANTED}", f"X-MEXC-APIKEY: {PLANTED}", f"listenKey={PLANTED}", f"api_secret = '{PLANTED}'", f"X-Realdeal-Token: {PLANTED}"):
        assert PLANTED not in r(text) and "***" in r(text), text
    assert r("the key level of BTC/USDT is 62,000; token sale") == "the key level of BTC/USDT is 62,000; token sale"
    assert r.deep({"password": PLANTED, "apiKeys": [PLANTED], "tokens": 5, "client_id": "rd-1"}) == {"password": "***", "apiKeys": "***", "tokens": 5, "client_id": "rd-1"}


def test_the_log_holds_no_secret_and_ends_nothing(tmp_path):
    log = Log(tmp_path / "log.jsonl", [PLANTED])
    log(f"sent {PLANTED}", "error", why=ValueError(PLANTED), inner=[{"a": f"?k={quote(PLANTED)}"}], path=Path("x"), n=math.inf)
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert PLANTED not in line and json.loads(line)["event"] == "sent ***" and json.loads(line)["n"] is None and json.loads(line)["level"] == "error"
    full = Log(Path("/dev/full"))
    full("lost")
    assert full.lost == 1


async def test_no_secret_is_told_anywhere(served, caplog, capfd):
    """The page's token and the address of a messenger, with every logger of the process at its loudest."""
    caplog.set_level(logging.DEBUG)
    runner, page, url = served
    await ask(page, url, "POST", "/kill", **KILL)
    await ask(page, url, "GET", "/state", token="x" + page.token)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        url = f"json://127.0.0.1:{deaf.getsockname()[1]}/{PLANTED}?rto=60"
        assert not await asyncio.to_thread(lambda: asyncio.run(notify([url], "t", "x", seconds=1.0)))
        assert time.monotonic() - began < 10                      # no thread of a deaf messenger holds the loop's end up
    for bad in (f"json://127.0.0.1:9/{PLANTED}", f"nonsense://{PLANTED}", f"{PLANTED}", f"tgram://{PLANTED}", f"mailto://{PLANTED}:x@[::"): assert not await notify([bad], "t", "x", seconds=3.0), bad
    told = caplog.text + "".join(capfd.readouterr())
    assert PLANTED not in told and page.token not in told


async def test_a_messenger_that_works_gets_it_beside_one_that_does_not():
    got = []
    async def take(request):
        got.append(await request.json())
        return web.Response()
    app = web.Application()
    app.router.add_post("/in", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    good = f"json://127.0.0.1:{runner.addresses[0][1]}/in"
    assert await notify([good], "killed", "drawdown <b>10 %</b>") and not await notify([good, "json://127.0.0.1:9/x", "nonsense"], "killed", "again")
    assert [(m["title"], m["message"]) for m in got] == [("killed", "drawdown <b>10 %</b>"), ("killed", "again")] and await notify([], "t", "x")
    await runner.cleanup()


def test_view_is_light():
    loaded = loaded_by("import realdeal.view")
    assert loaded & {*HEAVY, "apprise", "requests", "prometheus_client"} == set() and not any(m.startswith("realdeal.") and m not in ("realdeal.types", "realdeal.view") for m in loaded)
