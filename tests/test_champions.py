"""Who speaks: nothing becomes champion without an audit and without being better, and a runner takes a new champion at a bar's edge."""
from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from conftest import Demo, realdeal
from test_line import session

from realdeal import champions
from realdeal.champions import export, hash_of, promote, rollback
from realdeal.ensemble import BLEND, Blend, blend_bytes, load_predictor, read_manifest, read_verified, save_models
from realdeal.features import STEP, panel
from realdeal.featurestore import FeatureStore
from realdeal.live import Forecaster, Rolling, history, reach
from realdeal.plan import Job, job_blocks, read_panel, readings
from realdeal.provenance import Places
from realdeal.store import Store
from realdeal.training import TRAINING, VERDICT
from realdeal.types import DAY, HOUR, MINUTE, BadData, Bar, Minute, Missing, Refused, Retry


@pytest.fixture
def rival(demo: Demo, tmp_path: Path) -> Job:
    """The demo's job in a folder of its own: its candles and verdict, its models as challenger, and no champion."""
    s = demo.job.s.override(paths={"data": str(tmp_path / "data"), "reports": str(tmp_path / "reports")})
    job = replace(demo.job, s=s)
    job.places.data.mkdir(parents=True)
    (job.places.data / "store").symlink_to(demo.job.places.store)
    shutil.copy(demo.data / VERDICT, job.places.data)
    shutil.copytree(demo.data / "challenger", job.places.challenger)
    return job


def put(job: Job, folder: Path, **changes: object) -> str:
    """The challenger's models in `folder` with another blend; their hash."""
    manifest = read_manifest(job.places.challenger)
    files = {n: read_verified(job.places.challenger, n)[0] for n in manifest.files}
    blend = replace(Blend.from_plain(json.loads(files[BLEND])), **changes)
    save_models(folder, {**files, BLEND: blend_bytes(blend)}, manifest.files[BLEND].provenance)
    return hash_of(folder)


def test_no_audit_no_champion(rival: Job) -> None:
    (rival.places.data / VERDICT).unlink()
    with pytest.raises(Refused, match="no audit of this very code"): promote(rival)
    assert hash_of(rival.places.models) == ""


def test_an_audit_of_other_code_or_settings_is_none(rival: Job) -> None:
    told = json.loads((rival.places.data / VERDICT).read_text())
    (rival.places.data / VERDICT).write_text(json.dumps({**told, "code": "000000000000-" + rival.s.hash}))
    with pytest.raises(Refused, match="no audit"): promote(rival)
    (rival.places.data / VERDICT).write_text(json.dumps({**told, "checks": [[*told["checks"][0][:1], False, "planted"], *told["checks"][1:]]}))
    with pytest.raises(Refused, match="no audit"): promote(rival)


def test_the_first_champion_and_then_only_a_better_one(rival: Job) -> None:
    """The same models twice, models that are worse, and models that are better than a champion that is wrong on purpose."""
    event = promote(rival)
    assert event.before == "" and "first champion" in event.why and hash_of(rival.places.models) == event.model
    with pytest.raises(Refused, match="is the champion already"): promote(rival)
    assert readings(rival, "test") == [], "the block that judges was not opened for that"

    good = {n: (rival.places.challenger / n).read_bytes() for n in (*read_manifest(rival.places.challenger).files, "manifest.json")}
    put(rival, rival.places.challenger, weights=(0.0, 0.0, 0.0), offset=3.0)     # always sure of a rise
    with pytest.raises(Refused, match=r"stays: log loss .* comparison 1 on this block"): promote(rival)
    assert hash_of(rival.places.models) == event.model and [x["why"] for x in readings(rival, "test")] == ["challenger against champion"]

    shutil.copytree(rival.places.challenger, rival.places.models, dirs_exist_ok=True)        # the wrong one is champion
    wrong = hash_of(rival.places.models)
    for n, content in good.items(): (rival.places.challenger / n).write_bytes(content)
    better = promote(rival)
    assert better.before == wrong and better.model == event.model and "comparison 2" in better.why
    assert rollback(rival.places, "for the test").model == wrong and hash_of(rival.places.models) == wrong
    with pytest.raises(Refused, match="was rolled back before"): promote(rival)
    assert promote(rival, "it was the exchange's fault").model == event.model


