"""The gate: green as committed, and red when strategy, accounting or fills get worse. Each fault is planted in a copy of the package and judged by the command."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = {
    "strategy: it holds for a quarter of its horizon": ("decide.py", "snap.time + s.strategy.horizon * MINUTE", "snap.time + s.strategy.horizon * MINUTE // 4"),
    "accounting: fees are not taken from the cash": ("types.py", "== self.base else self.fee)", "== self.base else 0.0)"),
    "fills: the spread is earned instead of paid": ("fills.py", "m.open * (1.0 + sign *", "m.open * (1.0 - sign *"),
    "fills: whoever rests is filled": ("fills.py", "return m.low < price * (1.0 - t.margin) if sign > 0 else m.high > price * (1.0 + t.margin)", "return True"),
    "funding is never paid": ("backtest.py", "    if not held: return account\n", "    return account\n"),
    "figures: a year has 3,650 days": ("performance.py", "YEAR, DUST = 365,", "YEAR, DUST = 3650,"),
}


def gate(home: Path, package: Path) -> subprocess.CompletedProcess[str]:
    """The command on `package`, with the committed baseline and settings in `home`."""
    (home / "reports").mkdir()
    shutil.copy(ROOT / "settings.ini", home)
    shutil.copy(ROOT / "reports/baseline.json", home / "reports")
    env = {k: v for k, v in os.environ.items() if not k.startswith("REALDEAL_")} | {"PYTHONPATH": str(package)}
    return subprocess.run([sys.executable, "-m", "realdeal", "kpi", "--gate", "--json", "--settings", str(home / "settings.ini")], capture_output=True, text=True, cwd=home, env=env)


def test_green_as_committed(tmp_path: Path) -> None:
    got = gate(tmp_path, ROOT)
    assert got.returncode == 0 and json.loads(got.stdout) == {"embedded": [], "embedded perpetual": []}, got.stdout + got.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_red_when_it_gets_worse(fault: str, tmp_path: Path) -> None:
    file, right, wrong = FAULTS[fault]
    shutil.copytree(ROOT / "realdeal", tmp_path / "package/realdeal", ignore=shutil.ignore_patterns("__pycache__"))
    code = tmp_path / "package/realdeal" / file
    assert code.read_text().count(right) == 1
    code.write_text(code.read_text().replace(right, wrong))
    (tmp_path / "home").mkdir()
    got = gate(tmp_path / "home", tmp_path / "package")
    if fault.startswith("accounting"): assert got.returncode == 65 and "the accounts of the fold and of vectorbt differ" in got.stderr      # it does not even come to figures
    else: assert got.returncode == 1 and "changed" in got.stdout
    if fault.startswith("strategy"): assert "worse by" in got.stdout
