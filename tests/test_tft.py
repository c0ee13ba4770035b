"""realdeal.tft: what its chapter does not show. Small networks, few steps: these tests are about windows, weights and files."""
import json, os, signal, subprocess, sys, textwrap, warnings
from dataclasses import asdict
from pathlib import Path
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('pytorch_forecasting')
ort = pytest.importorskip('onnxruntime')
from realdeal import tft
from realdeal.types import BadData, Missing

EVERY, STEPS, N = 900_000, 5, 300
NAMES, KNOWN = ('a', 'b.c', 'type', 'clock', 'day'), ('clock', 'day')    # torch would refuse 'b.c' and 'type' as module names


def made(seed=0):
    "Two symbols of N rows, a gap after row 150 of the first, a hole in row 400."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(2 * N, 5)) * [1, 10, 0.1, 1, 1] + [0, 5, 0, 0, 0]
    X[400, 2] = np.nan
    times = np.tile(np.arange(N), 2) * EVERY
    times[150:N] += EVERY
    y = (rng.random(2 * N) < 0.5).astype(float)
    y[::50] = np.nan
    return X, y, times, np.repeat([0, 1], N), NAMES, KNOWN


part = np.tile(np.arange(N), 2)
TRAIN, STOP, TEST = part < 180, (part >= 190) & (part < 240), part >= 250
SMALL = dict(train=TRAIN, stop=STOP, steps=STEPS, every_ms=EVERY, hidden_size=4, max_epochs=2, batch_size=64, say=None)


def fit(data=None, **more): return tft.fit_tft(*(data or made()), **SMALL | more)


@pytest.fixture(scope='module')
def model(): return fit()


@pytest.fixture(scope='module')
def probs(model):
    X, _, times, group, *_ = made()
    return model.predict(X, times, group)


def weights(m): return {k: v.numpy().tobytes() for k, v in m.module.state_dict().items()}


# ---- windows

def by_hand(X, times, group, steps):
    "Row by row, as slow as it is plain."
    out = []
    for t in range(steps - 1, len(X)):
        rows = list(range(t - steps + 1, t + 1))
        if len({group[r] for r in rows}) > 1: continue
        if any(times[b] - times[a] != EVERY for a, b in zip(rows, rows[1:], strict=False)): continue
        if np.isfinite(X[rows]).all(): out.append(t)
    return out