def test_a_champion_is_exported_anew_and_says_the_same(rival: Job) -> None:
    """Nothing to change, an older file of the same networks, one of other networks, and the way back."""
    promote(rival)
    with pytest.raises(Refused, match="its twin is what this program exports"): export(rival.places, rival.s)
    manifest = read_manifest(rival.places.challenger)
    files = {n: read_verified(rival.places.challenger, n)[0] for n in manifest.files}

    def champion_with(change: Callable[[onnx.ModelProto], None]) -> str:
        graph = onnx.load_from_string(files["best_tft.onnx"])
        change(graph)
        save_models(rival.places.models, {**files, "best_tft.onnx": graph.SerializeToString()}, manifest.files[BLEND].provenance)
        return hash_of(rival.places.models)

    older = champion_with(lambda graph: setattr(graph, "producer_name", "an older program"))
    event = export(rival.places, rival.s)
    assert (event.what, event.before, event.model) == ("exported", older, hash_of(rival.places.challenger)) and "the same networks" in event.why
    assert [e.what for e in read_manifest(rival.places.models).history] == ["exported"] and load_predictor(rival.places.models, rival.s).model_hash == event.model
    assert rollback(rival.places, "to see").model == older

    def louder(graph: onnx.ModelProto) -> None:
        weights = next(w for w in graph.graph.initializer if w.name.endswith("output_layer.weight") or len(w.dims) == 3)
        weights.raw_data = (onnx.numpy_helper.to_array(weights) * 1.01).tobytes()

    other = champion_with(louder)
    with pytest.raises(Refused, match="exported anew its networks say something else"): export(rival.places, rival.s)
    assert hash_of(rival.places.models) == other

    save_models(rival.places.models, {n: x for n, x in files.items() if n != "best_tft.pt"}, manifest.files[BLEND].provenance)
    with pytest.raises(Missing, match="no best_tft.pt; only networks are exported"): export(rival.places, rival.s)


def test_what_was_judged_is_what_is_crowned(rival: Job) -> None:
    """Another training that ends meanwhile changes the challenger: the models that were not judged are refused. So is a challenger of other code than was audited."""
    with pytest.raises(Refused, match="which was judged"): champions._crown(rival.places, rival.places.challenger, "0" * 16, "promoted", "judged another")
    assert hash_of(rival.places.models) == ""
    manifest = read_manifest(rival.places.challenger)
    files = {n: read_verified(rival.places.challenger, n)[0] for n in manifest.files}
    save_models(rival.places.challenger, files | {TRAINING: json.dumps({**json.loads(files[TRAINING]), "code": "other"}).encode()}, manifest.files[BLEND].provenance)
    with pytest.raises(Refused, match="trained by other code"): promote(rival)


def test_who_cannot_be_compared_with_is_not_replaced_in_silence(rival: Job) -> None:
    """A champion of other symbols, or one that is damaged: only with a reason, and the reason is kept."""
    promote(rival)
    first = hash_of(rival.places.models)
    put(rival, rival.places.challenger, offset=0.1)
    (rival.places.models / BLEND).write_bytes(b"torn")
    with pytest.raises(Refused, match="say --replace and why"): promote(rival)
    assert "the disk was full" in promote(rival, "the disk was full").why
    assert rollback(rival.places, "back", to=first).model == first and read_verified(rival.places.models, BLEND), "the archive has the one that was torn"


