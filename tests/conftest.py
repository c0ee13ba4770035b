"""What is expensive is made once: one interrupted and resumed run of the demo on small data serves all tests that need models, reports or a session."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
REPO = Path(__file__).parent.parent
DEMO = ["demo", "--days", "49", "--test-days", "5", "--reserve-days", "6", "--hours", "2"]


def realdeal(*args: str, home: Path = REPO, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user runs it in `home`."""
    return subprocess.run([sys.executable, "-m", "realdeal", *args], cwd=home, env={**os.environ, **env}, capture_output=True, text=True, timeout=600)


def make_home(folder: Path) -> Path:
    """A user's folder: the settings of the repository and its notebooks."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPO / "settings.ini", folder)
    (folder / "nbs").symlink_to(REPO / "nbs")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path / "home")


@dataclass(frozen=True)
class Demo:
    home: Path
    killed: str  # what the first run said before it was killed in the middle of the training
    resumed: str  # what the second run said
    job: object  # the Job that both ran

    @property
    def data(self) -> Path: return self.home / "data" / "demo"

    @property
    def reports(self) -> Path: return self.home / "reports" / "demo"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`realdeal demo` on 49 days, killed with SIGKILL while it trains, and run again."""
    from realdeal.cli import DEMO as SMALL
    from realdeal.plan import Job
    from realdeal.settings import read_settings

    home = make_home(tmp_path_factory.mktemp("demo"))
    log = home / "killed.log"
    with log.open("w") as out:
        p = subprocess.Popen([sys.executable, "-u", "-m", "realdeal", *DEMO], cwd=home, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + 300
        while "trial 4/" not in log.read_text() and p.poll() is None and time.monotonic() < until: time.sleep(0.1)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    again = realdeal(*DEMO, home=home)
    assert again.returncode == 0, log.read_text()[-2000:] + again.stdout[-3000:] + again.stderr[-3000:]
    s = read_settings(home / "settings.ini", env={}).override(model={**SMALL, "test_days": 5, "reserve_days": 6})
    return Demo(home, log.read_text(), again.stdout, Job(s, "simulated", 49, 2, say=lambda _: None))