@pytest.mark.parametrize('seed', range(30))
def test_window_ends_are_those_found_by_hand(seed):
    rng = np.random.default_rng(seed)
    n, steps = int(rng.integers(1, 60)), int(rng.integers(1, 7))
    group = np.sort(rng.integers(0, 3, n))
    times = np.cumsum(rng.choice([EVERY, EVERY, EVERY, EVERY, 2 * EVERY, EVERY // 3], n))
    X = rng.normal(size=(n, 2))
    X[rng.random((n, 2)) < 0.04] = rng.choice([np.nan, np.inf])
    ends = tft.window_ends(times, group, X, steps, EVERY)
    assert ends.tolist() == by_hand(X, times, group, steps) and ends.dtype == np.int64


def test_a_symbol_that_continues_the_others_clock_is_still_cut():
    times, group = np.arange(6) * EVERY, np.array([0, 0, 0, 1, 1, 1])
    assert tft.window_ends(times, group, np.zeros((6, 1)), 3, EVERY).tolist() == [2, 5]


def test_no_window_where_rows_are_too_few():
    assert len(tft.window_ends(np.arange(3) * EVERY, np.zeros(3, int), np.zeros((3, 1)), 4, EVERY)) == 0


def test_batch_equals_windows_cut_by_hand():
    X, y, times, group, *_ = made()
    ends = tft.window_ends(times, group, X, STEPS, EVERY)
    w = tft.Windows(X.astype(np.float32), ends, STEPS, [3, 4], y)
    x, (target, weight) = w.__getitems__(range(len(w)))
    for i, t in enumerate(ends):
        assert np.array_equal(x['encoder_cont'][i].numpy(), X[t - STEPS + 1:t + 1].astype(np.float32))
        assert x['decoder_cont'][i].tolist() == [[0, 0, 0, *X[t, 3:].astype(np.float32)]]
        assert target[i].item() == (-1 if np.isnan(y[t]) else y[t])
    assert weight is None and np.shares_memory(w.view, w.Z)
    one = w[7]
    assert torch.equal(one[0]['encoder_cont'], x['encoder_cont'][7:8])


def test_the_targets_past_never_reaches_the_network():
    X, y, times, group, *_ = made()
    w = tft.Windows(np.nan_to_num(X).astype(np.float32), np.arange(10, 20), STEPS, [3], y)
    x, _ = w.__getitems__([0, 1])
    assert not x['encoder_target'].any()
    x['encoder_target'] += 1
    x['decoder_target'] = 1 - x['decoder_target']    # nor its present
    net = tft.make_network(5, [3], STEPS, tft.HParams(hidden_size=4)).eval()
    assert torch.equal(net(x)['prediction'], net(w.__getitems__([0, 1])[0])['prediction'])


def test_an_unknown_label_cannot_be_trained_on():
    w = tft.Windows(np.zeros((9, 2), np.float32), np.array([6]), STEPS, [0], np.full(9, np.nan))
    x, y = w[0]
    net = tft.make_network(2, [0], STEPS, tft.HParams(hidden_size=4))
    with pytest.raises((IndexError, RuntimeError)): net.loss(net(x)['prediction'], y)


# ---- scale

def test_scale_comes_from_training_rows_alone():
    data = made()
    X = data[0].copy()
    X[~TRAIN] *= 1000
    a, b = fit(data, max_epochs=1), fit((X, *data[1:]), max_epochs=1)
    assert a.scaler == b.scaler
    use = data[0][TRAIN & np.isfinite(data[0]).all(axis=1)]
    assert np.allclose(a.scaler.mean, use.mean(axis=0)) and np.allclose(a.scaler.std, use.std(axis=0))


def test_scaled_is_clipped_float32_and_keeps_holes():
    z = tft.Scaler((0., 0.), (1., 2.))(np.array([[1e9, -1e9], [np.nan, 1.]]))
    assert z.dtype == np.float32 and z[0].tolist() == [8, -8] and np.isnan(z[1, 0]) and z[1, 1] == 0.5


# ---- predictions

def test_there_is_a_prediction_where_a_window_ends_and_nowhere_else(probs):
    X, _, times, group, *_ = made()
    assert np.flatnonzero(np.isfinite(probs)).tolist() == by_hand(X, times, group, STEPS)
    assert ((probs > 0) & (probs < 1) | np.isnan(probs)).all()


@pytest.mark.parametrize('t', [100, 200, 450])
def test_the_future_changes_nothing(model, probs, t):
    X, _, times, group, *_ = made()
    X[t + 1:] = np.random.default_rng(9).normal(size=X[t + 1:].shape) * 50
    assert np.array_equal(model.predict(X, times, group)[:t + 1], probs[:t + 1], equal_nan=True)


def test_rows_before_the_window_change_nothing(model, probs):
    X, _, times, group, *_ = made()
    X[:250 - STEPS + 1] = 3.
    assert model.predict(X, times, group)[250] == probs[250]


def test_the_last_row_alone_gives_the_same_prediction(model, probs):
    X, _, times, group, *_ = made()
    s = slice(590 - STEPS + 1, 591)
    assert abs(model.predict(X[s], times[s], group[s])[-1] - probs[590]) < 1e-6


def test_predicting_needs_the_right_number_of_features(model):
    X, _, times, group, *_ = made()
    with pytest.raises(BadData, match='takes 5 features, not 4'): model.predict(X[:, :4], times, group)


def test_predicting_leaves_the_threads_alone(model):
    X, _, times, group, *_ = made()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.predict(X, times, group)
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


def test_the_order_of_windows_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        s = tft.Shuffled(50, seed)
        s.set_epoch(epoch)
        return list(s)
    assert order(7, 0) == order(7, 0) and sorted(order(7, 0)) == list(range(50))
    assert order(7, 0) != order(7, 1) and order(7, 0) != order(8, 0)


def test_the_labels_of_other_rows_do_not_matter(model):
    X, y, *rest = made()
    y = y.copy()
    y[~(TRAIN | STOP)] = 1 - y[~(TRAIN | STOP)]
    assert weights(fit((X, y, *rest))) == weights(model)


def test_the_best_epoch_is_kept(tmp_path):
    m = fit(max_epochs=8, patience=2, learning_rate=0.05, checkpoint_dir=tmp_path)
    stop = [e['stop'] for e in m.history]
    best = torch.load(tmp_path / 'best.ckpt', weights_only=True)
    assert best['epoch'] == int(np.argmin(stop)) and len(stop) <= int(np.argmin(stop)) + 1 + 2
    X, y, times, group, *_ = made()
    p = m.predict(X, times, group)
    use = STOP & np.isfinite(p) & np.isfinite(y)
    loss = -np.log(np.where(y[use] == 1, p[use], 1 - p[use])).mean()
    assert abs(loss - min(stop)) < 1e-4
    assert sorted(f.name for f in tmp_path.iterdir()) == ['best.ckpt', 'last.ckpt']    # no litter


def test_a_training_that_is_over_is_not_repeated(tmp_path):
    first = fit(max_epochs=8, patience=1, learning_rate=0.05, checkpoint_dir=tmp_path)
    said = []
    second = fit(max_epochs=8, patience=1, learning_rate=0.05, checkpoint_dir=tmp_path, say=said.append)
    assert len(said) == 1 and 'already trained' in said[0]
    assert len(first.history) < 8 and second.history == first.history and weights(second) == weights(first)


def test_a_training_with_all_its_epochs_is_not_repeated(tmp_path, model):
    fit(checkpoint_dir=tmp_path)
    said = []
    again = fit(checkpoint_dir=tmp_path, say=said.append)
    assert weights(again) == weights(model) and not any(s.startswith('epoch') for s in said)


@pytest.mark.parametrize('change', ['parameter', 'label', 'feature', 'rows', 'torn file'])
def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path, change):
    fit(checkpoint_dir=tmp_path, max_epochs=1)
    X, y, *rest = made()
    more = {'max_epochs': 1}
    if change == 'parameter': more |= {'dropout': 0.2}
    if change == 'label': y = np.where(np.arange(len(y)) == 30, 1 - y, y)
    if change == 'feature': X = X.copy(); X[60, 0] += 0.5
    if change == 'rows': more |= {'stop': STOP & (part < 230)}
    if change == 'torn file': (tmp_path / 'last.ckpt').write_bytes((tmp_path / 'last.ckpt').read_bytes()[:999])
    said = []
    fit((X, y, *rest), checkpoint_dir=tmp_path, **more, say=said.append)
    assert [s.split()[0] for s in said] == ['epoch']


def test_killed_by_the_system_and_resumed(tmp_path):
    "A real SIGKILL in the third epoch; the resumed weights are those of an undisturbed training."
    child = textwrap.dedent(f"""
        import sys, os, signal; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
        import test_tft as t
        def say(line):
            if line.startswith('epoch  3'): os.kill(os.getpid(), signal.SIGKILL)
        t.fit(max_epochs=4, patience=4, checkpoint_dir=t.Path({str(tmp_path)!r}), say=say)""")
    r = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, timeout=120, env={**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE'})
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert torch.load(tmp_path / 'last.ckpt', weights_only=True)['epoch'] == 1
    said = []
    resumed = fit(max_epochs=4, patience=4, checkpoint_dir=tmp_path, say=said.append)
    assert [s.split()[1].split('/')[0] for s in said[1:]] == ['3', '4'] and 'goes on' in said[0]
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
        tft.export_onnx(fit(max_epochs=1))
    out = capfd.readouterr()
    assert not out.out and not out.err and not [str(w.message) for w in heard]
    assert not list(tmp_path.iterdir())    # no lightning_logs


def test_amp_trains(model):
    m = fit(precision='bf16-mixed')
    X, _, times, group, *_ = made()
    assert np.isfinite(m.predict(X, times, group)[TEST]).any() and weights(m) != weights(model)
    assert {v.dtype for v in m.module.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize('known', [('clock',), NAMES])
def test_one_known_feature_or_all_of_them(known):
    data = made()
    m = fit((*data[:5], known), max_epochs=1)
    X, _, times, group, *_ = data
    p, s = m.predict(X, times, group), session(m)
    assert abs(live(s, X[590 - STEPS + 1:591]) - p[590]) < 1e-5


def test_what_cannot_be_trained_is_refused():
    X, y, times, group, names, known = made()
    with pytest.raises(BadData, match='as many different names'): fit((X, y, times, group, names[:4], known))
    with pytest.raises(BadData, match='as many different names'): fit((X, y, times, group, ('a',) * 5, ('a',)))
    with pytest.raises(BadData, match='known ahead'): fit((X, y, times, group, names, ('moon',)))
    with pytest.raises(BadData, match='known ahead'): fit((X, y, times, group, names, ()))
    with pytest.raises(BadData, match='both training and stop'): fit(stop=TRAIN)
    with pytest.raises(Missing, match='labelled stop row'): fit((X, np.where(STOP, np.nan, y), times, group, names, known))
    with pytest.raises(Missing, match='labelled train row'): fit((X, np.where(TRAIN, np.nan, y), times, group, names, known))
    with pytest.raises(Missing, match='without a hole'): fit((X * np.nan, y, times, group, names, known))
    with pytest.raises(BadData, match='not finite'): fit(learning_rate=float('inf'))


# ---- files

def session(m): return ort.InferenceSession(tft.export_onnx(m), providers=['CPUExecutionProvider'])


def live(s, window):
    "Probability as a process without torch computes it from raw rows (steps, k)."
    meta = json.loads(s.get_modelmeta().custom_metadata_map['realdeal'])
    z = np.clip((window - np.array(meta['mean'])) / np.array(meta['std']), -meta['clip'], meta['clip']).astype(np.float32)
    at = [meta['names'].index(n) for n in meta['known']]
    (logits,) = s.run(['logits'], {'encoder': z[None], 'decoder': z[None, -1:, at]})
    e = np.exp(logits[0] - logits[0].max())
    return e[1] / e.sum()


def test_onnx_equals_torch_on_unseen_windows_of_both_symbols(model, probs):
    X, _, _, group, *_ = made()
    rows = np.flatnonzero(TEST & np.isfinite(probs))
    s = session(model)
    assert set(group[rows]) == {0, 1}
    assert max(abs(live(s, X[t - STEPS + 1:t + 1]) - probs[t]) for t in rows) < 1e-5


def test_onnx_equals_torch_on_wild_windows(model):
    rng = np.random.default_rng(3)
    s = session(model)
    times, group = np.arange(STEPS) * EVERY, np.zeros(STEPS, int)
    for scale in (0, 1, 100, 1e6):
        w = rng.normal(size=(STEPS, 5)) * scale
        assert abs(live(s, w) - model.predict(w, times, group)[-1]) < 1e-5


def test_onnx_has_one_window_fixed_and_no_dropout(model):
    model.module.train()    # exported in the middle of something: must not matter
    s = session(model)
    shapes = {i.name: i.shape for i in s.get_inputs()}
    assert shapes == {'encoder': [1, STEPS, 5], 'decoder': [1, 1, 2]} and s.get_outputs()[0].shape == [1, 2]
    x = {'encoder': np.ones((1, STEPS, 5), np.float32), 'decoder': np.ones((1, 1, 2), np.float32)}
    assert all(np.array_equal(s.run(None, x)[0], s.run(None, x)[0]) for _ in range(5))
    meta = json.loads(s.get_modelmeta().custom_metadata_map['realdeal'])
    assert meta == {'names': list(NAMES), 'known': list(KNOWN), 'steps': STEPS, 'every_ms': EVERY, **json.loads(json.dumps(asdict(model.scaler)))}


def test_pt_round_trip_holds_no_code(model, probs):
    content = tft.save_pt(model, {'source': 'simulated', 'seed': 7})
    m = tft.load_pt(content)
    X, _, times, group, *_ = made()
    assert np.array_equal(m.predict(X, times, group), probs, equal_nan=True)
    assert m.provenance == {'source': 'simulated', 'seed': 7}
    assert tft.export_onnx(m) == tft.export_onnx(model)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / 'pwned'),)
    torch.save({'kind': Evil()}, tmp_path / 'evil.pt')
    for content in ((tmp_path / 'evil.pt').read_bytes(), pickle.dumps(Evil()), b''):
        with pytest.raises(BadData, match='save_pt'): tft.load_pt(content)
    assert not (tmp_path / 'pwned').exists()


def test_interpretation_adds_up(model):
    X, _, times, group, *_ = made()
    seen = tft.attention_and_weights(model, X, times, group, TEST)
    assert tuple(seen['encoder']) == NAMES and tuple(seen['decoder']) == KNOWN and seen['attention'].shape == (STEPS,)
    for total in (sum(seen['encoder'].values()), sum(seen['decoder'].values()), seen['attention'].sum()): assert abs(total - 1) < 1e-3
    with pytest.raises(Missing): tft.attention_and_weights(model, X, times, group, np.zeros(len(X), bool))
