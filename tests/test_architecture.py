"""The shape of the house: one direction, pure rooms, a slim runner."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Demo
from test_chapters import CHAPTERS, module_of

REPO = Path(__file__).parent.parent
RANK = {module_of(p): int(p.stem[:2]) for p in CHAPTERS}
PURE = ("types", "provenance", "market", "venue", "wire", "faults", "frames", "feed", "quality", "features", "labels", "splits", "scores", "drift", "sequences", "risk", "decide", "orders", "fills")
EDGES = {"os", "socket", "sqlite3", "aiohttp", "ccxt", "duckdb", "subprocess", "tempfile", "requests", "urllib", "asyncio", "time", "random", "shutil"}
# scikit-learn is not in the list: LightGBM loads it by itself where it is installed, and the base install has none.
HEAVY = ("torch", "lightning", "pytorch_forecasting", "vectorbt", "optuna", "shap", "matplotlib", "papermill", "realdeal.labels", "realdeal.splits", "realdeal.audit", "realdeal.training", "realdeal.champions", "realdeal.lgbm", "realdeal.tft", "realdeal.backtest", "realdeal.performance", "realdeal.sensitivity", "realdeal.pages", "realdeal.results", "numba", "plotly")


def imports(module: str) -> set[str]:
    tree = ast.parse((REPO / "realdeal" / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom): found |= {f"{'realdeal.' if node.level else ''}{node.module or a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("module", RANK)
def test_imports_only_lower_numbers(module: str) -> None:
    for name in imports(module):
        other = name.removeprefix("realdeal.").split(".")[0]
        # The runner's `python -m` line hands over to the command; nothing is imported unless it is run so.
        if name.startswith("realdeal.") and other in RANK and (module, other) != ("live", "cli"): assert RANK[other] < RANK[module], f"{module} imports {other}"


@pytest.mark.parametrize("module", PURE)
def test_pure_chapters_do_no_io(module: str) -> None:
    # ccxt's message classes are data; its clients are an edge.
    assert not {n.split(".")[0] for n in imports(module) if not n.startswith("ccxt.protobuf.")} & EDGES
    source = (REPO / "realdeal" / f"{module}.py").read_text()
    assert not re.search(r"(?<![\w.])open\(|\.now\(|\bprint\(", source)


def test_every_module_is_a_chapter() -> None:
    files = {p.stem for p in (REPO / "realdeal").glob("*.py")} - {"__init__", "_modidx"}
    assert files == set(RANK)


def loaded_by(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code + "\nimport sys; print('LOADED', *sys.modules)"], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_runner_is_slim() -> None:
    assert loaded_by("import realdeal.live") & set(HEAVY) == set()


def test_runner_is_slim_with_both_models_and_a_decision(demo: Demo) -> None:
    """Loading the champions, computing features, predicting and deciding needs none of the research libraries."""
    code = f"""
from pathlib import Path
import realdeal.live
from realdeal.decide import State, decide, snapshot
from realdeal.ensemble import load_predictor
from realdeal.live import Rolling, look
from realdeal.settings import read_settings
from realdeal.store import Store, StoreKey
from realdeal.types import Account
s = read_settings({str(demo.home / 'settings.ini')!r}, env={{}})
store = Store(Path({str(demo.data / 'store')!r}), StoreKey(source='simulated', venue='emulator', market='realistic-7'))
predictor = load_predictor(Path({str(demo.data / 'models')!r}), s)
end = {demo.job.end()}
p, rows, signals, _ = look(Rolling(store, s.data.symbols, predictor.history_rows).panel(end), end, predictor)
assert {{m.name for m in predictor.members}} == {{'lgbm', 'tft', 'sentiment'}} and len(signals) == 2
assert all('without' not in x.reason for x in signals), signals
state, decision = decide(State(), snapshot(p, rows, signals, Account(1000.), s), s)
assert set(decision.targets) == set(s.data.symbols)
"""
    assert loaded_by(code) & set(HEAVY) == set()
