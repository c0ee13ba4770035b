"""No feature, label split or prediction at or before t may change when the future does, at many t."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from conftest import Demo

from realdeal.audit import World, check_future, our_pipeline
from realdeal.ensemble import SequenceMember, load_predictor
from realdeal.features import FEATURES, FUNDING_WINDOW, KNOWN, STEP, WARMUP, Panel, panel, spoil
from realdeal.market import SIMULATED_START, generate
from realdeal.settings import read_settings
from realdeal.types import DAY, MINUTE

OURS = our_pipeline(read_settings(env={}))
DAYS = 21
END = SIMULATED_START + DAYS * DAY


@pytest.fixture(scope="module")
def candles() -> dict[str, pl.DataFrame]:
    made = generate("realistic", ["BTC/USDT", "ETH/USDT"], SIMULATED_START, DAYS * 1440, seed=3)
    return {k: pl.DataFrame(dict(zip(("time", "open", "high", "low", "close", "volume"), c.columns, strict=True))).with_columns(origin=pl.lit("venue")) for k, c in made.items()}


@pytest.fixture(scope="module")
def rates() -> dict[str, pl.DataFrame]:
    times = np.arange(SIMULATED_START, END, 8 * 3_600_000)
    return {x: pl.DataFrame({"time": times, "rate": np.random.default_rng(0).normal(0, 1e-4, len(times))}) for x in ("BTC/USDT", "ETH/USDT")}


@pytest.mark.parametrize("at", np.random.default_rng(1).integers((WARMUP + 40) * 15, DAYS * 1440, 12).tolist())
def test_features_at_many_times(candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame], at: int) -> None:
    """Any minute, on the grid or off it."""
    p = panel(candles, rates, END)
    assert np.isfinite(p.X[p.times >= SIMULATED_START + (WARMUP + 1) * STEP]).mean() > 0.99, "there is something to change"
    found = check_future(OURS, World(candles, rates, END), [SIMULATED_START + at * MINUTE])
    assert found.passed, found.detail


def test_funding_is_known_when_it_is_settled(candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> None:
    """An hour after a settlement, what is settled next changes nothing; at the settlement itself it is known. Means and changes hold nothing else."""
    eight = 8 * 3_600_000
    t = SIMULATED_START + 10 * DAY + 3_600_000
    later = {k: r.with_columns(rate=pl.when(pl.col("time") > t).then(1.0).otherwise(pl.col("rate"))) for k, r in rates.items()}
    a, b = panel(candles, rates, END), panel(candles, later, END)
    old, new = a.times <= t, a.times == t - 3_600_000 + eight
    for name, known in (("funding", 1e4), ("funding_change", None), ("funding_3d", None), ("funding_7d", None)):
        i = a.names.index(name)
        assert np.isfinite(a.X[a.times >= SIMULATED_START + 8 * DAY, i]).all()
        assert np.array_equal(a.X[a.times < t - 3_600_000 + eight, i], b.X[a.times < t - 3_600_000 + eight, i], equal_nan=True) and np.array_equal(a.X[old, i], b.X[old, i], equal_nan=True)
        assert (np.abs(b.X[new, i]) > 100).all() and (known is None or (b.X[new, i] == known).all())


LATE = [f.name for f in FEATURES if f.warmup]


@pytest.fixture(scope="module")
def whole(candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> Panel:
    return panel(candles, rates, END, start=END)


@pytest.mark.parametrize("name", LATE)
def test_warmup_is_enough_and_needed(whole: Panel, candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame], name: str) -> None:
    """The declared warm-up gives the value of the whole history; one row less gives none, even where nothing hides the rows before it."""
    f = replace(next(x for x in FEATURES if x.name == name), warmup=0)
    def last(rows: int) -> np.ndarray: return panel({k: c.filter(pl.col("time") >= END - rows * STEP) for k, c in candles.items()}, rates, END, END, [f]).X[:, 0]
    declared = next(x.warmup for x in FEATURES if x.name == name)
    np.testing.assert_allclose(last(declared + 1), whole.X[:, whole.names.index(name)], rtol=1e-9, atol=1e-12)
    assert np.isfinite(last(declared + 1)).all() and np.isnan(last(declared)).all()


def test_no_warmup_is_declared_late(whole: Panel, candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> None:
    """The rest needs one bar, and the settlements of FUNDING_WINDOW."""
    short = {k: c.filter(pl.col("time") >= END - STEP) for k, c in candles.items()}
    one = panel(short, {k: r.filter(pl.col("time") >= END - FUNDING_WINDOW) for k, r in rates.items()}, END)
    others = [i for i, n in enumerate(whole.names) if n not in LATE]
    assert {whole.names[i] for i in others} == {"flow_15m", "funding", "funding_change", "funding_3d", "funding_7d", *KNOWN} and np.isfinite(one.X[:, others]).all()
    np.testing.assert_allclose(one.X[:, others], whole.X[:, others], rtol=1e-9, atol=1e-9)


def test_predictions(demo: Demo, candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> None:
    predictor = load_predictor(demo.data / "models", demo.job.s)
    t = SIMULATED_START + 17 * DAY
    before, after = panel(candles, rates, END), panel({k: spoil(c, t) for k, c in candles.items()}, rates, END)
    rows = np.flatnonzero((before.times <= t) & (before.times > t - DAY))
    assert [x.prob for x in predictor.predict(before, rows)] == pytest.approx([x.prob for x in predictor.predict(after, rows)], rel=1e-9)
    later = np.flatnonzero(before.times == t + DAY)
    network = next(m for m in predictor.members if isinstance(m, SequenceMember))      # models this small may be calibrated to one answer for all
    assert not np.array_equal(network.raw(before, later), network.raw(after, later))
    said, again = (predictor.member_probs(p, rows) for p in (before, after))
    assert np.isfinite(said[:, :2]).all() and np.allclose(said, again, rtol=1e-9, equal_nan=True)
