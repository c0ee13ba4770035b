"""The main job: repairs itself after a kill, does nothing twice, keeps its places."""
from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import DEMO, Demo, realdeal

from realdeal.cards import load_result
from realdeal.ensemble import load_predictor, read_manifest
from realdeal.plan import Job, job_blocks, read_panel, readings, report_span
from realdeal.provenance import Manifest
from realdeal.settings import read_settings
from realdeal.types import DAY, MINUTE, Refused


def test_goes_on_after_a_kill(demo: Demo) -> None:
    assert "done in" not in demo.killed, "it was killed before its first step was done"
    assert "candles: all there before" in demo.resumed and "study goes on after" in demo.resumed
    assert all(f"{step}: done in" in demo.resumed for step in ("train", "audit", "promote", "paper", "backtest", "reports"))


def test_twice_does_nothing(demo: Demo) -> None:
    before = {p: p.read_bytes() for p in demo.reports.rglob("*") if p.is_file()}
    again = realdeal(*DEMO, home=demo.home)
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if "done in" in line] == []
    assert sum("done before" in line for line in again.stdout.splitlines()) == 6
    assert {p: p.read_bytes() for p in demo.reports.rglob("*") if p.is_file()} == before


def test_outputs_by_name(demo: Demo) -> None:
    for name in ("backtests/6d_BTCUSDT.html", "backtests/6d_ETHUSDT.html", "model_cards/lgbm.html", "model_cards/tft.html", "kpi.json", "KPI.md"): assert (demo.reports / name).is_file(), name
    for name in ("best_lgbm.pkl", "best_tft.pt", "best_tft.onnx", "baseline_lstm.onnx", "baseline_linear.onnx", "ensemble.json", "drift.json", "training.json", "manifest.json"): assert (demo.data / "models" / name).is_file(), name
    assert {p.name for p in (demo.home / "reports").iterdir()} == {"demo"} and {p.name for p in (demo.home / "data").iterdir()} == {"demo"}, "a simulated result stays in its place"


def test_everything_carries_its_provenance(demo: Demo) -> None:
    board = json.loads((demo.reports / "kpi.json").read_text())
    assert {k["status"] for n, k in board["kpis"].items() if n != "latency_p95"} == {"not measured"}
    assert board["rehearsal"]["uptime"] == 1 and board["rehearsal"]["parity_differences"] == 0 and board["rehearsal"]["failed_orders"] == 0
    for entry in Manifest.parse((demo.data / "models/manifest.json").read_text()).files.values():
        assert entry.provenance.source == "simulated" and entry.provenance.market == "realistic-7"
        assert entry.provenance.end == job_blocks(demo.job).edges["test"][0], "trained on nothing of the test block"
    for page in demo.reports.rglob("*.html"): assert "SIMULATED" in page.read_text(), page.name
    assert load_result(demo.data / "results", "6d_portfolio").provenance.start == report_span(demo.job)[0]


def test_models_have_not_seen_the_test_block(demo: Demo, tmp_path: Path) -> None:
    """Train again on a store whose test block is another market: the same models, byte for byte but for the provenance's commit."""
    from dataclasses import replace

    from realdeal import training
    from realdeal.store import Store

    job = demo.job
    first, end = job.span()
    cut = job_blocks(job).edges["test"][0]
    s = job.s.override(paths={"data": str(tmp_path / "data"), "reports": str(tmp_path / "reports")})
    other = replace(job, s=s)
    for x in s.data.symbols:
        df = job.store.read(x, first, end)
        factor = np.where(df["time"].to_numpy() >= cut, 1.5, 1.0)
        Store(other.places.store, other.key).write(x, df.with_columns(*[pl.col(c) * factor for c in ("open", "high", "low", "close")]))
        Store(other.places.store, other.key).write_funding(x, job.store.read_funding(x, first, end))
    training.train(other)
    a, b = load_predictor(job.places.models, s), load_predictor(other.places.challenger, s)
    assert a.blend == b.blend and a.reference == b.reference
    p = read_panel(job, cut - 10 * DAY, cut)
    rows = np.flatnonzero(p.real)[-200:]
    np.testing.assert_array_equal(a.member_probs(p, rows), b.member_probs(p, rows))


def test_models_are_not_judged_on_what_they_learned(demo: Demo, tmp_path: Path) -> None:
    """A longer test block reaches into the days the champions were trained on: refused, and nothing is written."""
    from dataclasses import replace

    from realdeal import results as jobs

    longer = replace(demo.job, s=demo.job.s.override(model={"test_days": 6}, paths={"reports": str(tmp_path / "reports")}))
    with pytest.raises(Refused, match="the model learned until"): jobs.judge(longer)
    other = replace(demo.job, s=demo.job.s.override(strategy={"horizon": 60}, paths={"reports": str(tmp_path / "reports")}))
    with pytest.raises(Refused, match="the model predicts 240 minutes"): jobs.judge(other)
    assert not (tmp_path / "reports").exists()


