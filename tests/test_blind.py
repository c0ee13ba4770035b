"""No feature, label split or prediction at or before t may change when the future does, at many t."""
from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from conftest import Demo

from realdeal.ensemble import load_predictor
from realdeal.features import FEATURES, STEP, WARMUP, assert_blind, panel, spoil
from realdeal.job import SIMULATED_START
from realdeal.market import generate
from realdeal.types import DAY, MINUTE

DAYS = 14
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
    assert_blind(panel, candles, rates, END, SIMULATED_START + at * MINUTE)


def test_funding_is_known_when_it_is_settled(candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> None:
    """An hour after a settlement, what is settled next changes nothing; at the settlement itself it is known."""
    eight = 8 * 3_600_000
    t = SIMULATED_START + 10 * DAY + 3_600_000
    later = {k: r.with_columns(rate=pl.when(pl.col("time") > t).then(1.0).otherwise(pl.col("rate"))) for k, r in rates.items()}
    a, b = panel(candles, rates, END), panel(candles, later, END)
    i, old, new = a.names.index("funding"), a.times <= t, a.times >= t - 3_600_000 + eight
    assert np.isfinite(a.X[a.times >= SIMULATED_START + DAY, i]).all()
    assert np.array_equal(a.X[old, i], b.X[old, i], equal_nan=True)
    assert (b.X[new, i] == 1e4).all()


@pytest.mark.parametrize("feature", [f.name for f in FEATURES if f.warmup])
def test_warmup_is_enough_and_needed(candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame], feature: str) -> None:
    """The declared warm-up gives a value, and it is the value of the whole history."""
    f = next(x for x in FEATURES if x.name == feature)
    a = panel(candles, rates, END, start=END)
    short = {k: c.filter(pl.col("time") >= END - (f.warmup + 1) * STEP) for k, c in candles.items()}
    b = panel(short, rates, END, start=END)
    i = a.names.index(feature)
    assert np.isfinite(b.X[:, i]).all()
    np.testing.assert_allclose(b.X[:, i], a.X[:, i], rtol=1e-9, atol=1e-12)


def test_predictions(demo: Demo, candles: dict[str, pl.DataFrame], rates: dict[str, pl.DataFrame]) -> None:
    predictor = load_predictor(demo.data / "models", demo.job.s)
    t = SIMULATED_START + 12 * DAY
    before, after = panel(candles, rates, END), panel({k: spoil(c, t) for k, c in candles.items()}, rates, END)
    rows = np.flatnonzero((before.times <= t) & (before.times > t - DAY))
    assert [x.prob for x in predictor.predict(before, rows)] == pytest.approx([x.prob for x in predictor.predict(after, rows)], rel=1e-9)
    later = np.flatnonzero(before.times == t + DAY)
    assert [x.prob for x in predictor.predict(before, later)] != [x.prob for x in predictor.predict(after, later)]
