"""Every chapter's proof cells, run against the imported module (export cells left out), so that they count for coverage."""
from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent / "nbs"
CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))


def cells(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def proofs(path: Path) -> list[str]: return [c for c in cells(path) if not re.search(r"^#\|\s*(export|exporti|default_exp|eval:\s*false)", c, re.M)]


def module_of(path: Path) -> str:
    found = re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join(cells(path)))
    assert found, f"{path.name} exports nothing"
    return found[1]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
async def test_proof(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NBS)
    module = importlib.import_module(f"realdeal.{module_of(path)}")
    names = dict(vars(module))
    for source in proofs(path):
        code = compile(source, f"{path.name}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        done = eval(code, names)
        if inspect.isawaitable(done): await done


def test_every_chapter_has_prose_and_proof() -> None:
    for path in CHAPTERS:
        book = json.loads(path.read_text())["cells"]
        first = "".join(book[0]["source"])
        assert first.startswith("# ") and "\n\n> " in first, f"{path.name}: opens with its name and one line of purpose"
        if not path.stem.endswith("_main"): assert any("assert" in c for c in proofs(path)), f"{path.name}: no proof"
