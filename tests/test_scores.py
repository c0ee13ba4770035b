"""realdeal.scores: intervals that hold what they promise, rows against a plain loop, verdicts at their edges."""
import json, math
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from realdeal import scores
from realdeal.types import DAY, MINUTE, BadData

START = 1_704_067_200_000     # 2024-01-01


def forecasts(seed, days=40, skill=0.05):
    "Times, probabilities that are right as often as they say, log returns with ties and gaps."
    rng, n = np.random.default_rng(seed), days * 96
    prob = np.clip(0.5 + rng.normal(0, skill, n), 0.05, 0.95)
    forward = np.where(rng.random(n) < prob, 1, -1) * np.abs(rng.normal(0, 0.004, n))
    forward[rng.random(n) < 0.05], prob[rng.random(n) < 0.05], prob[rng.random(n) < 0.02] = 0.0, np.nan, 0.5
    forward[-16:] = np.nan
    return START + np.arange(n) * 15 * MINUTE, prob, forward


# Intervals

def test_a_95_percent_interval_holds_the_truth_95_times_in_100():
    "Days differ in their accuracy and in their number of rows; the truth is the mean over many such days."
    def world(rng, days=80):
        rows, share = rng.integers(20, 96, days), np.clip(rng.normal(0.53, 0.15, days), 0, 1)
        at = np.concatenate([START + d * DAY + np.arange(n) * 15 * MINUTE for d, n in enumerate(rows)])
        return (rng.random(len(at)) < np.repeat(share, rows)).astype(float), at
    truth, by_day, by_row = 0.53, 0, 0
    for i in range(300):
        x, at = world(np.random.default_rng(i))
        low, high = scores.day_bootstrap(x, at, seed=i)
        half = 1.96 * math.sqrt(x.mean() * (1 - x.mean()) / len(x))
        by_day, by_row = by_day + (low <= truth <= high), by_row + (abs(x.mean() - truth) <= half)
    assert 0.91 <= by_day / 300 <= 0.98 and by_row / 300 < 0.75


def test_a_second_symbol_that_says_the_same_is_no_evidence():
    at, prob, forward = forecasts(1)
    x = (np.sign(forward) == np.sign(prob - 0.5)).astype(float)
    assert scores.day_bootstrap(np.r_[x, x], np.r_[at, at], 7) == scores.day_bootstrap(x, at, 7)
    low, high = scores.day_bootstrap(x, at, 7)
    wide = scores.day_bootstrap(x, at, 7, level=0.99)
    assert wide[0] < low < x.mean() < high < wide[1]
    assert all(map(math.isnan, scores.day_bootstrap(np.array([]), np.array([]), 7)))


# Rows by threshold and by month

@pytest.mark.parametrize('own', [False, True], ids=['one threshold', 'a threshold for each row'])
def test_by_threshold_is_what_a_plain_loop_says(own):
    at, prob, forward = forecasts(2)
    asked = [(c, np.full(len(at), t) if own else t) for c, t in ((1.0, 0.0), (0.2, 0.08), (0.05, 0.15), (0.01, 2.0))]
    if own: asked[1][1][:1000] = 0.2
    for (want, limit), row in zip(asked, scores.by_threshold(prob, forward, at, asked, 0.0012, 7), strict=True):
        labelled, right, ups, net = 0, 0, 0, []
        for i in range(len(at)):
            if math.isnan(forward[i]) or forward[i] == 0: continue
            labelled += 1
            if math.isnan(prob[i]) or prob[i] == 0.5 or 2 * abs(prob[i] - 0.5) < (limit[i] if own else limit): continue
            side = 1 if prob[i] > 0.5 else -1
            right, ups = right + (forward[i] * side > 0), ups + (forward[i] > 0)
            net.append(forward[i] * side * 1e4 - 12)
        assert (row.asked, row.rows) == (want, len(net)) and row.coverage == len(net) / labelled and math.isclose(row.threshold, np.mean(limit))
        if not net: assert all(map(math.isnan, row[4:])); continue
        assert math.isclose(row.accuracy, right / len(net)) and math.isclose(row.base_rate, max(ups, len(net) - ups) / len(net)) and math.isclose(row.net_bp, np.mean(net))
        assert row.low < row.accuracy < row.high and row.net_low < row.net_bp < row.net_high


def test_a_row_at_its_threshold_speaks():
    row, = scores.by_threshold(np.full(9, .6), np.ones(9), np.arange(9) * DAY, [(1.0, 2 * abs(.6 - .5))], 0.0, 7)
    assert row.rows == 9


def test_without_labels_nothing_has_a_coverage():
    row, = scores.by_threshold(np.full(9, .6), np.full(9, np.nan), np.arange(9) * DAY, [(1.0, 0.0)], 0.0, 7)
    assert row.rows == 0 and math.isnan(row.coverage) and scores.by_month(np.full(9, .6), np.full(9, np.nan), np.arange(9) * DAY, 0.0, 7) == []