def test_a_champion_that_cannot_be_read_is_replaced_and_says_why(rival: Job) -> None:
    promote(rival)
    old = json.loads((rival.places.models / BLEND).read_text())
    manifest = read_manifest(rival.places.models)
    files = {n: read_verified(rival.places.models, n)[0] for n in manifest.files} | {BLEND: json.dumps({k: v for k, v in old.items() if k != "format"}).encode()}
    save_models(rival.places.models, files, manifest.files[BLEND].provenance)
    assert "format 1" in promote(rival).why


def test_sources_are_not_mixed(rival: Job) -> None:
    """A simulated challenger is nothing to a recorded job."""
    recorded = replace(rival, source="recorded", recorded=Path("/nowhere"))
    shutil.copytree(rival.places.challenger, recorded.places.challenger)
    with pytest.raises(Refused, match="trained on a simulated market"): promote(recorded)


def test_commands(rival: Job, demo: Demo) -> None:
    """train -> promote -> rollback, as a user runs them, with their exit codes."""
    done = realdeal("promote", "--source", "simulated", "--days", "49", "--test-days", "5", "--reserve-days", "6", home=demo.home)
    assert done.returncode == 77 and "Refused" in done.stderr
    none = realdeal("rollback", "--why", "to see", "--source", "simulated", home=demo.home)
    assert none.returncode == 66 and "no champion before" in none.stderr
    assert realdeal("rollback", "--why", " ", "--source", "simulated", home=demo.home).returncode == 65


def test_a_runner_takes_the_new_champion_at_its_next_decision(rival: Job, demo: Demo, tmp_path: Path) -> None:
    """The champion is replaced in the middle of a session: later decisions are its own, the journal pins both."""
    at = Places(source="simulated", data=tmp_path / "live", reports=tmp_path)
    first, second = put(rival, at.models), put(rival, at.challenger, offset=0.5)
    calls = []

    def newest(used: str):
        calls.append(used)
        if len(calls) == 20: champions._crown(at, at.challenger, second, "promoted", "for the test")
        return None if hash_of(at.models) == used else load_predictor(at.models, demo.job.s)

    runner, told, *_ = asyncio.run(session(demo, tmp_path, "paper", 60, predictor=load_predictor(at.models, demo.job.s), newest=newest))
    assert [d["inputs"]["model"] for d in runner.journal.rows("decisions", "time")] == [first] * 2 + [second] * 3 and told["missed"] == 0
    assert [x["model"] for x in runner.journal.fact("models")] == [first, second]
    assert champions.model_folder(at, first) == at.archive / first, "what spoke can be computed again"


def test_a_half_written_champion_is_left_alone(rival: Job, demo: Demo, tmp_path: Path) -> None:
    """A file that is not the manifest's, as in the middle of a promotion: the runner goes on with what it has, and says so once."""
    at = Places(source="simulated", data=tmp_path / "live", reports=tmp_path)
    put(rival, at.models)
    predictor, heard = load_predictor(at.models, demo.job.s), []
    (at.models / BLEND).write_bytes(b"torn")
    manifest = read_manifest(at.models)
    (at.models / "manifest.json").write_text(manifest.model_copy(update={"files": {**manifest.files, BLEND: manifest.files[BLEND].model_copy(update={"sha256": "0" * 64})}}).model_dump_json())
    runner, told, *_ = asyncio.run(session(demo, tmp_path, "paper", 60, predictor=predictor, say=heard.append,
        newest=lambda used: None if hash_of(at.models) == used else load_predictor(at.models, demo.job.s)))
    assert {d["inputs"]["model"] for d in runner.journal.rows("decisions")} == {predictor.model_hash} and told["missed"] == 0
    assert sum("cannot be used" in line for line in heard) == 1


