"""realdeal.sequences and realdeal.tft: what their chapters do not show. Small networks, few steps: these tests are about windows, weights and files."""
import json, os, signal, subprocess, sys, textwrap, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('pytorch_forecasting')
from realdeal import tft
from realdeal.ensemble import SequenceMember
from realdeal.features import STEP, Panel
from realdeal.sequences import Form, Scaler, window_ends
from realdeal.types import HOUR, BadData, Missing

STEPS, N = 5, 300
NAMES, KNOWN = ('ret_1h', 'ret_4h', 'ret_1d', 'hour_sin', 'hour_cos'), ('hour_sin', 'hour_cos')


def made(seed=0):
    "Two symbols of N rows, a gap after row 150 of the first, a hole in row 400: (panel, y, path)."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(2 * N, 5)) * [1, 10, 0.1, 1, 1] + [0, 5, 0, 0, 0]
    X[400, 2] = np.nan
    times = np.tile(np.arange(N), 2) * STEP
    times[150:N] += STEP
    y = (rng.random(2 * N) < 0.5).astype(float)
    y[::50] = np.nan
    flat = np.full(2 * N, 100.)
    return Panel(('BTC/USDT', 'ETH/USDT'), times, np.repeat([0, 1], N), X, flat, flat, flat, flat / 1e5, np.ones(2 * N, bool), NAMES), y, rng.normal(size=(2 * N, 2))


part = np.tile(np.arange(N), 2)
TRAIN, STOP, TEST = part < 180, (part >= 190) & (part < 240), part >= 250
SMALL = tft.HParams(hidden_size=4, max_epochs=2, batch_size=64)


def fit(data=None, *, train=TRAIN, stop=STOP, names=NAMES, folder=None, say=None, workers=1, **h):
    p, y, path = data or made()
    return tft.fit_network(p, y, path, names, train=train, stop=stop, steps=STEPS, horizon_ms=2 * HOUR, h=replace(SMALL, **h), folder=folder, workers=workers, say=say)


def calibrated(m): return tft.calibrated(m, *made(), part >= 190)


@pytest.fixture(scope='module')
def model(): return fit()


@pytest.fixture(scope='module')
def probs(model): return model.predict(made()[0])


def weights(m): return [{k: v.numpy().tobytes() for k, v in n.state_dict().items()} for n in m.nets]


# ---- windows

def by_hand(p, steps):
    "Row by row, as slow as it is plain."
    out = []
    for t in range(steps - 1, len(p)):
        rows = list(range(t - steps + 1, t + 1))
        if len({p.group[r] for r in rows}) > 1: continue
        if any(p.times[b] - p.times[a] != STEP for a, b in zip(rows, rows[1:], strict=False)): continue
        if np.isfinite(p.X[rows]).all() and p.real[rows].all(): out.append(t)
    return out


