"""The feature store under two writers, kill -9 and amended data; the window against the whole history; the list against its page."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realdeal.features import FEATURES, NAMES, STEP, WARMUP, WARMUP_MINUTES, Feature, Panel, Window, catalogue, panel
from realdeal.featurestore import FeatureStore, _read_made, _write
from realdeal.market import funding, generate
from realdeal.store import CANDLES, Store, StoreKey
from realdeal.types import DAY, HOUR, MINUTE, BadData, Bar, Minute

REPO = Path(__file__).parent.parent
SYMBOLS = ["BTC/USDT", "ETH/USDT"]
START, DAYS = 1_704_067_200_000, 36  # from 2024-01-01 into February
END = START + DAYS * DAY
KEY = StoreKey(source="simulated", venue="emulator", market="features")
Frames = dict[str, pl.DataFrame]
DATA = os.environ.get("REALDEAL_DATA")


@pytest.fixture(scope="module")
def candles() -> Frames:
    made = generate("realistic", SYMBOLS, START, DAYS * 1440, seed=5)
    return {k: pl.DataFrame(dict(zip(CANDLES, (*c.columns, ["venue"] * len(c)), strict=True))) for k, c in made.items()}


@pytest.fixture(scope="module")
def rates() -> Frames:
    return {k: pl.DataFrame({"time": f.times, "rate": f.rates}) for k in SYMBOLS for f in [funding(k, START, DAYS * 1440, seed=5)]}


@pytest.fixture
def store(tmp_path: Path, candles: Frames, rates: Frames) -> Store:
    made = Store(tmp_path, KEY)
    for k in SYMBOLS: made.write(k, candles[k]), made.write_funding(k, rates[k])
    return made


@pytest.fixture
def kept(store: Store) -> Iterator[FeatureStore]:
    fs = FeatureStore(store, SYMBOLS)
    fs.update(START, END)
    yield fs
    fs.close()


def same(a: Panel, b: Panel, rtol: float = 1e-12) -> None:
    assert a.names == b.names and a.symbols == b.symbols
    for k in ("times", "group", "real"): np.testing.assert_array_equal(getattr(a, k), getattr(b, k), err_msg=k)
    for k in ("X", "close", "high", "low", "sigma"): np.testing.assert_allclose(getattr(a, k), getattr(b, k), rtol=rtol, atol=rtol, equal_nan=True, err_msg=k)


def moved(a: Panel, b: Panel) -> np.ndarray:
    """Where two panels of the same rows differ in any bit, (n, k)."""
    return ~((a.X == b.X) | (np.isnan(a.X) & np.isnan(b.X)))


def child(folder: Path, more: str = "") -> subprocess.Popen[str]:
    """Another process that updates the same store."""
    code = f"""