def test_swapped_champions_are_noticed(demo: Demo) -> None:
    """Other models in the folder are not "done before": the challenger tries again."""
    from realdeal.champions import hash_of
    from realdeal.job import CHALLENGER, Steps, train_key

    steps = Steps(demo.data / "steps.json", lambda _: None)
    outputs = [demo.data / "models" / n for n in CHALLENGER]
    key = f"{train_key(demo.job)}-{hash_of(demo.data / 'challenger')}"
    assert steps.done["promote"] == steps._stamp(key, outputs)
    blend = demo.data / "models" / "ensemble.json"
    before = blend.read_bytes()
    try:
        blend.write_bytes(before.replace(b"threshold", b"Threshold"))
        assert steps.done["promote"] != steps._stamp(key, outputs)
    finally: blend.write_bytes(before)


def test_funding_is_part_of_the_data(demo: Demo, tmp_path: Path) -> None:
    from realdeal.store import Store

    first, end = demo.job.span()
    store = Store(tmp_path, demo.job.key)
    for x in demo.job.s.data.symbols:
        store.write(x, demo.job.store.read(x, first, end))
        store.write_funding(x, demo.job.store.read_funding(x, first, end))
    assert store.data_hash(demo.job.s.data.symbols, first, end) == demo.job.store.data_hash(demo.job.s.data.symbols, first, end)
    store.write_funding("BTC/USDT", demo.job.store.read_funding("BTC/USDT", first, end).with_columns(rate=pl.col("rate") * 2))
    assert store.data_hash(demo.job.s.data.symbols, first, end) != demo.job.store.data_hash(demo.job.s.data.symbols, first, end)


def test_every_look_at_a_block_that_judges_is_logged(demo: Demo, tmp_path: Path) -> None:
    """The cards opened the test block once, the report and the parity check the reserve; whoever says no reason or opens too little is refused."""
    assert [x["why"] for x in readings(demo.job, "test")] == ["model cards"]
    assert {x["why"] for x in readings(demo.job, "reserve")} == {"the 90-day report", "parity of the paper session"}
    board = json.loads((demo.reports / "kpi.json").read_text())
    assert board["assumptions"]["the reserve was opened"] == "2 times, 1 for this report"
    start, end = report_span(demo.job)
    with pytest.raises(Refused, match="what is opened ends on"): read_panel(demo.job, start, end, "test", "curiosity")
    assert len(readings(demo.job, "test")) == 1, "a refused look is none"


def test_the_card_tells_what_the_audit_said(demo: Demo) -> None:
    from realdeal.cards import read_card

    card = read_card(demo.data / "cards/lgbm.json")
    assert card.audit is not None and card.audit.passed and {c[0] for c in card.audit.checks} >= {"future", "fit", "null market", "planted market"}
    assert card.control is not None and card.seeds is not None and len(card.seeds) == demo.job.s.model.seeds and card.shap is not None and card.thresholds is not None


def test_two_trainings_of_one_seed_are_identical(demo: Demo, tmp_path: Path) -> None:
    """LightGBM anew on the same store, on one process instead of two: the same file but for the commit; the TFT, which learned from other files, leaves the ensemble."""
    from dataclasses import replace

    from realdeal import training
    from realdeal.ensemble import load_plain

    s = demo.job.s.override(paths={"data": str(tmp_path / "data"), "reports": str(tmp_path / "reports")}, model={"workers": 1})
    other = replace(demo.job, s=s)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/store").symlink_to(demo.job.places.store)
    training.train(other, ("lgbm",))
    a, b = (load_plain((x.places.challenger / "best_lgbm.pkl").read_bytes()) for x in (demo.job, other))
    for x in (a, b): x["provenance"].pop("commit")
    assert a == b
    assert [m.name for m in load_predictor(other.places.challenger, s).members] == ["lgbm", "sentiment"]