@pytest.mark.parametrize('seed', range(30))
def test_window_ends_are_those_found_by_hand(seed):
    rng = np.random.default_rng(seed)
    n, steps = int(rng.integers(1, 60)), int(rng.integers(1, 7))
    times = np.cumsum(rng.choice([STEP, STEP, STEP, STEP, 2 * STEP, STEP // 3], n))
    X = rng.normal(size=(n, 2))
    X[rng.random((n, 2)) < 0.04] = rng.choice([np.nan, np.inf])
    p = Panel(('a', 'b', 'c'), times, np.sort(rng.integers(0, 3, n)), X, *[np.ones(n)] * 4, rng.random(n) > 0.05, ('x', 'y'))
    ends = window_ends(p.times, p.group, X, steps, STEP, p.real)
    assert ends.tolist() == by_hand(p, steps) and ends.dtype == np.int64


def test_a_symbol_that_continues_the_others_clock_is_still_cut():
    times, group = np.arange(6) * STEP, np.array([0, 0, 0, 1, 1, 1])
    assert window_ends(times, group, np.zeros((6, 1)), 3, STEP).tolist() == [2, 5]


def test_no_window_where_rows_are_too_few():
    assert len(window_ends(np.arange(3) * STEP, np.zeros(3, int), np.zeros((3, 1)), 4, STEP)) == 0


def test_a_halt_ends_no_window_and_stands_in_none(model):
    p, *_ = made()
    real = np.arange(len(p)) != 100
    halted = model.predict(replace(p, real=real))
    assert np.isnan(halted[100:100 + STEPS]).all() and np.isfinite(halted[100 + STEPS]) and np.isfinite(halted[99])


def test_batch_equals_windows_cut_by_hand(model):
    p, y, path = made()
    ends = np.array(by_hand(p, STEPS))
    w = tft.Windows(model.form, model.form.scaler(p.X), p.times, ends, y, path)
    encoder, decoder, target, way = w.__getitems__(range(len(w)))
    f = model.form.scaler
    for i, t in enumerate(ends):
        by_row = np.clip((p.X[t - STEPS + 1:t + 1] - f.mean) / f.std, -8, 8)
        assert np.allclose(encoder[i].numpy(), by_row, atol=1e-6)
        for j, ahead in enumerate((HOUR, 2 * HOUR)):
            angle = (p.times[t] + ahead) % (24 * HOUR) / (24 * HOUR) * 2 * np.pi
            assert np.allclose(decoder[i, j].numpy(), [(np.sin(angle) - f.mean[3]) / f.std[3], (np.cos(angle) - f.mean[4]) / f.std[4]], atol=1e-5)
        assert np.array_equal(target[i].numpy(), np.float32(y[t]), equal_nan=True) and np.allclose(way[i].numpy(), path[t])
    assert torch.equal(w[7][0], encoder[7:8])


def test_memory_does_not_grow_with_the_windows():
    """Seven years of two symbols as windows of 96 steps: what is held is rows, not windows."""
    import tracemalloc
    n = 2 * 7 * 365 * 96 // 10      # a tenth of them, which shows the same
    form = Form(NAMES, KNOWN, 96, 2, STEP, 2 * HOUR, Scaler((0.,) * 5, (1.,) * 5))
    Z, ends = np.zeros((n, 5), np.float32), np.arange(96, n)
    tracemalloc.start()
    w = tft.Windows(form, Z, np.arange(n) * STEP, ends, np.zeros(n), np.zeros((n, 2)))
    w.__getitems__(range(256))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 6 * Z.nbytes and peak < 12 * Z.nbytes and len(w) * 96 * 5 * 4 > 50 * peak / 12


def test_the_network_hears_nothing_of_the_target(model):
    p, y, path = made()
    a, b = (tft.Windows(model.form, model.form.scaler(p.X), p.times, np.array([10, 20]), v, path * k) for v, k in ((y, 1), (1 - y, 5)))
    assert torch.equal(a.__getitems__([0, 1])[0], b.__getitems__([0, 1])[0]) and torch.equal(a.__getitems__([0, 1])[1], b.__getitems__([0, 1])[1])


def test_an_unknown_path_teaches_nothing_and_breaks_nothing():
    said = torch.zeros(3, 2, 3, requires_grad=True)
    seen = torch.tensor([[1., float('nan')], [float('nan')] * 2, [2., 2.]])
    tft.pinball(said, seen).backward()
    assert torch.isfinite(said.grad).all() and not said.grad[1].any() and said.grad[2].any()


def test_pinball_is_least_at_the_quantiles():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))[:, None]
    best = torch.quantile(x[:, 0], torch.tensor([0.1, 0.5, 0.9]))
    at = lambda q: float(tft.pinball(q.expand(20_000, 1, 3), x))    # noqa: E731
    assert all(at(best) < at(best + d) for d in (torch.tensor([.1, 0, 0]), torch.tensor([0, -.1, 0]), torch.tensor([0, 0, .1])))


# ---- scale

def test_scale_comes_from_training_rows_alone():
    p, y, path = made()
    X = p.X.copy()
    X[~TRAIN] *= 1000
    a, b = fit(max_epochs=1), fit((replace(p, X=X), y, path), max_epochs=1)
    assert a.form == b.form
    use = p.X[TRAIN & np.isfinite(p.X).all(axis=1)]
    assert np.allclose(a.form.scaler.mean, use.mean(axis=0)) and np.allclose(a.form.scaler.std, use.std(axis=0))


def test_scaled_is_clipped_float32_and_keeps_holes():
    z = Scaler((0., 0.), (1., 2.))(np.array([[1e9, -1e9], [np.nan, 1.]]))
    assert z.dtype == np.float32 and z[0].tolist() == [8, -8] and np.isnan(z[1, 0]) and z[1, 1] == 0.5


# ---- predictions

def test_there_is_a_prediction_where_a_window_ends_and_nowhere_else(probs):
    assert np.flatnonzero(np.isfinite(probs)).tolist() == by_hand(made()[0], STEPS)
    assert ((probs > 0) & (probs < 1) | np.isnan(probs)).all()


@pytest.mark.parametrize('t', [100, 200, 450])
def test_the_future_changes_nothing(model, probs, t):
    p, *_ = made()
    X = p.X.copy()
    X[t + 1:] = np.random.default_rng(9).normal(size=X[t + 1:].shape) * 50
    assert np.array_equal(model.predict(replace(p, X=X))[:t + 1], probs[:t + 1], equal_nan=True)


def test_rows_before_the_window_change_nothing(model, probs):
    p, *_ = made()
    X = p.X.copy()
    X[:250 - STEPS + 1] = 3.
    assert model.predict(replace(p, X=X))[250] == probs[250]


def test_the_last_row_alone_gives_the_same_prediction(model, probs):
    p, *_ = made()
    assert abs(model.predict(p.rows(slice(590 - STEPS + 1, 591)))[-1] - probs[590]) < 1e-6


def test_predicting_needs_the_features(model):
    p, *_ = made()
    with pytest.raises(BadData, match='wants features hour_cos'): model.predict(replace(p, X=p.X[:, :4], names=NAMES[:4]))


def test_predicting_leaves_the_threads_alone(model):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.predict(made()[0])
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


# ---- training

def test_one_seed_one_result_whatever_was_drawn_before(model):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = fit()
    assert weights(again) == weights(model) and again.history == model.history
    assert torch.equal(state, torch.random.get_rng_state())    # nor does a training disturb others
    assert weights(fit(seed=8)) != weights(model)


def test_networks_of_several_seeds_are_those_of_each_seed_on_any_number_of_processes(model, probs):
    both, one = fit(seeds=2, workers=2), fit(seed=8)
    assert weights(both) == weights(model) + weights(one) and both.history == model.history + one.history
    p, *_ = made()
    assert np.allclose(both.raw(p), (model.raw(p) + one.raw(p)) / 2, atol=1e-6, equal_nan=True)


def test_the_order_of_windows_depends_on_seed_and_epoch_alone():
    def order(seed, epoch, size=50):
        s = tft.Shuffled(50, size, seed)
        s.set_epoch(epoch)
        return list(s)
    assert order(7, 0) == order(7, 0) and sorted(order(7, 0)) == list(range(50))
    assert order(7, 0) != order(7, 1) and order(7, 0) != order(8, 0)
    assert len(set(order(7, 0, 20))) == 20 and order(7, 0, 20) == order(7, 0)[:20]


def test_the_step_size_rises_and_falls():
    h = replace(SMALL, learning_rate=0.01)
    learner = tft.Learner(tft.make_network(fit(max_epochs=1, kind='linear').form, replace(h, kind='linear')), h, 100)
    told = learner.configure_optimizers()
    rates = []
    for _ in range(100):
        rates.append(told['optimizer'].param_groups[0]['lr'])
        told['optimizer'].step()
        told['lr_scheduler']['scheduler'].step() if len(rates) < 100 else None
    assert max(rates) == pytest.approx(0.01) and 5 < int(np.argmax(rates)) < 15 and rates[-1] < 1e-5


def test_the_labels_of_other_rows_do_not_matter(model):
    p, y, path = made()
    y = np.where(TRAIN | STOP, y, 1 - y)
    assert weights(fit((p, y, path))) == weights(model)


def test_the_best_epoch_is_kept(tmp_path):
    m = fit(max_epochs=8, patience=2, learning_rate=0.05, folder=tmp_path)
    stop = [e['stop'] for e in m.history[0]]
    best = torch.load(tmp_path / 'tft-7' / 'best.ckpt', weights_only=True)
    assert best['epoch'] == int(np.argmin(stop)) and len(stop) <= int(np.argmin(stop)) + 1 + 2
    p, y, _ = made()
    q = m.predict(p)
    use = STOP & np.isfinite(q) & np.isfinite(y)
    loss = -np.log(np.where(y[use] == 1, q[use], 1 - q[use])).mean()
    assert abs(loss - min(stop)) < 1e-4
    assert sorted(f.name for f in (tmp_path / 'tft-7').iterdir()) == ['best.ckpt', 'last.ckpt']    # no litter


def test_a_training_that_is_over_is_not_repeated(tmp_path):
    first = fit(max_epochs=8, patience=1, learning_rate=0.05, folder=tmp_path)
    said = []
    second = fit(max_epochs=8, patience=1, learning_rate=0.05, folder=tmp_path, say=said.append)
    assert len(said) == 1 and 'already trained' in said[0]
    assert len(first.history[0]) < 8 and second.history == first.history and weights(second) == weights(first)


def test_a_training_with_all_its_epochs_is_not_repeated(tmp_path, model):
    fit(folder=tmp_path)
    said = []
    again = fit(folder=tmp_path, say=said.append)
    assert weights(again) == weights(model) and not any('epoch' in s for s in said)


@pytest.mark.parametrize('change', ['parameter', 'label', 'path', 'feature', 'rows', 'torn file'])
def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path, change):
    fit(folder=tmp_path, max_epochs=1)
    p, y, path = made()
    more = {'max_epochs': 1}
    if change == 'parameter': more |= {'dropout': 0.2}
    if change == 'label': y = np.where(np.arange(len(y)) == 30, 1 - y, y)
    if change == 'path': path = np.where(np.arange(len(y))[:, None] == 30, 9., path)
    if change == 'feature': p = replace(p, X=np.where((np.arange(len(p)) == 60)[:, None], p.X + 0.5, p.X))
    if change == 'rows': more |= {'stop': STOP & (part < 230)}
    last = tmp_path / 'tft-7' / 'last.ckpt'
    if change == 'torn file': last.write_bytes(last.read_bytes()[:999])
    said = []
    fit((p, y, path), folder=tmp_path, **more, say=said.append)
    assert len(said) == 1 and 'epoch  1/1' in said[0]