import os, signal
from pathlib import Path
from realdeal.featurestore import FeatureStore
from realdeal.store import Store, StoreKey
{more}
store = Store(Path({str(folder)!r}), StoreKey(source='simulated', venue='emulator', market='features'))
print(*FeatureStore(store, {SYMBOLS!r}).update({START}, {END}))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_writers_at_once(tmp_path: Path, store: Store, candles: Frames, rates: Frames) -> None:
    """One of them does the work, and whoever reads a file meanwhile reads a whole one."""
    both = [child(tmp_path), child(tmp_path)]
    place = FeatureStore(store, SYMBOLS)
    reads = 0
    while any(p.poll() is None for p in both):
        for file in place.folder.rglob("features.parquet"):
            reads += len(pl.read_parquet(file, hive_partitioning=False)) > 0
    said = sorted(tuple(map(int, p.communicate()[0].split())) for p in both)
    assert [p.returncode for p in both] == [0, 0] and reads > 0
    rows = sum(len(pl.read_parquet(f, hive_partitioning=False)) for f in place.folder.rglob("features.parquet"))
    assert said == [(0, 0, 0), (rows, 0, 2)], "the second one found it done"
    assert place.update(START, END) == (0, 0, 0)
    same(place.panel(START, END), panel(candles, rates, END, START))
    assert not [f for f in place.folder.rglob(".features*")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_killed_in_the_middle(tmp_path: Path, store: Store, candles: Frames, rates: Frames, nth: int, when: str) -> None:
    """kill -9 just before or after the nth file gets its name: what is there is whole, and the next update does the rest."""
    kill = f"""
move, count = os.replace, 0
def replace(a, b):
    global count
    count += 1
    if count == {nth} and {when!r} == 'before': os.kill(os.getpid(), signal.SIGKILL)
    move(a, b)
    if count == {nth}: os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""
    p = child(tmp_path, kill)
    assert p.wait(120) == -9
    fs = FeatureStore(store, SYMBOLS)
    files = sorted(fs.folder.rglob("features.parquet"))
    assert len(files) == nth - (when == "before") and all(_read_made(f) and len(pl.read_parquet(f, hive_partitioning=False)) for f in files)
    done = fs.update(START, END)
    assert done.months == 2 - len(files) // 2, "a month of which every symbol is there is not made again"
    same(fs.panel(START, END), panel(candles, rates, END, START))
    assert not [f for f in fs.folder.rglob(".features*")], "what the killed one left is cleared"


@pytest.mark.parametrize("how", ["cut", "noise", "empty", "gone"])
def test_a_broken_file_is_made_again(kept: FeatureStore, how: str) -> None:
    before, file = kept.panel(START, END), kept.file("ETH/USDT", "2024-01")
    content = file.read_bytes()
    if how == "gone": file.unlink()
    else: file.write_bytes({"cut": content[:-100], "noise": b"x" * 5000, "empty": b""}[how])
    assert kept.update(START, END).months == 1
    assert not moved(before, kept.panel(START, END)).any()


def test_a_changed_definition_computes_its_own_columns(store: Store, kept: FeatureStore, candles: Frames, rates: Frames) -> None:
    """Every other column is what stands in the files: values that nobody could compute stay."""
    for file in kept.folder.rglob("features.parquet"):
        made, df = _read_made(file), pl.read_parquet(file, hive_partitioning=False)
        assert made
        _write(file, df.with_columns(pl.lit(float(i)).alias(n) for i, n in enumerate(NAMES)), made)
    changed = {"ret_4h": {"expr": -FEATURES[NAMES.index("ret_4h")].expr}, "range_1d": {"warmup": 100}, "funding": {"meaning": "other words"}}
    features = [replace(f, **changed.get(f.name, {})) for f in FEATURES] + [Feature("new", 4, "log", "return of an hour", pl.col("close@log4"))]
    other = FeatureStore(store, SYMBOLS, features)
    assert other.update(START, END) == (0, 3, 2)
    got, fresh = other.panel(START, END), panel(candles, rates, END, START, features)
    for j, n in enumerate(got.names):
        if n in ("ret_4h", "range_1d", "new"): np.testing.assert_array_equal(got.X[:, j], fresh.X[:, j], err_msg=n)
        else: assert (got.X[:, j] == NAMES.index(n)).all(), n
    other.close()


def test_another_grid_is_everything_anew(store: Store, kept: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all features share is in every digest, and under the columns beside them."""
    before, rows = {f.digest for f in FEATURES}, len(kept.panel(START, END))
    monkeypatch.setattr("realdeal.features.MADE_OF", "of another grid")
    monkeypatch.setattr("realdeal.featurestore.MADE_OF", "of another grid")
    assert not before & {f.digest for f in FEATURES}
    other = FeatureStore(store, SYMBOLS)
    assert other.update(START, END) == (rows, 0, 2) and other.update(START, END) == (0, 0, 0)
    other.close()


def test_a_removed_feature_disappears(store: Store, kept: FeatureStore) -> None:
    fewer = FeatureStore(store, SYMBOLS, FEATURES[:5])
    assert fewer.update(START, END) == (0, 0, 2)
    assert all(pl.read_parquet_schema(f).keys() == {"time", "close", "high", "low", "sigma", "real", *NAMES[:5]} for f in fewer.folder.rglob("features.parquet"))
    assert fewer.panel(END - DAY, END).names == NAMES[:5]
    fewer.close()


@pytest.mark.parametrize(("at", "months"), [(START + 5 * DAY + 77 * MINUTE, 1), (START + 25 * DAY, 2), (END - 20 * MINUTE, 1)])
@pytest.mark.parametrize("through", ["parquet", "tail"])
def test_an_amended_candle(store: Store, kept: FeatureStore, candles: Frames, rates: Frames, at: int, months: int, through: str) -> None:
    """It changes rows after it within the longest look-back, of both symbols, and no others in any bit."""
    at += next(t for t in range(0, DAY, MINUTE) if len(candles["BTC/USDT"].filter(pl.col("time") == at + t)))
    row = candles["BTC/USDT"].filter(pl.col("time") == at).row(0)
    bar = Bar(row[0], row[1], row[2] * 1.02, row[3], row[4] * 1.02, row[5] * 3)
    before = kept.panel(START, END)
    if through == "parquet": store.write("BTC/USDT", pl.DataFrame([(bar.time, bar.open, bar.high, bar.low, bar.close, bar.volume, "venue")], schema=CANDLES, orient="row"))
    else: store.keep([Minute("BTC/USDT", bar, (), bar, "stream")])
    assert kept.update(START, END).months == months
    after = kept.panel(START, END)
    rows = before.times[moved(before, after).any(1)]
    closed = at // STEP * STEP + STEP
    assert rows.min() == closed and rows.max() <= closed + (WARMUP - 1) * STEP
    assert set(before.group[moved(before, after).any(1)]) == {0, 1}
    same(after, panel({k: store.read(k, START, END) for k in SYMBOLS}, rates, END, START))
    if through == "tail":
        store.compact()
        assert kept.update(START, END) == (0, 0, 0), "the same candles in another place"


def test_late_rates_and_older_candles(tmp_path: Path, candles: Frames, rates: Frames) -> None:
    """What arrives after its month was made is in it at the next update: rates, the candles before the first, those that were missing at the end."""
    store, half = Store(tmp_path, KEY), START + 16 * DAY
    for k in SYMBOLS: store.write(k, candles[k].filter(pl.col("time").is_between(half, END - DAY)))
    fs = FeatureStore(store, SYMBOLS)
    def now() -> Panel: return panel({k: store.read(k, START, END) for k in SYMBOLS}, {k: store.read_funding(k, START, END) for k in SYMBOLS}, END, START)
    same(fs.panel(START, END), now())
    assert not fs.panel(END, END).real.any(), "minutes that did not come yet are flat"
    for k in SYMBOLS: store.write_funding(k, rates[k])
    first = fs.panel(START, END)
    same(first, now())
    assert np.isfinite(first.X[:, NAMES.index("funding")]).all()
    store.write_funding("BTC/USDT", rates["BTC/USDT"][-5:].with_columns(pl.col("rate") * 2))
    amended = fs.panel(START, END)
    same(amended, now())
    assert {n for j, n in enumerate(NAMES) if moved(first, amended)[:, j].any()} == {"funding", "funding_change", "funding_3d", "funding_7d"}
    for k in SYMBOLS: store.write(k, candles[k])
    same(fs.panel(START, END), now())
    assert len(fs.panel(START, END)) > len(first) and fs.panel(END, END).real.any()
    fs.close()


def test_candles_from_long_before(tmp_path: Path, candles: Frames) -> None:
    """Where the warm-up of a month begins in a gap, the close before the gap goes on, however long ago that was."""
    store = Store(tmp_path, KEY)
    for k in SYMBOLS: store.write(k, candles[k].filter(pl.col("time") >= START + 20 * DAY))
    fs, february = FeatureStore(store, SYMBOLS), START + 31 * DAY
    def now() -> Panel: return panel({k: store.read(k, 0, END) for k in SYMBOLS}, {}, END, february)
    first = fs.panel(february, END)
    same(first, now())
    for k in SYMBOLS: store.write(k, candles[k].filter(pl.col("time") < START + HOUR).with_columns(pl.col("time") - 40 * DAY))
    same(fs.panel(february, END), now())
    assert moved(first, now()).any()
    fs.close()


def test_bar_by_bar_is_the_same(tmp_path: Path, candles: Frames, rates: Frames) -> None:
    """Each update computes its own bars only, and the end is that of one go."""
    store, at = Store(tmp_path, KEY), START + 31 * DAY - 6 * STEP
    for k in SYMBOLS: store.write(k, candles[k].filter(pl.col("time") < at)), store.write_funding(k, rates[k])
    fs = FeatureStore(store, SYMBOLS, FEATURES[10:20])
    fs.update(at - DAY, at)
    for end in range(at + STEP, at + 12 * STEP, STEP):
        for k in SYMBOLS: store.write(k, candles[k].filter(pl.col("time").is_between(end - STEP, end, closed="left")))
        assert fs.update(end - DAY, end) == (2, 0, 1)
    same(fs.panel(START, end), panel({k: c.filter(pl.col("time") < end) for k, c in candles.items()}, rates, end, START, FEATURES[10:20]))
    fs.close()


# What happens to a window: a gap of a symbol or of both, a rate, or time that goes on by itself.
EVENTS = st.lists(st.tuples(st.integers(0, 299), st.sampled_from([1, 2, 14, 15, 16, 47]), st.sampled_from(["BTC/USDT", "ETH/USDT", "both", "rate", "advance"])), max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, began=st.integers(1, 2 * 1440), late=st.integers(0, 40), rows=st.sampled_from([1, 3]))
def test_window_is_the_panel(candles: Frames, rates: Frames, events: list[tuple[int, int, str]], began: int, late: int, rows: int) -> None:
    """Minute by minute with gaps, from any history: every panel is that of the candles so far."""
    begin = START + began * MINUTE
    gone = {k: {begin + (t + i) * MINUTE for t, n, what in events if what in (k, "both") for i in range(n)} for k in SYMBOLS}
    history = {k: c.filter(pl.col("time") < begin, pl.col("time") >= START + (late if k == "ETH/USDT" else 0) * MINUTE) for k, c in candles.items()}
    if any(c.is_empty() for c in history.values()): return
    coming = {k: {r[0]: r for r in c.filter(pl.col("time").is_between(begin, begin + 300 * MINUTE, closed="left")).iter_rows() if r[0] not in gone[k]} for k, c in candles.items()}
    known = {k: r.filter(pl.col("time") <= begin) for k, r in rates.items()}
    w, seen, ends = Window(history, known, begin, rows), {k: list(c.rows()) for k, c in history.items()}, []
    for t in range(begin, begin + 300 * MINUTE, MINUTE):
        made = []
        for what in [what for at, _, what in events if begin + at * MINUTE == t]:
            if what == "advance":
                made.append(w.advance(t))
                for k in SYMBOLS: assert w.next[SYMBOLS.index(k)] == t
            if what == "rate":
                w.settle("BTC/USDT", t, 0.01)
                known["BTC/USDT"] = pl.concat([known["BTC/USDT"], pl.DataFrame({"time": [t], "rate": [0.01]})]).unique("time", keep="last", maintain_order=True)
        for k in SYMBOLS:
            if t in coming[k]:
                made.append(w.append(k, Bar(*coming[k][t])))
                seen[k].append(coming[k][t])
        for p in made:
            if p is None: continue
            end = int(p.times[-1])
            ends.append(end)
            so_far = {k: pl.DataFrame(v, schema=CANDLES, orient="row") for k, v in seen.items()}
            same(p, panel(so_far, known, end, end - (rows - 1) * STEP), rtol=1e-9)
    if p := w.advance(begin + 300 * MINUTE): ends.append(int(p.times[-1]))
    assert sorted(set(ends)) == ends and (not ends or ends[-1] == (begin + 300 * MINUTE) // STEP * STEP)
    assert ends


def test_window_refuses_what_is_not_new(candles: Frames, rates: Frames) -> None:
    end = START + DAY
    w = Window({k: c.filter(pl.col("time") < end) for k, c in candles.items()}, rates, end)
    bar = Bar(end, 1.0, 1.0, 1.0, 1.0, 0.0)
    w.append("BTC/USDT", bar)
    for again in (bar, replace(bar, time=end - MINUTE)):
        with pytest.raises(BadData, match=f"BTC/USDT: minute {again.time} is there already or comes late: the next is {end + MINUTE}"): w.append("BTC/USDT", again)
    with pytest.raises(BadData, match="XRP/USDT: not of this window"): w.append("XRP/USDT", bar)
    assert w.append("ETH/USDT", bar) is None, "a refused minute leaves the window as it was"


def test_a_rate_may_come_late_and_be_corrected(candles: Frames, rates: Frames) -> None:
    """A window knows each settlement once, by its last word, whenever that came."""
    end = START + 12 * DAY + STEP
    history = {k: c.filter(pl.col("time") < end) for k, c in candles.items()}
    known = {k: r.filter(pl.col("time") <= end - 2 * DAY) for k, r in rates.items()}
    w = Window(history, known, end)
    last = rates["BTC/USDT"].filter(pl.col("time").is_between(end - 2 * DAY, end)).rows()
    for t, rate in (*reversed(last), (last[-1][0], 0.05), (last[-1][0], 0.01)): w.settle("BTC/USDT", t, rate)
    told = pl.concat([known["BTC/USDT"], pl.DataFrame([*last[:-1], (last[-1][0], 0.01)], schema=["time", "rate"], orient="row")])
    same(w.panel(), panel(history, {**known, "BTC/USDT": told}, end, end), rtol=1e-9)
    assert w.panel().X[0, NAMES.index("funding")] == 100
    with pytest.raises(BadData, match="XRP/USDT: not of this window"): w.settle("XRP/USDT", end, 0.0)


def test_values_are_those_of_plain_expressions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each feature, written a second time as anybody would write it in polars, and some in pandas and SQL, has the same values."""
    monkeypatch.syspath_prepend(str(REPO))
    from benchmarks.features import agree, data, table_of

    made, settled = data()
    agree(made, settled, {k: c.to_pandas() for k, c in made.items()}, table_of(made))


@pytest.mark.parametrize("end", [START - DAY, START, START + 14 * MINUTE])
def test_no_closed_bar_is_an_empty_panel(candles: Frames, rates: Frames, end: int) -> None:
    assert panel(candles, rates, end).X.shape == (0, len(NAMES))


def test_one_symbol_is_its_own_peer(candles: Frames, rates: Frames) -> None:
    p = panel({"BTC/USDT": candles["BTC/USDT"]}, rates, START + 16 * DAY, START + 15 * DAY)
    at = {n: p.X[:, i] for i, n in enumerate(p.names)}
    assert np.isfinite(p.X).all() and (at["peer_ret_4h"] == at["ret_4h"]).all() and (at["lead_1h"] == 0).all() and np.allclose(at["corr_1d"], 1)


def test_page_of_features_is_true() -> None:
    assert (REPO / "docs" / "features.md").read_text() == catalogue(), "docs/features.md is not that of the list: run `realdeal features > docs/features.md`"


def real(symbol: str, start: int, end: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    name = symbol.replace("/", "")
    c = pl.scan_parquet(f"{DATA}/candles_1m/{name}/2023.parquet").with_columns(time=pl.col("timestamp").dt.epoch("ms"), origin=pl.lit("backfilled")).select(list(CANDLES))
    f = pl.read_parquet(f"{DATA}/funding_8h/{name}.parquet").select(time=pl.col("timestamp").dt.epoch("ms"), rate="funding_rate")
    return c.filter(pl.col("time") >= start, pl.col("time") < end).collect(), f.filter(pl.col("time").is_between(start, end))


@pytest.mark.skipif(not DATA, reason="needs REALDEAL_DATA")
def test_real_candles_around_a_halt() -> None:
    """2023-03-24: flat candles without volume from 11:28, none from 12:39 to 14:00. Not one number is infinite, and no row is real from the halt until a day after it."""
    start, end, halt = 1_675_209_600_000, 1_682_899_200_000, 1_679_655_600_000  # February to April; 2023-03-24 11:00
    got = {k: real(k, start, end) for k in SYMBOLS}
    p = panel({k: c for k, (c, _) in got.items()}, {k: f for k, (_, f) in got.items()}, end)
    assert not np.isinf(p.X).any()
    standing = (p.times > halt + HOUR) & (p.times <= halt + 3 * HOUR)  # rows of 12:15 to 14:00
    assert standing.sum() == 2 * 8 and not p.real[standing].any()
    assert not p.real[(p.times > halt + 3 * HOUR) & (p.times < halt + DAY)].any(), "its day is not whole"
    warm = p.times >= start + WARMUP * STEP
    quiet = warm & ((p.times <= halt) | (p.times > halt + 28 * HOUR))
    assert p.real[quiet].all() and np.isfinite(p.X[quiet]).all(), "a halt of hours in a week is tolerated"
    cut = {k: c.filter(pl.col("time") >= halt + 2 * DAY - WARMUP_MINUTES * MINUTE, pl.col("time") < halt + 2 * DAY) for k, (c, _) in got.items()}
    same(panel(cut, {k: f for k, (_, f) in got.items()}, halt + 2 * DAY, halt + 2 * DAY), p.rows(p.times == halt + 2 * DAY))
