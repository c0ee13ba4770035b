"""Labels against plain loops, and splits against brute force: nothing is known before its time, and no moment is shared between what teaches and what judges."""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realdeal.features import STEP, Panel
from realdeal.labels import CLIP, Kind, Labels, direction, forward_return, make_labels, scaled_return, triple_barrier
from realdeal.splits import LEARN, SHARES, Fold, blocks, check_split, combinatorial, paths, walk_forward
from realdeal.types import DAY, HOUR, MINUTE

KINDS: tuple[Kind, ...] = ("direction", "return", "barrier")
HORIZONS = st.sampled_from((15, 30, 60, 120))
WIDTHS = st.sampled_from((0.3, 0.7, 1.0, 2.0))


def made(seed: int, symbols: int, n: int, gaps: float, halts: float) -> Panel:
    """A panel of random walks; a share `gaps` of its rows is missing, `halts` was not traded. Prices are coarse: ties and touches to the cent are common."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(symbols), n)
    close = np.concatenate([100 * 1.01 ** np.round(rng.normal(0, 1, n)).cumsum() for _ in range(symbols)])
    sigma = rng.choice([0.01, 0.004, math.log(1.01), 0.0, np.nan], symbols * n, p=[0.4, 0.2, 0.3, 0.05, 0.05])
    p = Panel(("BTC/USDT", "ETH/USDT")[:symbols], np.tile(np.arange(n) * STEP, symbols), group, np.zeros((len(group), 1)), close,
        close * 1.01 ** rng.integers(0, 3, len(group)), close * 1.01 ** -rng.integers(0, 3, len(group)), sigma, rng.random(len(group)) >= halts, ("x",))
    return p.rows(rng.random(len(p)) >= gaps)


PANELS = st.builds(made, st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 60), st.sampled_from((0.0, 0.05)), st.sampled_from((0.0, 0.05)))


def life(p: Panel, row: int, end: int) -> list[int] | None:
    """The rows from `row` to the one of time `end`, or None where one is missing or was not traded."""
    there = {(int(g), int(t)): i for i, (g, t) in enumerate(zip(p.group, p.times, strict=True))}
    rows = [there.get((int(p.group[row]), t), -1) for t in range(int(p.times[row]), end + 1, STEP)]
    return rows if all(i >= 0 and p.real[i] for i in rows) else None


# A plain reading of the rules, one row at a time.

def plain_return(p: Panel, i: int, end: int) -> float:
    rows = life(p, i, end)
    return math.nan if rows is None else float(np.log(p.close[rows[-1]] / p.close[i]))


def plain_barrier(p: Panel, i: int, horizon: int, width: float, untouched: str = "none") -> tuple[float, int]:
    end, reach = int(p.times[i]) + horizon * MINUTE, width * p.sigma[i] * math.sqrt(horizon / 15)
    if not reach > 0: return math.nan, end
    for t in range(int(p.times[i]) + STEP, end + 1, STEP):
        rows = life(p, i, t)
        if rows is None: return math.nan, end
        up, down = p.high[rows[-1]] >= p.close[i] * np.exp(reach), p.low[rows[-1]] <= p.close[i] * np.exp(-reach)
        if up and down: return math.nan, end
        if up or down: return float(up), t
    moved = plain_return(p, i, end)
    return (float(moved > 0) if untouched == "sign" and moved != 0 else math.nan), end


@given(PANELS, HORIZONS, WIDTHS, st.sampled_from(("none", "sign")))
def test_barriers_are_those_of_a_plain_loop(p: Panel, horizon: int, width: float, untouched: Any) -> None:
    y, ends = triple_barrier(p, horizon, width, untouched)
    told = [plain_barrier(p, i, horizon, width, untouched) for i in range(len(p))]
    np.testing.assert_array_equal(y, [a for a, _ in told])
    assert ends.dtype == np.int64 and ends.tolist() == [b for _, b in told]


@given(PANELS, HORIZONS, WIDTHS)
def test_returns_are_those_of_a_plain_loop(p: Panel, horizon: int, width: float) -> None:
    over = [plain_return(p, i, int(t) + horizon * MINUTE) for i, t in enumerate(p.times)]
    forward = forward_return(p, horizon)
    np.testing.assert_allclose(forward, over, rtol=1e-12, atol=1e-15)
    for x, z, s, y in zip(forward, scaled_return(p, forward, horizon), p.sigma, make_labels(p, "return", horizon).y, strict=True):
        assert (math.isnan(z) and math.isnan(y)) if math.isnan(x) or not s > 0 else (math.isclose(z * s * math.sqrt(horizon / 15), x, abs_tol=1e-15) and y == max(-CLIP, min(CLIP, z)))
    told = make_labels(p, "barrier", horizon, width)
    np.testing.assert_allclose(told.forward, [plain_return(p, i, int(e)) for i, e in enumerate(told.ends)], rtol=1e-12, atol=1e-15)


@given(PANELS, HORIZONS, WIDTHS)
def test_no_label_looks_past_the_data_or_across_a_gap(p: Panel, horizon: int, width: float) -> None:
    for kind in KINDS:
        told = make_labels(p, kind, horizon, width)
        assert ((told.ends > p.times) & (told.ends <= p.times + horizon * MINUTE)).all()
        for i in np.flatnonzero(np.isfinite(told.y) | np.isfinite(told.forward)):
            assert life(p, i, int(told.ends[i])) is not None, (kind, i)
            assert told.ends[i] <= p.times[p.group == p.group[i]].max()
        unknown = np.isnan(told.y)
        assert (told.ends[unknown] == p.times[unknown] + horizon * MINUTE).all()
        assert np.isin(told.y[~unknown], (0.0, 1.0)).all() if kind != "return" else (np.abs(told.y[~unknown]) <= CLIP).all()


@given(PANELS, HORIZONS, WIDTHS, st.integers(0, 60), st.integers(0, 10**6))
def test_what_was_known_stays_whatever_comes_after(p: Panel, horizon: int, width: float, bar: int, seed: int) -> None:
    t, rng = bar * STEP, np.random.default_rng(seed)
    later, wild = p.times > t, np.exp(rng.normal(0, 0.05, len(p)))
    other = replace(p, close=np.where(later, p.close * wild, p.close), high=np.where(later, p.high * wild * 1.02, p.high), low=np.where(later, p.low * wild / 1.02, p.low),
        sigma=np.where(later, 0.02, p.sigma), real=np.where(later, rng.random(len(p)) < 0.9, p.real))
    kept = ~later | (rng.random(len(p)) < 0.8)
    for kind in KINDS:
        known = (before := make_labels(p, kind, horizon, width)).ends <= t
        for future, there in ((other, np.ones(len(p), bool)), (other.rows(kept), kept), (p.rows(~later), ~later)):
            after = make_labels(future, kind, horizon, width)
            for name in ("y", "ends", "forward"): np.testing.assert_array_equal(getattr(after, name)[known[there]], getattr(before, name)[known & there], err_msg=f"{kind} {name}")


# Scenarios: an hour ahead, sigma 1 % a bar, so that the barriers (width 1) of a close of 100 stand at 102.02 and 98.02.
# Each table is the row itself and its next bars; the label is that of the first row: y, the bar at whose close it is known, what is known of the return by then.

SCENARIOS = {
    "straight up": ("""
        high    low     close
        100     100     100
        102.5   99.9    102     # touched at once
        103     101     103
        103     90      95      # too late
        95      95      95""", 1.0, 1, 102),
    "straight down, by a wick": ("""
        100     100     100
        101     97      101     # the low touched, whatever the close says
        110     100     110""", 0.0, 1, 101),
    "up in the last bar of the hour": ("""
        100     100     100
        101     99      100
        101     99      100
        101     99      100
        102.03  99      101""", 1.0, 4, 101),
    "up in the first bar after it": ("""
        100     100     100
        101     99      100
        101     99      100
        101     99      100
        101     99      101
        105     99      105""", math.nan, 4, 101),
    "both in one bar": ("""
        100     100     100
        101     99      100
        103     97      100     # which came first?
        103     100     103
        103     100     103""", math.nan, 4, 103),
    "the row's own bar does not count": ("""
        103     97      100
        101     99      100
        101     97.9    98""", 0.0, 2, 98),
    "a halt after the touch": ("""
        100     100     100
        103     99      102
        102     102     102     halt
        102     102     102""", 1.0, 1, 102),
    "a halt before the touch": ("""
        100     100     100
        101     99      100
        100     100     100     halt
        103     99      102
        103     99      102""", math.nan, 4, math.nan),
    "a missing bar before the touch": ("""
        100     100     100
        101     99      100
        100     100     100     missing
        103     99      102
        103     99      102""", math.nan, 4, math.nan),
    "the row itself in a halt": ("""
        100     100     100     halt
        103     99      102
        103     99      102
        103     99      102
        103     99      102""", math.nan, 4, math.nan),
    "the data ends before a touch": ("""
        100     100     100
        101     99      100
        101     99      100""", math.nan, 4, math.nan),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario(name: str) -> None:
    table, y, bar, close = SCENARIOS[name]
    lines = [x.split("#")[0].split() for x in table.strip().splitlines() if "close" not in x.split("#")[0]]
    high, low, last = np.array([[float(v) for v in x[:3]] for x in lines]).T
    n, words = len(lines), [x[3:] for x in lines]
    p = Panel(("BTC/USDT",), np.arange(n) * STEP, np.zeros(n, int), np.zeros((n, 1)), last, high, low, np.full(n, 0.01), np.array([w != ["halt"] for w in words]), ("x",))
    told = make_labels(p.rows(np.array([w != ["missing"] for w in words])), "barrier", 60)
    assert (told.ends[0] / STEP, math.isnan(told.y[0]) or told.y[0]) == (bar, math.isnan(y) or y)
    np.testing.assert_allclose(told.forward[0], math.log(close / 100), atol=1e-12)


@pytest.mark.parametrize("later", [0, 50])
def test_symbols_do_not_see_each_other(later: int) -> None:
    p = made(3, 2, 50, 0.0, 0.0)
    p = replace(p, times=p.times + p.group * later * STEP)      # 50: the second symbol begins when the first has ended
    for kind in KINDS:
        both = make_labels(p, kind, 60)
        for g in (0, 1):
            alone = make_labels(replace(p.rows(p.group == g), group=np.zeros(50, int)), kind, 60)
            np.testing.assert_array_equal(both.y[p.group == g], alone.y)
            np.testing.assert_array_equal(both.ends[p.group == g], alone.ends)


def test_an_empty_panel_has_no_labels() -> None:
    p = made(0, 1, 1, 0.0, 0.0).rows(np.zeros(1, bool))
    for kind in KINDS: assert len(make_labels(p, kind, 60).y) == len(make_labels(p, kind, 60).ends) == 0


# Splits. Rows of an hour each, so that brute force, every row against every other, stays quick.

DAYS = st.integers(6, 14)
EMBARGOS = st.sampled_from((0, HOUR, 5 * HOUR, DAY))


def rows_of(days: int, seed: int, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """times, ends, group of two symbols; some labels are known before the horizon."""
    times = np.tile(np.arange(0, days * DAY, HOUR), 2)
    early = np.random.default_rng(seed).integers(1, horizon // 60 + 1, len(times)) * HOUR
    return times, times + early, np.repeat([0, 1], len(times) // 2)


def sharing(times: np.ndarray, ends: np.ndarray, test: np.ndarray, embargo: int = 0) -> np.ndarray:
    """Which rows' lives [time, end] meet one of those of the test rows, or begin within `embargo` after its end: every row against every other."""
    from_, to = times[test][None], ends[test][None]
    return ((times[:, None] <= to + embargo) & (ends[:, None] >= from_)).any(1)


