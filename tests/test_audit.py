"""Every popular leak, planted one at a time into our own pipeline: the audit turns red each time, and is green without."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest

from realdeal.audit import SMALL, Check, Grown, Model, Pipeline, World, audit, made_world, our_pipeline
from realdeal.features import STEP, Panel
from realdeal.labels import Labels
from realdeal.settings import read_settings
from realdeal.splits import Blocks
from realdeal.types import DAY, HOUR

S = read_settings(env={}).override(model={**SMALL, "rounds": 40})
OURS = our_pipeline(S)


@pytest.fixture(scope="module")
def world() -> World:
    return made_world("realistic", 46, 5)


def with_column(p: Panel, name: str, x: np.ndarray) -> Panel:
    return replace(p, X=np.column_stack([p.X, x]), names=(*p.names, name))


def by_symbol(p: Panel, f: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """`f(times, close)` of each symbol, put together again."""
    out = np.full(len(p), np.nan)
    for g in range(len(p.symbols)): out[p.group == g] = f(p.times[p.group == g], p.close[p.group == g])
    return out


def features(leak: Callable[[Panel], Panel]) -> Pipeline:
    return replace(OURS, features=lambda w: leak(OURS.features(w)))


def unclosed_bar(times: np.ndarray, close: np.ndarray) -> np.ndarray:
    """The return of the four-hour bar that the row stands in, which closes later."""
    bar = (times - 1) // (4 * HOUR)
    last = np.searchsorted(bar, bar, "right") - 1
    return np.log(close[last] / close)


def centred(_: np.ndarray, close: np.ndarray) -> np.ndarray:
    return pl.Series(np.log(close)).rolling_mean(9, center=True).to_numpy() - np.log(close)


def following(_: np.ndarray, close: np.ndarray) -> np.ndarray:
    return np.append(np.diff(np.log(close)), np.nan)


def early_funding(w: World) -> Panel:
    """Each rate stands in the table eight hours before it was published."""
    return OURS.features(replace(w, funding={s: f.with_columns(pl.col("time") - 8 * HOUR) for s, f in w.funding.items()}))


def wrong_edge(p: Panel) -> Panel:
    """A bar is named by the moment at which it opens."""
    return replace(p, times=p.times - STEP)


def survivors(w: World) -> Panel:
    """Only symbols that still trade at the end are worth a column."""
    there = [s for s, c in w.candles.items() if c["time"][-1] >= w.end - STEP]
    return OURS.features(World({s: w.candles[s] for s in there}, w.funding, w.end))


def known_answers(p: Panel) -> Panel:
    return with_column(p, "momentum_quality", np.nan_to_num(OURS.labels(p).y, nan=0.5))


@dataclass(frozen=True)
class Scaled:
    """A model behind a scaler."""
    inner: Model
    mean: np.ndarray

    def prob(self, p: Panel) -> np.ndarray: return self.inner.prob(replace(p, X=p.X - self.mean))
    def parts(self) -> Mapping[str, bytes]: return {**self.inner.parts(), "select": self.inner.parts()["select"] + self.mean.tobytes()}


def scaler_on_all(p: Panel, labels: Labels, b: Blocks) -> Model:
    mean = np.nanmean(p.X, axis=0)
    return Scaled(OURS.fit(replace(p, X=p.X - mean), labels, b), mean)


def target_encoding(p: Panel, labels: Labels, b: Blocks) -> Model:
    """The mean answer of each hour of the day, over all rows that have an answer."""
    hour = p.times // HOUR % 24
    rate = np.array([np.nanmean(labels.y[hour == h]) for h in range(24)])
    return OURS.fit(with_column(p, "hour_rate", rate[hour]), labels, b)


def best_on_the_test(p: Panel, labels: Labels, b: Blocks) -> Model:
    """Several seeds, of which the one that does best on the test block is kept."""
    def right(m: Model) -> float:
        test = b.mask("test", p.times) & np.isfinite(labels.y)
        return float(((m.prob(p) > 0.5) == (labels.y > 0.5))[test].mean())
    fits = [our_pipeline(S.override(run={"seed": k}, model={"trials": 1})).fit(p, labels, b) for k in range(6)]
    return max(fits, key=right)


def thresholds_from_the_test(p: Panel, labels: Labels, b: Blocks) -> Model:
    m = OURS.fit(p, labels, b)
    assert isinstance(m, Grown)
    return replace(m, thresholds=((0.2, float(np.nanquantile(np.abs(m.prob(p)[b.mask("test", p.times)] - 0.5), 0.8))),))


class Unpurged(Blocks):
    def mask(self, name: str, times: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
        a, b = self.edges[name]
        return (times >= a) & (times < b)


class Shuffled(Blocks):
    def mask(self, name: str, times: np.ndarray, ends: np.ndarray | None = None) -> np.ndarray:
        first, last = self.edges["train"][0], self.edges["test"][1]
        drawn = np.random.default_rng(0).integers(0, 6, len(times))
        return (times >= first) & (times < last) & (drawn == ["train", "stop", "select", "calibrate", "weigh", "test"].index(name))


def split(kind: type[Blocks]) -> Pipeline:
    def make(p: Panel) -> Blocks:
        b = OURS.split(p)
        return kind(b.edges, b.horizon, b.embargo)
    return replace(OURS, split=make)


def copies(p: Panel) -> Panel:
    """Rows of the last days stand among the first ones again, with a little of the past rubbed off: "augmentation"."""
    if p.times[-1] - p.times[0] < 40 * DAY: return p
    at = np.flatnonzero(p.times >= OURS.split(p).edges["test"][0])[::5]
    early = np.flatnonzero(p.times < OURS.split(p).edges["stop"][0])[-len(at):]
    X = p.X.copy()
    X[early] = X[at]
    return replace(p, X=X)


def late_answers(p: Panel) -> Labels:
    """Answers that claim to be known an hour before they are."""
    a = OURS.labels(p)
    return replace(a, ends=a.ends - HOUR)


LEAKS: dict[str, tuple[str, Pipeline]] = {
    "unclosed higher-timeframe bar": ("future", features(lambda p: with_column(p, "bar_4h", by_symbol(p, unclosed_bar)))),
    "centred window": ("future", features(lambda p: with_column(p, "smooth", by_symbol(p, centred)))),
    "shift by -1": ("future", features(lambda p: with_column(p, "next", by_symbol(p, following)))),
    "scaler fitted on all": ("fit", replace(OURS, fit=scaler_on_all)),
    "shuffled folds": ("split", split(Shuffled)),
    "purge off": ("split", split(Unpurged)),
    "label as a feature": ("future", features(known_answers)),
    "funding before publication": ("future", replace(OURS, features=early_funding)),
    "target encoding over all rows": ("fit", replace(OURS, fit=target_encoding)),
    "selection on the test block": ("fit", replace(OURS, fit=best_on_the_test)),
    "duplicate rows over the split": ("split", features(copies)),
    "resample with the wrong edge": ("future", features(wrong_edge)),
    "global normalisation": ("future", features(lambda p: replace(p, X=p.X / np.nanstd(p.X, axis=0)))),
    "survivorship of symbols": ("future", replace(OURS, features=survivors)),
    "thresholds from the test block": ("fit", replace(OURS, fit=thresholds_from_the_test)),
    "answers known too early": ("labels", replace(OURS, labels=late_answers)),
    "too short a warm-up": ("warm-up", replace(OURS, warmup=OURS.warmup // 2)),
}


def failed(checks: list[Check]) -> dict[str, str]:
    return {c.name: c.detail for c in checks if not c.passed}


def test_ours_is_clean(world: World) -> None:
    checks = audit(OURS, world, at=4)
    assert failed(checks) == {} and [c.name for c in checks] == ["future", "warm-up", "labels", "split", "fit", "predictions"]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_caught(world: World, leak: str) -> None:
    check, pipe = LEAKS[leak]
    found = failed(audit(pipe, world, at=4))
    assert check in found, f"{leak}: {found or 'nothing was found'}"


@pytest.mark.parametrize("leak", ["centred window", "label as a feature", "shift by -1"])
def test_the_feature_is_named(world: World, leak: str) -> None:
    name = {"centred window": "smooth", "label as a feature": "momentum_quality", "shift by -1": "next"}[leak]
    assert name in failed(audit(LEAKS[leak][1], world, at=4))["future"]