async def test_forecasts_are_bounded_and_made_once(demo: Demo) -> None:
    """Many ask for one bar at once: the pool is asked for as many as may wait, the rest are told to come back; afterwards the bar is known."""
    predictor, job = load_predictor(demo.data / "models", demo.job.s), demo.job
    f, time = Forecaster(job.store, job.s.data.symbols, predictor, waiting=2), job.end() - DAY + 15 * MINUTE
    told = await asyncio.gather(*(f.at(time) for _ in range(6)), return_exceptions=True)
    assert sum(isinstance(x, Retry) for x in told) == 4 and f.asked == 0
    seen = await f.at(time)
    assert seen is next(x for x in told if not isinstance(x, Retry)) and [x.symbol for x in seen.signals] == list(job.s.data.symbols)
    p = FeatureStore(job.store, job.s.data.symbols).panel(time - DAY, time)
    again = predictor.predict(p, np.flatnonzero(p.times == time), stability=f.stability)
    assert [x.prob for x in again] == pytest.approx([x.prob for x in seen.signals], rel=1e-9) and [x.reason for x in again] == [x.reason for x in seen.signals]
    assert np.isfinite(f.stability.at(time)), "the drift of the day is judged by the week before it"
    f.close()


async def test_a_bar_is_looked_at_anew_when_more_is_known(demo: Demo, tmp_path: Path) -> None:
    """A look at a store that lacked minutes (a full disk, say) is not the one that counts when they are there."""
    predictor, job, symbols = load_predictor(demo.data / "models", demo.job.s), demo.job, demo.job.s.data.symbols
    store, end = Store(tmp_path, job.key), job.end() - DAY
    start = end - reach(predictor.history_rows)
    for x in symbols:
        store.write(x, job.store.read(x, start, end - 5 * MINUTE))
        store.write_funding(x, job.store.read_funding(x, start, end))
    f = Forecaster(store, symbols, predictor)
    lacking = await f.at(end)
    assert await f.at(end) is lacking
    store.keep([Minute(x, Bar(*r), (), None, "rest") for x in symbols for r in job.store.read(x, end - 5 * MINUTE, end).iter_rows()])
    seen = await f.at(end)
    whole = panel(*history(store, symbols, start, end), end, start=end)
    np.testing.assert_allclose(seen.panel.X[seen.rows], whole.X, rtol=1e-12, atol=1e-15)
    assert not np.allclose(lacking.panel.X[lacking.rows], whole.X, equal_nan=True), "otherwise this shows nothing"
    f.close()


def test_news_are_appended_and_anything_else_is_read_anew(demo: Demo, tmp_path: Path) -> None:
    """Four hours of bars that come one by one, a settlement, a minute that is late, one that is amended, a backfill, a compaction: the panel is that of the whole store, to the last digit."""
    job, symbols = demo.job, demo.job.s.data.symbols
    store, end = Store(tmp_path, job.key), job.end() - DAY
    start = end - reach(3)
    for x in symbols:
        store.write(x, job.store.read(x, start, end))
        store.write_funding(x, job.store.read_funding(x, start, end))
    later = {x: job.store.read(x, end, end + 4 * HOUR) for x in symbols}

    def bring(a: int, b: int, skip: int = -1, only: tuple[str, ...] = symbols) -> None:
        for x in only: store.keep([Minute(x, Bar(*r), (), None, "rest") for r in later[x].iter_rows() if a <= r[0] < b and r[0] != skip])

    rolling, built = Rolling(store, symbols, 3), []

    def same(time: int) -> None:
        mine = rolling.panel(time)
        whole = panel(*history(store, symbols, time - reach(3), time), time, start=time - 3 * STEP)
        assert np.array_equal(mine.times, whole.times) and np.array_equal(mine.real, whole.real)
        np.testing.assert_allclose(mine.X, whole.X, rtol=1e-12, atol=1e-15)
        built.append(rolling.built)

    same(end)
    bring(end, end + MINUTE)                                      # there already when the window is built, and of the next bar
    rolling = Rolling(store, symbols, 3)
    same(end)
    for i in range(4):
        bring(end + i * STEP + MINUTE * (i == 0), end + (i + 1) * STEP + 2 * MINUTE)     # two minutes more than are asked for
        same(end + (i + 1) * STEP)
    assert built == [1] * 6, "nothing was read again"
    at = end + 4 * STEP
    store.keep([], rates=[(x, at + STEP, 0.0007) for x in symbols])
    bring(at + 2 * MINUTE, at + STEP, skip=at + 3 * MINUTE)                    # one minute does not come: flat
    same(at + STEP)
    bring(at + 3 * MINUTE, at + 4 * MINUTE)                       # it comes late, with the next bar
    bring(at + STEP, at + 2 * STEP)
    same(at + 2 * STEP)
    assert built[-2:] == [1, 2]
    amended = Bar(*later[symbols[0]].row(5))
    store.keep([Minute(symbols[0], replace(amended, high=amended.high * 1.01, volume=amended.volume * 3), (), None, "rest")])
    same(at + 2 * STEP)
    store.compact()
    bring(at + 2 * STEP, at + 3 * STEP)
    same(at + 3 * STEP)
    for x in symbols: store.write(x, later[x].filter(pl.col("time").is_between(at + 3 * STEP, at + 4 * STEP, closed="left")))
    same(at + 4 * STEP)
    assert built[-3:] == [3, 4, 5]