FOLDS = st.one_of(
    st.builds(lambda days, held, horizon, embargo: (days, combinatorial(0, days * DAY, 5, held, horizon, embargo)), DAYS, st.integers(1, 4), st.sampled_from((60, 240, 1440)), EMBARGOS),
    st.builds(lambda days, every, horizon, embargo: (days, walk_forward(0, 3 * DAY, days * DAY, every, horizon, embargo)), DAYS, st.integers(1, 3), st.sampled_from((60, 240, 1440)), EMBARGOS))


@given(FOLDS, st.integers(0, 10**6))
@settings(max_examples=40)
def test_purging_is_that_of_brute_force(made_folds: tuple[int, list[Fold]], seed: int) -> None:
    days, folds = made_folds
    for f in folds:
        times, ends, group = rows_of(days, seed, f.horizon)
        full = times + f.horizon * MINUTE
        test, among = f.test_mask(times), np.any([(times >= a) & (times < b) for a, b in f.train], axis=0)
        np.testing.assert_array_equal(f.train_mask(times), among & ~sharing(times, full, test, f.embargo))
        # Labels that were known early save their rows before a test; after one every label counts as if it had lasted until the horizon.
        kept = f.train_mask(times, ends)
        np.testing.assert_array_equal(kept, among & ~sharing(times, np.where(test, full, ends), test, f.embargo))
        assert (f.train_mask(times) & ~kept).sum() == 0
        if kept.any(): assert check_split(times, ends, group, kept, test, f.embargo) == []