def test_months_are_utc_and_share_out_the_rows():
    at, prob, forward = forecasts(3, days=70)
    months, whole = scores.by_month(prob, forward, at, 0.0012, 7), scores.by_threshold(prob, forward, at, [(1.0, 0.0)], 0.0012, 7)[0]
    assert [m.month for m in months] == ['2024-01', '2024-02', '2024-03'] and sum(m.rows for m in months) == whole.rows
    assert math.isclose(sum(m.accuracy * m.rows for m in months), whole.accuracy * whole.rows) and math.isclose(sum(m.net_bp * m.rows for m in months), whole.net_bp * whole.rows)
    edge = scores.by_month(np.full(2, .6), np.ones(2), np.array([START - 1, START]), 0.0, 7)
    assert [(m.month, m.rows) for m in edge] == [('2023-12', 1), ('2024-01', 1)]


def test_the_score_agrees_with_its_threshold_row():
    at, prob, forward = forecasts(4)
    side = np.where(2 * np.abs(prob - 0.5) >= 0.08, np.sign(np.nan_to_num(prob, nan=0.5) - 0.5), 0)
    last = np.r_[np.full(16, np.nan), forward[:-16]]
    got, row = scores.side_score(side, prob, forward, last, at, 0.0012, 7), scores.by_threshold(prob, forward, at, [(.2, .08)], 0.0012, 7)[0]
    assert (got['accuracy'], got['accuracy_low'], got['accuracy_high'], got['coverage'], got['rows']) == (row.accuracy, row.low, row.high, row.coverage, row.rows)
    assert (got['net_bp'], got['net_low'], got['net_high']) == (row.net_bp, row.net_low, row.net_high)
    assert math.isclose(got['persistence'] + got['reversal'], 1) and got['accuracy_all'] == scores.by_threshold(prob, forward, at, [(1.0, 0.0)], 0.0012, 7)[0].accuracy
    blind = scores.side_score(side, prob, forward, np.full(len(at), np.nan), at, 0.0012, 7)
    assert math.isnan(blind['persistence']) and math.isnan(blind['reversal']) and blind['accuracy'] == got['accuracy']
    silent = scores.side_score(np.zeros(len(at)), prob, forward, last, at, 0.0012, 7)
    assert silent['coverage'] == 0 == silent['enough'] and math.isnan(silent['accuracy']) and math.isnan(silent['net_low']) and silent['accuracy_all'] == got['accuracy_all']


# Calibration of probabilities

@pytest.mark.parametrize('n', [2_000, 50_000])
def test_an_honest_forecast_has_a_small_ece_and_a_boastful_one_a_large(n):
    rng = np.random.default_rng(n)
    p = rng.uniform(0.3, 0.7, n)
    y = (rng.random(n) < p).astype(float)
    honest, boast, timid = scores.ece(p, y), scores.ece(0.5 + 2 * (p - 0.5), y), scores.ece(0.5 + 0.2 * (p - 0.5), y)
    assert honest < 2 * 1.3 / math.sqrt(n) and min(boast, timid) > 0.05 > honest and scores.brier(p, y) < 0.25 and scores.log_loss(p, y) < math.log(2)
    assert 0.6 < np.mean([scores.ece(p, (rng.random(n) < p).astype(float)) for _ in range(30)]) * math.sqrt(n) / 1.3 < 1.4      # the expectation that the card states


def test_swapped_arguments_are_refused():
    at, prob, forward = forecasts(5)
    y = np.where(np.isfinite(forward) & (forward != 0), forward > 0, np.nan)
    for f in (scores.ece, scores.brier, scores.log_loss, scores.reliability):
        assert f(prob, y)
        with pytest.raises(BadData, match=r'order is \(prob, y\)'): f(y, prob)


# The curve

rows = st.lists(st.tuples(st.one_of(st.just(0.5), st.just(math.nan), st.floats(0.01, 0.99)), st.one_of(st.just(0.0), st.just(math.nan), st.floats(-0.1, 0.1).filter(lambda x: abs(x) > 1e-9))), max_size=60)


@settings(max_examples=200, deadline=None)
@given(rows, st.integers(1, 20), st.randoms())
def test_coverage_curve(rows, points, random):
    p, f = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows], float)
    curve = scores.coverage_curve(p, f, 0.001, points)
    known = np.isfinite(p) & np.isfinite(f) & (f != 0)
    speak = known & (np.round(np.abs(p - 0.5), 12) > 0)
    assert len(curve) <= points and bool(curve) == bool(speak.any())
    shares = [c for c, *_ in curve]
    assert all(0 < c <= 1 and 0 <= a <= 1 for c, a, _ in curve) and shares == sorted(shares)
    if curve: assert math.isclose(shares[-1], speak.sum() / known.sum()) and math.isclose(curve[-1][2], (f * np.sign(p - .5))[speak].mean() * 1e4 - 10, rel_tol=1e-9, abs_tol=1e-6)
    order = list(range(len(rows)))
    random.shuffle(order)
    np.testing.assert_allclose(scores.coverage_curve(p[order], f[order], 0.001, points), curve)            # the order in the file chooses nothing
    np.testing.assert_allclose(scores.coverage_curve(1 - p, -f, 0.001, points), curve, atol=1e-6)          # nor does the name of a direction