def test_the_drift_of_the_runner_is_that_of_the_backtest(demo: Demo) -> None:
    """A panel that reaches over days, and the runner's week alone, give the same share to the last digit."""
    from realdeal.live import week_of

    job, predictor = demo.job, load_predictor(demo.data / "models", demo.job.s)
    midnight = job_blocks(job).edges["test"][1]
    p = FeatureStore(job.store, job.s.data.symbols).panel(midnight - predictor.drift_rows * STEP, midnight + DAY // 2)
    alone = week_of(job.store, job.s.data.symbols, midnight, predictor)
    rows = np.flatnonzero(p.times >= midnight)
    assert alone.at(midnight) == predictor.forecast(p, rows).stability.at(midnight)
    assert np.isnan(week_of(job.store, job.s.data.symbols, DAY, predictor).at(DAY)), "no candles, no drift"


def test_metrics_of_the_models(demo: Demo) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from realdeal.live import ModelMetrics

    predictor, job = load_predictor(demo.data / "models", demo.job.s), demo.job
    f, registry = Forecaster(job.store, job.s.data.symbols, predictor), CollectorRegistry()
    registry.register(ModelMetrics(f))
    assert b"realdeal_drift NaN" in generate_latest(registry), "nothing is known before the first bar"
    p = read_panel(job, job.span()[0], job_blocks(job).edges["test"][0])
    f.stability, f.judged = predictor.stability(p), (predictor.model_hash, int(p.times[-1]), 0)
    told = generate_latest(registry).decode()
    assert f'realdeal_model{{hash="{predictor.model_hash}"}} 1.0' in told and 'realdeal_drift_index{input="ret_1d"}' in told
    assert float(told.split("\nrealdeal_drift ")[1].split()[0]) == f.stability.at(int(p.times[-1])), "the day that is decided on, not the next"


def test_retraining_once(demo: Demo) -> None:
    """What was trained and judged on these candles is not done again."""
    done = realdeal("retrain", "--source", "simulated", "--days", "49", "--test-days", "5", "--reserve-days", "6", "--trials", "10", "--epochs", "5", "--once", home=demo.home, REALDEAL_MODEL_ROUNDS="300",
        REALDEAL_MODEL_HIDDEN_SIZE="8", REALDEAL_MODEL_EPOCH_WINDOWS="8000", REALDEAL_MODEL_NETWORKS="2")
    assert done.returncode == 0, done.stderr
    assert all(f"{step}: done before" in done.stdout for step in ("train", "audit", "promote"))


def test_old_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no such model"): champions.model_folder(Places(source="simulated", data=tmp_path, reports=tmp_path), "abc")
    with pytest.raises(BadData, match="say why"): rollback(Places(source="simulated", data=tmp_path, reports=tmp_path), "")
    assert list(tmp_path.iterdir()) == []