@given(DAYS, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 6)))
def test_walk_forward_tests_every_day_once_after_what_it_learned(days: int, every: int, rolling: int | None) -> None:
    t = np.arange(0, days * DAY, HOUR)
    folds = walk_forward(0, 3 * DAY, days * DAY, every, 240, rolling_days=rolling)
    assert (sum(f.test_mask(t).astype(int) for f in folds) == (t >= 3 * DAY)).all()
    for f in folds:
        ((a, b),), ((c, d),) = f.train, f.test
        assert b == c < d <= min(c + every * DAY, days * DAY) and t[f.train_mask(t)].max() + 240 * MINUTE < c
        assert a == (0 if rolling is None else max(0, c - rolling * DAY))


@given(st.integers(2, 7), st.integers(1, 6), st.integers(7, 40))
def test_every_row_is_tested_on_every_path(groups: int, held: int, days: int) -> None:
    if held >= groups: return
    t = np.arange(0, days * DAY, HOUR)
    folds = combinatorial(0, days * DAY, groups, held, 60)
    assert len(folds) == math.comb(groups, held) and len({f.test for f in folds}) == len(folds)
    assert (sum(f.test_mask(t).astype(int) for f in folds) == paths(groups, held)).all()
    for f in folds:
        assert len(f.test) == held and not (f.test_mask(t) & f.train_mask(t)).any()
        assert sum(b - a for a, b in (*f.train, *f.test)) == days * DAY and all(a % DAY == 0 for a, _ in (*f.train, *f.test))