def test_walk_and_audit_as_commands(demo: Demo) -> None:
    """A walk of one stretch and the audit, each as a user runs it; the walk is a page and JSON, and goes on from what it has."""
    spans = DEMO[1:-2]
    walked = realdeal("walk", "--source", "simulated", *spans, "--trials", "4", "--json", home=demo.home)
    assert walked.returncode == 0, walked.stderr
    told = json.loads(walked.stdout)
    assert len(told["folds"]) == 1 and told["folds"][0]["train"][1] < told["folds"][0]["test"][0]
    assert told["folds"][0]["test"][1] < str(np.datetime64(job_blocks(demo.job).edges["test"][0], "ms"))[:10], "the test block stays closed"
    assert (demo.reports / "model_cards/walk_forward.html").is_file() and "walk-forward" not in {x["why"] for x in readings(demo.job, "test")}
    audited = realdeal("audit", "--source", "simulated", *spans, "--at", "2", "--json", home=demo.home)
    assert audited.returncode == 0, audited.stderr
    assert [c["passed"] for c in json.loads(audited.stdout)] == [True] * 12 and "passed  planted market, ensemble" in audited.stderr
    assert realdeal("features", home=demo.home).stdout == (Path(__file__).parent.parent / "docs/features.md").read_text()


def test_places_refuse_the_wrong_source(demo: Demo) -> None:
    from realdeal.cards import write_board
    from realdeal.provenance import places

    board = json.loads((demo.reports / "kpi.json").read_text())
    with pytest.raises(Refused, match="simulated"): write_board(places(demo.job.s, "recorded"), board, demo.job.s)
    assert not (demo.home / "reports/kpi.json").exists()


def test_parts_of_the_command(demo: Demo) -> None:
    told = json.loads(realdeal("kpi", "--source", "simulated", "--json", home=demo.home).stdout)
    assert told["kpis"]["latency_p95"]["status"] in ("met", "missed")
    ledger = json.loads(realdeal("ingest", "--status", "--source", "simulated", "--json", home=demo.home).stdout)
    assert ledger["dropped"] == 0 and ledger["streams"]["malformed"] == 0 and ledger["minutes"] == 2 * demo.job.hours * 60
    assert all(sum(t["known"].values()) == demo.job.hours * 60 for t in ledger["symbols"].values())


def test_a_report_is_drawn_alone(demo: Demo) -> None:
    """Another test may have made another champion, so the first page may be new; the second is drawn from what was saved, and the reserve is not opened again."""
    page, made = demo.reports / "backtests/6d_ETHUSDT.html", []
    for _ in range(2):
        page.unlink(missing_ok=True)
        done = realdeal("report", "--source", "simulated", *("--candles" if x == "--days" else x for x in DEMO[1:-2]), "--symbol", "ETH/USDT", home=demo.home)
        assert done.returncode == 0, done.stderr
        made.append((hashlib.sha256(page.read_bytes()).hexdigest(), len(readings(demo.job, "reserve"))))
    assert made[0] == made[1], "the same data, the same bytes"


@pytest.mark.skipif("REALDEAL_DATA" not in os.environ, reason="REALDEAL_DATA is not set: the recorded candles are not here")
def test_recorded_candles_through_the_emulator(home: Path) -> None:
    """ccxt's client fetches recorded candles from the emulator, and the store holds them digit for digit."""
    folder = Path(os.environ["REALDEAL_DATA"])
    s = read_settings(home / "settings.ini", env={}).override(model={"test_days": 5, "reserve_days": 5})
    done = realdeal("ingest", "--source", "recorded", "--days", "46", home=home, REALDEAL_MODEL_TEST_DAYS="5", REALDEAL_MODEL_RESERVE_DAYS="5")
    assert done.returncode == 0, done.stderr
    job = Job(s, "recorded", 46, recorded=folder)
    start, end = job.span()
    for x in s.data.symbols:
        mine = job.store.read(x, start, end)
        real = pl.concat([pl.read_parquet(f) for f in sorted((folder / "candles_1m" / x.replace("/", "")).glob("*.parquet"))[-2:]])
        real = real.with_columns(time=pl.col("timestamp").dt.epoch("ms")).filter(pl.col("time").is_between(start, end, closed="left"))
        assert mine.select(*(c for c in ("time", "open", "high", "low", "close", "volume"))).equals(real.select("time", "open", "high", "low", "close", "volume").cast({"time": pl.Int64}))
        assert (mine["origin"] == "backfilled").all() and len(mine) == (end - start) // MINUTE
    assert not re.search(r"\bkpi\.json\b", " ".join(p.name for p in home.rglob("*"))), "fetching judges nothing"


def test_manifest_lists_what_is_committed() -> None:
    """The champions in the repository are what their manifest says, and come from real data."""
    models = Path(__file__).parent.parent / "data" / "models"
    if not (models / "manifest.json").exists(): pytest.skip("no champions are committed yet")
    manifest = read_manifest(models)
    for name, entry in manifest.files.items():
        assert manifest.check(name, (models / name).read_bytes()).is_real
        assert entry.size < 5_000_000
    assert load_predictor(models, read_settings(models.parent.parent / "settings.ini", env={}), ("recorded", "exchange")).members