def test_killed_by_the_system_and_resumed(tmp_path):
    "A real SIGKILL in the third epoch; the resumed weights are those of an undisturbed training."
    child = textwrap.dedent(f"""
        import sys, os, signal; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        import test_tft as t
        def say(line):
            if 'epoch  3' in line: os.kill(os.getpid(), signal.SIGKILL)
        t.fit(max_epochs=4, patience=4, folder=t.Path({str(tmp_path)!r}), say=say)""")
    r = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, timeout=120, env={**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE'})
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert torch.load(tmp_path / 'tft-7' / 'last.ckpt', weights_only=True)['epoch'] == 1
    said = []
    resumed = fit(max_epochs=4, patience=4, folder=tmp_path, say=said.append)
    assert 'goes on' in said[0] and ['epoch  3' in said[1], 'epoch  4' in said[2], len(said)] == [True, True, 3]
    whole = fit(max_epochs=4, patience=4)
    assert weights(resumed) == weights(whole) and resumed.history == whole.history


def test_ctrl_c_is_a_keyboard_interrupt_and_stays_usable():
    def say(line): raise KeyboardInterrupt
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): fit(say=say)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_is_quiet(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        warnings.filterwarnings('ignore', category=FutureWarning)
        tft.export_onnx(calibrated(fit(max_epochs=1)))
    out = capfd.readouterr()
    assert not out.out and not out.err and not [str(w.message) for w in heard]
    assert not list(tmp_path.iterdir())    # no lightning_logs


@pytest.mark.parametrize('precision', ['bf16-mixed', '16-mixed'])
def test_amp_trains(model, precision):
    """On a CPU torch has bfloat16; half precision is a GPU's, and Lightning says so."""
    if precision == '16-mixed' and not torch.cuda.is_available():
        assert tft.make_network(model.form, SMALL).net.hparams.mask_bias == -float('inf'), 'a mask that fits into 16 bits'
        return
    m = fit(precision=precision)
    assert np.isfinite(m.predict(made()[0])[TEST]).any() and weights(m) != weights(model)
    assert {v.dtype for n in m.nets for v in n.state_dict().values()} == {torch.float32}


def test_what_cannot_be_trained_is_refused():
    p, y, path = made()
    with pytest.raises(BadData, match='as many different names'): fit(names=('ret_1h', 'ret_1h', 'hour_sin'))
    with pytest.raises(BadData, match='wants features moon'): fit(names=(*NAMES, 'moon'))
    with pytest.raises(BadData, match='known ahead nothing'): fit(names=NAMES[:3])
    with pytest.raises(BadData, match='both training and stop'): fit(stop=TRAIN)
    with pytest.raises(Missing, match='labelled stop row'): fit((p, np.where(STOP, np.nan, y), path))
    with pytest.raises(Missing, match='labelled train row'): fit((p, np.where(TRAIN, np.nan, y), path))
    with pytest.raises(Missing, match='without a hole'): fit((replace(p, X=p.X * np.nan), y, path))
    with pytest.raises(BadData, match='not finite'): fit(learning_rate=float('inf'), kind='linear')
    with pytest.raises(BadData, match='0 labelled windows to calibrate'): tft.calibrated(fit(max_epochs=1, kind='linear'), p, y * np.nan, path, STOP)
    with pytest.raises(BadData, match='no probability yet'): tft.export_onnx(fit(max_epochs=1, kind='linear'))


# ---- files

@pytest.mark.parametrize('kind', ['tft', 'lstm', 'linear'])
def test_onnx_equals_torch_on_unseen_windows_of_both_symbols(kind):
    m = calibrated(fit(kind=kind, seeds=2, max_epochs=1))
    p, *_ = made()
    live, raw = SequenceMember(tft.export_onnx(m)), m.raw(p)
    rows = np.flatnonzero(TEST & np.isfinite(raw[:, 0, 0]))
    assert set(p.group[rows]) == {0, 1} and live.name == kind
    assert np.abs(live.raw(p, rows) - raw[rows]).max() < 1e-5
    assert np.abs(live.say(p, rows, {})[:, 0] - m.predict(p)[rows]).max() < 1e-5
    assert np.array_equal(np.isfinite(live.raw(p, np.arange(len(p)))), np.isfinite(raw))


def test_onnx_equals_torch_on_wild_windows(model):
    rng = np.random.default_rng(3)
    m = calibrated(model)
    live, p = SequenceMember(tft.export_onnx(m)), made()[0].rows(slice(0, STEPS))
    for scale in (0, 1, 100, 1e6):
        wild = replace(p, X=rng.normal(size=(STEPS, 5)) * scale)
        assert np.abs(live.raw(wild, np.array([STEPS - 1]))[0] - m.raw(wild)[-1]).max() < 1e-5


def test_onnx_has_one_window_fixed_and_no_dropout(model):
    m = calibrated(model)
    for n in m.nets: n.train()    # exported in the middle of something: must not matter
    live = SequenceMember(tft.export_onnx(m))
    assert {i.name: i.shape for i in live._session.get_inputs()} == {'encoder': [1, STEPS, 5], 'decoder': [1, 2, 2]} and live._session.get_outputs()[0].shape == [1, 2, 4]
    p, *_ = made()
    assert all(np.array_equal(live.raw(p, np.array([590])), live.raw(p, np.array([590]))) for _ in range(5))
    assert live.form == m.form and live._calibration == m.calibration and live._widen == m.widen


def test_many_threads_say_what_one_says(model):
    """One member, eight threads, and its own threads inside: every answer is that of one thread, bit by bit."""
    live, (p, *_) = SequenceMember(tft.export_onnx(calibrated(model))), made()
    rows = np.arange(len(p))
    alone = np.stack([live.raw(p, np.array([r]))[0] for r in rows])
    assert np.array_equal(live.raw(p, rows), alone, equal_nan=True), 'many rows are shared out among threads'
    with ThreadPoolExecutor(8) as pool: told = list(pool.map(lambda r: live.say(p, np.array([r]), {})[0], np.tile(rows, 3)))
    assert np.array_equal(np.array(told), np.tile(live.say(p, rows, {}), (3, 1)), equal_nan=True)


def test_an_onnx_file_of_somebody_else_is_refused(model):
    import onnx
    graph = onnx.load_from_string(tft.export_onnx(calibrated(model)))
    del graph.metadata_props[:]
    with pytest.raises(BadData, match='without our metadata'): SequenceMember(graph.SerializeToString())


def test_pt_round_trip_holds_no_code(model):
    m = calibrated(model)
    again = tft.load_pt(tft.save_pt(m, {'source': 'simulated', 'seed': 7}))
    p, *_ = made()
    assert np.array_equal(again.predict(p), m.predict(p), equal_nan=True)
    assert again.provenance == {'source': 'simulated', 'seed': 7} and again.form == m.form and again.widen == m.widen
    assert tft.export_onnx(again) == tft.export_onnx(m)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / 'pwned'),)
    torch.save({'kind': Evil()}, tmp_path / 'evil.pt')
    for content in ((tmp_path / 'evil.pt').read_bytes(), pickle.dumps(Evil()), b''):
        with pytest.raises(BadData, match='save_pt'): tft.load_pt(content)
    assert not (tmp_path / 'pwned').exists()


def test_interpretation_adds_up():
    m = fit(seeds=2)
    p, *_ = made()
    seen = tft.attention_and_weights(m, p, TEST)
    assert tuple(seen['encoder']) == NAMES and tuple(seen['decoder']) == KNOWN and seen['attention'].shape == (STEPS,)
    for total in (sum(seen['encoder'].values()), sum(seen['decoder'].values())): assert abs(total - 1) < 1e-3
    assert 0 < seen['attention'].sum() <= 1 + 1e-3, 'what is left is attention to the clock ahead'
    with pytest.raises(Missing): tft.attention_and_weights(m, p, np.zeros(len(p), bool))
    assert json.dumps(m.form.to_plain())
