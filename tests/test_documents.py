"""README, settings.ini, pyproject.toml and the first page are true."""
from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from test_chapters import CHAPTERS, module_of

from realdeal.cli import app
from realdeal.settings import Settings, read_settings

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()


def keys() -> list[tuple[str, str, str, str]]:
    """(section, key, value, the comment above it) of settings.ini."""
    section, note, found = "", "", []
    for line in (REPO / "settings.ini").read_text().splitlines():
        if line.startswith("#"): note += line[1:]
        elif m := re.fullmatch(r"\[(\w+)\]", line): section, note = m[1], ""
        elif m := re.fullmatch(r"(\w+) = (.*)", line): found.append((section, m[1], m[2], note))
        else: note = ""
    return found


def test_settings_file_is_the_defaults() -> None:
    """What the file says is what the program does without it, key by key."""
    assert read_settings(REPO / "settings.ini", env={}).model_dump(exclude={"home"}) == Settings().model_dump(exclude={"home"})
    declared = {(s, k) for s, f in Settings.model_fields.items() if s != "home" for k in f.annotation.model_fields}
    assert declared == {(s, k) for s, k, *_ in keys()}


@pytest.mark.parametrize(("section", "key", "value", "note"), keys(), ids=lambda x: str(x)[:20])
def test_every_key_is_explained(section: str, key: str, value: str, note: str) -> None:
    assert len(note.strip()) > 20, f"[{section}] {key} has no comment"
    assert f"| `[{section}] {key}` | `{value}` |" in README, "the README's table of settings"


def test_settings_and_pyproject_agree() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    s = read_settings(REPO / "settings.ini", env={}).project
    assert (s.lib_name, s.lib_path, s.nbs_path) == (project["project"]["name"], project["tool"]["nbdev"]["lib_path"], project["tool"]["nbdev"]["nbs_path"])


def test_commands_exist() -> None:
    commands = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands}
    said = set(re.findall(r"^(?:REALDEAL_DATA=\S+ )?(?:\.venv/bin/)?realdeal (\w+)", README, re.M))
    assert said and said <= commands
    assert {"demo", "run", "emulator", "ingest", "import", "train", "backtest", "report", "kpi", "live", "soak", "quality"} <= commands
    targets = set(re.findall(r"^(\w+):.*##", (REPO / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make (\w+)`", README)) | set(re.findall(r"^make (\w+)", README, re.M)) <= targets


def test_make_lists_its_targets() -> None:
    told = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "lab", "reports"): assert f"make {target}" in told


def test_map_of_chapters() -> None:
    index = (REPO / "nbs" / "index.ipynb").read_text()
    for path in CHAPTERS:
        assert f"({path.name})" in index and f"(nbs/{path.name})" in README, path.name
        assert module_of(path) in path.stem or path.stem.endswith("_main")


def test_links_of_the_readme_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"): assert (REPO / link).exists(), link


def test_the_readme_says_what_the_board_says() -> None:
    """The figures in the README are those of the committed board, good or bad."""
    kpis = json.loads((REPO / "reports" / "kpi.json").read_text())["kpis"]
    assert f"direction accuracy {kpis['accuracy']['value']:.1%}".replace("%", " %") in README
    assert f"Sharpe {kpis['sharpe']['value']:.2f}" in README and f"deepest drawdown {kpis['max_drawdown']['value']:.1%}".replace("%", " %") in README
    assert kpis["uptime"]["status"] == "not measured" and "Uptime is not measured yet" in README


def test_nothing_of_this_machine_is_in_the_tree() -> None:
    files = subprocess.run(["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.])/(home|root)/|pypi\.org|files\.pythonhosted", "--", ":!tests/test_documents.py"], cwd=REPO, capture_output=True, text=True).stdout
    assert files == ""