# The verdict

GOOD = {'accuracy': .67, 'accuracy_low': .66, 'accuracy_high': .68, 'coverage': .06, 'net_bp': 3., 'net_low': 1., 'net_high': 5., 'base_rate': .52, 'persistence': .49, 'reversal': .51}


@pytest.mark.parametrize('change, met', [
    ({}, True), ({'accuracy': .65, 'accuracy_low': .56}, True), ({'accuracy': .6499}, False), ({'coverage': .05}, True), ({'coverage': .0499}, False),
    ({'base_rate': .66}, False), ({'base_rate': .6599}, True), ({'persistence': .66}, False), ({'reversal': .67}, False), ({'persistence': math.nan, 'reversal': math.nan}, True),
    ({'accuracy_low': math.nan}, False), ({'accuracy': math.nan}, False), ({'base_rate': math.nan}, False), ({'net_bp': -9., 'net_low': -12., 'net_high': -6.}, True)])
def test_65_percent_is_met_by_its_definition_only(change, met):
    t = scores.triple({**GOOD, **change}, untouched=True)
    assert t.met is met and bool(t.why) is not met
    assert ('is met.' in t.sentence) is met and ('missed, because' in t.sentence) is not met
    assert not scores.triple({**GOOD, **change}, untouched=False).met


def test_an_empty_score_is_a_miss_and_says_so():
    t = scores.triple({}, untouched=True)
    assert not t.met and t.said.startswith('no side was taken') and 'no side was taken' in t.why


# The ceiling

def test_what_was_measured_is_plausible_and_known_leaks_are_not():
    for horizon, row in scores.PLAUSIBLE.items():
        for coverage, accuracy in zip(scores.COVERAGES, row, strict=True): assert not scores.suspicion(accuracy, horizon, coverage) and scores.suspicion(accuracy + scores.MARGIN + 1e-6, horizon, coverage)
    for leak in (0.65, 0.67, 0.70): assert scores.suspicion(leak, 15, 1.0)       # an unclosed bar, shuffled folds, a centred mean: at full coverage
    assert math.isclose(scores.plausible(60, 0.1), (0.540 + 0.559) / 2 + scores.MARGIN) and math.isclose(scores.plausible(30, 1), (0.527 + 0.522) / 2 + scores.MARGIN)      # halfway in the logarithm
    assert scores.suspicion(0.65, 240, 0.05) and not scores.suspicion(0.65, 1, 0.05)


@given(st.floats(0.1, 20_000), st.floats(1e-4, 1), st.floats(1e-4, 1))
def test_the_ceiling_never_falls_as_fewer_rows_speak(horizon, a, b):
    few, many = scores.plausible(horizon, min(a, b)), scores.plausible(horizon, max(a, b))
    assert few >= many - 1e-12 and 0.52 + scores.MARGIN <= many and few <= 0.825 + scores.MARGIN
    if horizon >= 60: assert few == scores.plausible(60, min(a, b))


# SHAP for a card

def test_explain_keeps_what_it_was_given():
    rng = np.random.default_rng(0)
    X, shap = rng.normal(size=(300, 3)), rng.normal(size=(300, 3)) * [1, 3, 2]
    X[:, 2], X[0, 1] = np.nan, np.nan
    told = scores.explain(shap, X, ['a', 'b', 'c'], rng.random(300), sample=1000)
    assert told['names'] == ['b', 'c', 'a'] and told['rows'] == 300
    np.testing.assert_allclose(told['mean'], np.abs(shap).mean(0)[[1, 2, 0]], rtol=1e-3)
    b, c, a = told['sample']
    np.testing.assert_allclose(b['shap'], shap[:, 1], rtol=1e-2)                                      # fewer rows than the sample asks for: all of them, in order
    assert c['rank'] == [None] * 300 and b['rank'][0] is None and min(a['rank']) == 0 and max(a['rank']) > 0.99
    assert np.array_equal(np.argsort(a['rank'], kind='stable')[:1], [np.argmin(X[:, 0])])
    np.testing.assert_allclose(told['dependence'][2]['value'], X[:, 0], rtol=1e-3)
    json.dumps(told, allow_nan=False)


def test_regimes_of_one_volatility_are_one_and_unknown_ones_none():
    X = np.random.default_rng(0).normal(size=(100, 2))
    flat = scores.explain(X, X, ['a', 'b'], np.ones(100))['regimes']
    assert flat['rows'] == [100, 0, 0] and flat['high'] == [None, None]
    half = scores.explain(X, X, ['a', 'b'], np.where(np.arange(100) < 10, np.nan, np.arange(100.)))['regimes']
    assert half['rows'] == [30, 30, 30]
