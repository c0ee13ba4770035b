"""A short soak as a user runs it: interrupted, killed, gone on with, and judged; and one with faults close together."""
import asyncio, json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest
from realdeal import soak
from realdeal.market import BURST
from realdeal.settings import read_settings
from realdeal.soak import Plan, run_soak

REPO = Path(__file__).parent.parent


def begin(folder, *args):
    "The command, begun; it follows the market when its truth grows."
    said = (folder.parent / 'said').open('a')
    return subprocess.Popen([sys.executable, '-m', 'realdeal', 'soak', '--hours', '0.5', '--speed', '120', '--faults', 'none', '--seed', '5', '--folder', str(folder), '--json', *args], cwd=REPO,
        stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE'})


def judged(folder): return json.loads((folder / 'state.json').read_text())['upto'] if (folder / 'state.json').exists() else 0


def until(ready, seconds=60.0):
    limit = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < limit
        time.sleep(.1)


def children(folder):
    "Processes that belong to a soak in `folder`."
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: text = p.read_bytes()
        except OSError: continue
        if str(folder).encode() in text: found.append(int(p.parent.name))
    return found


def test_an_interrupted_and_a_killed_soak_go_on_and_are_judged_whole(tmp_path):
    folder, minute = tmp_path / 'soak', 60_000
    p = begin(folder)
    until(lambda: judged(folder) >= soak.SIMULATED_START + 2 * soak.DAY + 5 * minute)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 75 and 'the same command goes on' in (tmp_path / 'said').read_text() and not (folder / 'soak.json').exists()
    stopped = judged(folder)
    p = begin(folder)
    until(lambda: judged(folder) >= stopped + 5 * minute)
    p.kill()
    p.wait()
    until(lambda: not children(folder), 5)                     # neither market nor follower outlives it
    assert stopped < judged(folder) < stopped + 15 * minute    # it had not begun anew
    told, _ = begin(folder).communicate(timeout=120)
    told = json.loads(told)
    assert told['passed'] and (told['resumed'], told['minutes'], told['crashes'], told['faults']) == (2, told['minutes'], 0, {}) and 40 <= told['minutes'] <= 60, told
    assert told['trades'] > 600 and told == json.loads((folder / 'soak.json').read_text())


async def test_faults_close_together_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, 'CALM', 8.0)
    monkeypatch.setattr(soak, 'GAP', 2.5)
    plan, said = Plan(.6, 60, 'kill,drop,deaf,html_200,disk_full,malformed', 5, ('BTC/USDT', 'ETH/USDT'), bursts=1), []
    assert {p.name for p in plan.schedule()} == {'kill', 'drop', 'deaf', 'html_200', 'disk_full', 'malformed'}
    loop = asyncio.get_running_loop()
    try: told = await run_soak(read_settings(REPO / 'settings.ini', env={}), plan, tmp_path / 'soak', said.append)
    finally:
        for sig in (signal.SIGINT, signal.SIGTERM): loop.remove_signal_handler(sig)
    assert told['passed'], (told['examples'], said)
    assert 60 <= told['minutes'] <= 72 and told['trades'] > BURST and told['memory_mib']['peak'] > 50
    assert {k for k, f in told['faults'].items() if f['bit']} >= {'kill', 'disk_full'} and sum(f['came'] for f in told['faults'].values()) == len(plan.schedule())


@pytest.mark.parametrize('args', [['--hours', '0'], ['--speed', '0'], ['--faults', 'rain'], ['--faults', 'mute', '--hours', '0.2']])
def test_a_plan_that_cannot_be(tmp_path, args):
    p = begin(tmp_path / 'soak', *args)
    assert p.wait(60) == 78


async def test_two_disk_faults_at_once_end(tmp_path):
    follower = soak.FollowerProcess(['ingest'], tmp_path / 'log', print)
    follower.process = await asyncio.create_subprocess_exec('sleep', '30')
    def limit(): return resource.prlimit(follower.process.pid, resource.RLIMIT_FSIZE)[0]
    both = asyncio.gather(follower.suffer('disk_full', .4), follower.suffer('disk_full', .8))
    await asyncio.sleep(.2)
    assert limit() == 0
    await both
    assert limit() == resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    follower.process.kill()
    await follower.process.wait()