@given(st.integers(20, 400), st.integers(0, 60), st.integers(0, 90), st.sampled_from((15, 240, 1440)), st.sampled_from((0, 6 * HOUR)), st.integers(0, 3))
def test_blocks_follow_each_other_and_share_nothing(days: int, test_days: int, reserve_days: int, horizon: int, embargo: int, seed: int) -> None:
    start, end = 1_577_836_800_000, 1_577_836_800_000 + (days + test_days + reserve_days) * DAY
    b = blocks(start, end, test_days, reserve_days, horizon, embargo)
    t = np.arange(start, end, HOUR)
    ends = t + np.random.default_rng(seed).integers(1, horizon // 15 + 1, len(t)) * STEP
    edges = list(b.edges.values())
    assert edges[0][0] == start and edges[-1][1] == end and all(x[1] == y[0] for x, y in zip(edges, edges[1:], strict=False)) and b.learn == (start, start + days * DAY)
    assert list(b.edges) == [*SHARES, "test", "reserve"] and all(x % DAY == 0 for e in edges for x in e)
    assert all(abs((b.edges[n][1] - b.edges[n][0]) / DAY - share * days) <= 1 for n, share in SHARES.items())
    assert [b.mask(n, t).sum() / 24 for n in ("test", "reserve")] == [test_days, reserve_days]
    for known in (None, ends):
        masks = {n: b.mask(n, t, known) for n in b.edges}
        assert sum(m.astype(int) for m in masks.values()).max() == 1
        for n in LEARN:
            until = t + horizon * MINUTE if known is None else known
            lo, hi = b.edges[n]
            np.testing.assert_array_equal(masks[n], (t >= lo + (embargo if n != "train" else 0)) & (t < hi) & (until < hi))
        for one, two in zip(LEARN, [*LEARN[1:], "test"], strict=True):
            if masks[two].any(): assert check_split(t, t + horizon * MINUTE if known is None else known, np.zeros(len(t), int), masks[one], masks[two]) == []


# The check itself, on any masks whatever.

def count(lines: list[str], what: str) -> int:
    return next((int(x.split()[0].replace(",", "")) for x in lines if what in x), 0)


@given(st.integers(0, 10**6), st.sampled_from((0.02, 0.2)), st.sampled_from((60, 240)), EMBARGOS)
@settings(max_examples=60)
def test_the_check_counts_as_brute_force_does(seed: int, share: float, horizon: int, embargo: int) -> None:
    times, ends, group = rows_of(8, seed, horizon)
    rng = np.random.default_rng(seed)
    # Stretches and single rows on both sides, some rows twice, few values of the features.
    test = (times // (rng.integers(1, 40) * HOUR) % 3 == 0) & (rng.random(len(times)) < 0.9)
    train = np.where(rng.random(len(times)) < share, rng.random(len(times)) < 0.5, ~test) & (rng.random(len(times)) < 0.9)
    times = np.where(rng.random(len(times)) < 0.02, np.roll(times, 1), times)
    ends = np.maximum(ends, times + HOUR)
    x = rng.integers(0, 12, (len(times), 3)).astype(float)
    x[rng.random(x.shape) < 0.2] = np.nan
    lines = check_split(times, ends, group, train, test, embargo, x)
    only = train & ~test
    assert count(lines, "both teach and judge") == (train & test).sum()
    shared = only & sharing(times, ends, test)
    assert count(lines, "purge is off") == shared.sum()
    assert count(lines, "within the embargo") == (only & ~shared & sharing(times, ends, test, embargo)).sum()
    known = np.isfinite(x).mean(1) >= 0.5
    judged = {repr(v.tolist()) for v in x[test & known]}
    assert count(lines, "feature for feature") == sum(repr(v.tolist()) in judged for v in x[only & known])
    keys = list(zip(times[train | test].tolist(), group[train | test].tolist(), strict=True))
    assert count(lines, "time and symbol of another") == len(keys) - len(set(keys))
    moments = sorted({int(v) for v in times[test]})
    def among(t: int) -> bool:
        before, after = [m for m in moments if m <= t], [m for m in moments if m >= t]
        return bool(before and after) and after[0] - before[-1] <= DAY
    assert count(lines, "shuffled") == sum(among(int(t)) for t in times[only])


def test_every_copy_among_many_rows_is_found() -> None:
    n = 120_000
    times, x = np.arange(n) * HOUR, np.random.default_rng(0).normal(size=(n, 2))
    x[[0, n // 2, n - 3]] = x[n - 1]
    learn = times < times[n - 2]
    assert count(check_split(times, times + MINUTE, np.zeros(n, int), learn, ~learn, x=x), "feature for feature") == 3


def test_two_symbols_at_one_moment_are_two_rows() -> None:
    times, group = np.array([0, 10, 10, 20]) * DAY, np.array([0, 0, 1, 1])
    learn = np.array([True, False, False, False])
    assert check_split(times, times + HOUR, group, learn, ~learn) == []
    assert count(check_split(times, times + HOUR, np.zeros(4, int), learn, ~learn), "time and symbol of another") == 1


def test_labels_that_end_at_a_barrier_leak_nothing_through_their_returns() -> None:
    """Everything in a row of labels is known by `ends`: purging by it is enough for the returns too."""
    p = made(5, 1, 4000, 0.0, 0.0)
    p = replace(p, sigma=np.full(len(p), 0.005))
    told = make_labels(p, "barrier", 240)
    b = blocks(0, 41 * DAY, 1, 0, 240)
    cut = b.edges["weigh"][1]
    spoiled = replace(p, close=np.where(p.times >= cut, 1.0, p.close), high=np.where(p.times >= cut, 1.0, p.high), low=np.where(p.times >= cut, 1.0, p.low))
    mine, theirs = (x.forward[b.mask("weigh", p.times, told.ends)] for x in (told, make_labels(spoiled, "barrier", 240)))
    assert len(mine) > 100
    np.testing.assert_array_equal(mine, theirs)


def test_the_answer_of_a_tie_is_none() -> None:
    assert np.isnan(direction(np.array([0.0, -0.0, np.nan]))).all() and direction(np.array([1e-12, -1e-12])).tolist() == [1.0, 0.0]
    assert isinstance(make_labels(made(1, 1, 9, 0.0, 0.0), "direction", 15), Labels)
