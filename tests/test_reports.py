"""realdeal.cards and the report templates, on small data, end to end: papermill, nbconvert, a browser."""
import io, json, math, os, re, shutil, subprocess
from dataclasses import replace
from pathlib import Path
import nbformat, polars as pl, pytest
from hypothesis import given, strategies as st

pytest.importorskip('papermill')
from realdeal import cards, pages
from realdeal.provenance import Places, places
from realdeal.scores import AtThreshold
from realdeal.settings import Settings
from realdeal.types import BadData, Missing, Refused, Stop

TEMPLATES = Path(__file__).parents[1] / 'nbs' / 'reports'
BACKTEST, CARD, WALK = TEMPLATES / 'backtest.ipynb', TEMPLATES / 'model_card.ipynb', TEMPLATES / 'walk_forward.ipynb'


def recorded(folder):
    "The example's three files, saying that their candles were recorded: for the place and the words of a real result."
    file = cards.example_result(folder, 'portfolio')
    page = json.loads(file.read_text())
    page['provenance'] |= {'source': 'recorded', 'venue': 'binance', 'market': 'spot'}
    page['figures'] |= {'sharpe': 1.9, 'max_drawdown': 0.05, 'days': 92.0}
    page['note'] = 'a note with <b>tags</b> | and a bar'
    file.write_text(json.dumps(page))
    return folder


def bare(folder):
    "A card with nothing but its duties."
    whole = cards.read_card(cards.example_card(folder))
    none = {k: f.default for k, f in cards.Card.model_fields.items() if not f.is_required()}
    return cards.write_card(folder, whole.model_copy(update={**none, 'name': 'bare'}))


def odd(folder):
    "A recorded card that is too good: 65 % met by the figures, above the ceiling, one failed check, a threshold that no row reached, a control that learned."
    x = cards.read_card(cards.example_card(folder))
    silent = AtThreshold(.05, .9, 0.0, 0, *[math.nan] * 7)
    return cards.write_card(folder, x.model_copy(update={'name': 'odd', 'provenance': x.provenance.model_copy(update={'source': 'recorded', 'venue': 'binance', 'market': 'spot'}), 'shap': None,
        'score': {**x.score, 'accuracy': .71, 'accuracy_low': .69}, 'verdict65': replace(x.verdict65, accuracy=.71, low=.69, met=True, why=''), 'thresholds': (*x.thresholds[:2], silent),
        'control': {**x.control, 'accuracy_all': .6, 'accuracy_all_low': .58}, 'audit': cards.Audited(when='today', commit='abc', code='def', checks=(('a <b>scaler</b>', False, 'fitted on | all rows'), ('rows', True, ''))),
        'limits': 'a limit', 'months': None}))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Six reports in two processes: the three examples, a recorded result, a bare card, and a card that must not be believed."
    s = Settings(home=tmp_path_factory.mktemp('home'))
    demo, real, said = places(s, 'simulated').reports, places(s, 'recorded').reports, []
    jobs = [
        pages.Report(BACKTEST, demo / 'backtest.html', {}, s, 'simulated', text=True),
        pages.Report(CARD, demo / 'model_card.html', {}, s, 'simulated', text=True),
        pages.Report(BACKTEST, real / 'backtests' / 'portfolio.html', {'result': recorded(s.data_dir / 'results'), 'name': 'portfolio'}, s, 'recorded', text=True),
        pages.Report(CARD, demo / 'bare.html', {'card': bare(s.home)}, s, 'simulated', title='A "bare" card'),
        pages.Report(WALK, demo / 'walk_forward.html', {}, s, 'simulated', text=True),
        pages.Report(CARD, real / 'model_cards' / 'odd.html', {'card': odd(s.home)}, s, 'recorded', text=True),
    ]
    out = pages.execute_reports(jobs, said.append)
    assert len(said) == 6
    return s, {f.stem: f for f in out}


NAMES = ('backtest', 'model_card', 'portfolio', 'bare', 'walk_forward', 'odd')


@pytest.mark.parametrize('name', NAMES)
def test_page_stands_alone_and_shows_no_code(made, name):
    page = made[1][name].read_text()
    assert pages.check_offline(page, name) and len(page.encode()) < 5_000_000
    assert page.replace(pages.LOADER, '').count('<script') == page.count('<script type="application/') + ('id="plotly"' in page) and not re.search(r'(src|srcset)="?(https?:)?//', page) and '<link href="http' not in page
    assert pages.POLICY in page and 'width=device-width' in page
    assert 'import ' not in page and 'cards.' not in page and 'parameters' not in page
    assert 'Traceback' not in page and 'Warning' not in page and '<pre' not in page


def test_a_simulated_page_says_so_and_judges_nothing(made):
    page, text = made[1]['backtest'].read_text(), made[1]['backtest'].with_suffix('.md').read_text()
    assert page.index('SIMULATED') < page.index('BTC/USDT') and '✔' not in page and '✘' not in page
    assert text.startswith('# Backtest\n\n> **SIMULATED.**') and '| total return |' in text and '<div' not in text and 'base64' not in text


def test_a_recorded_page_is_judged_and_escapes(made):
    page, text = made[1]['portfolio'].read_text(), made[1]['portfolio'].with_suffix('.md').read_text()
    assert 'SIMULATED' not in page and 'On recorded prices' in page
    assert '✘ **Sharpe ratio, 92 days** 1.90: missed' in text and '✔ **Deepest drawdown** 5.0 %: met' in text
    assert '1 met, 2 missed' in text


def parts(page): return [p.split('</h2>')[0].rsplit('>', 1)[-1] for p in page.split('<h2')[1:]], page.count('<figure>'), page.count('<table>')


def test_a_whole_card_shows_all_parts_and_a_bare_one_says_what_is_missing(made):
    whole, little = made[1]['model_card'].read_text(), made[1]['bare'].read_text()
    sections, figures, tables = parts(whole)
    assert (figures, tables) == (14, 15) and len(sections) == 13 and len(whole.encode()) < 1_000_000
    assert parts(little) == (sections, 1, 2)                   # the blocks in time, and where it comes from
    for missing in ('Not scored.', 'Not measured.', 'Nothing was recorded.', 'Not computed.', 'Not audited.', '– not judged', '– not trained'): assert missing in little and missing not in whole
    assert '<title>A &quot;bare&quot; card</title>' in little


def test_the_numbers_on_a_card_are_the_cards(made, tmp_path):
    x, text = cards.read_card(cards.example_card(tmp_path)), made[1]['model_card'].with_suffix('.md').read_text()
    def pct(v): return f'{v * 100:.1f} %'
    for r in x.thresholds: assert f'| {pct(r.asked)} | {pct(r.coverage)} | {r.rows:,} | {pct(r.accuracy)} | {pct(r.low)} to {pct(r.high)} | {pct(r.base_rate)} | {r.net_bp:+.1f} bp | {r.net_low:+.1f} to {r.net_high:+.1f} bp |' in text
    for k in ('accuracy', 'base_rate', 'persistence', 'reversal', 'coverage'): assert f'| {pct(x.score[k])} |' in text
    assert f'| {pct(x.score["accuracy_all"])} ({pct(x.score["accuracy_all_low"])} to {pct(x.score["accuracy_all_high"])}) |' in text and f'| {x.score["ece"]:.4f} |' in text
    for seed, loss, right in x.seeds: assert f'| {seed} | {loss:.5f} | {pct(right)} |' in text
    for name, meaning, weight in x.features: assert f'| {name} | {meaning} | {weight:.4f} |' in text
    for name, first, last in x.blocks: assert f'| {name} | {first} | {last} | {x.rows[name]:,} |' in text
    for minutes, move, taker, maker in x.break_even.rows: assert f'{" (in use)" if minutes == 240 else ""} | {move:.1f} bp | {pct(taker)} | {pct(maker)} |' in text
    assert f'below the median of the 25 that were not pruned on the other half in **{pct(x.overfitting["probability"])}** of all ways' in text
    for check, _, detail in x.audit.checks: assert f'| {check} | ✔ passed | {detail} |' in text
    assert f'the best reached {min(v for _, v, _ in x.trials if v):.5f}.' in text and '30 trials: 5 pruned, 25 complete' in text and f'the worst was {min(x.months, key=lambda m: m.accuracy).month}' in text
    for v in x.rivals: assert f'| {v.name} | {v.rows:,.0f} | {v.loss:.5f} | {v.other_loss:.5f} | {v.saved:+.5f} | {v.saved_low:+.5f} to {v.saved_high:+.5f} |' in text
    for p in x.promises: assert f'| {p.what} | {pct(p.promised)} | {pct(p.seen)} | {pct(p.low)} to {pct(p.high)} | {"✔ kept" if p.kept else "✘ broken"} |' in text
    assert {p.kept for p in x.promises} == {True, False} and f'On {x.drift.silent} of {x.drift.days} days the drift was above' in text
    assert 'not judged**: simulated market' in text and '65 % is **m' not in text        # neither met nor missed where the prices are made up


def test_what_is_too_good_is_not_met_and_told(made):
    page, text = made[1]['odd'].read_text(), made[1]['odd'].with_suffix('.md').read_text()
    assert '65 % is **not judged**: suspicious, and no audit explains it. Even the lower end of the interval, 69.0 %' in text and 'is **met**' not in text
    assert '- ✘ **Leak audit** 1 of 2: failed (a <b>scaler</b>)' in text and 'suspicious' in text and '- ✘ **Shuffled labels** 60.0 %: learned something' in text
    assert 'a &lt;b&gt;scaler&lt;/b&gt;' in page and '<b>scaler' not in page and '| a <b>scaler</b> | ✘ failed | fitted on \\| all rows |' in text
    assert '| 5.0 % | 0.0 % | 0 | – | – | – | – | – |' in text and 'Features by mean |SHAP|' not in text and parts(page)[1] == 11
    assert 'SIMULATED' not in page


def test_a_walk_forward_shows_every_fold(made, tmp_path):
    x, page, text = cards.read_walk_forward(cards.example_walk_forward(tmp_path)), made[1]['walk_forward'].read_text(), made[1]['walk_forward'].with_suffix('.md').read_text()
    assert parts(page)[1:] == (3, 6) and 'No target can be met here' in text and 'is met' not in text
    for f in x.folds:
        a, b, c = (f'{f.score[k] * 100:.1f} %' for k in ('accuracy', 'accuracy_low', 'accuracy_high'))
        assert f'| {f.test[0]}\u00a0to\u00a0{f.test[1]} | {f.score["coverage"] * 100:.1f} % | {f.score["rows"]:,.0f} | {a} | {b} to {c} | {f.score["net_bp"]:+.1f} bp |' in text
        assert f'| {f.train[0]}\u00a0to\u00a0{f.train[1]} | {f.rows["train"]:,} | 30 | {f.loss:.5f} | num_leaves {f.params["num_leaves"]} |' in text
    ahead, paid = sum(f.score['accuracy_low'] > f.score['base_rate'] for f in x.folds), sum(f.score['net_bp'] > 0 for f in x.folds)
    assert f'In {ahead} of 4 folds the whole interval lay above the base rate.' in text and f'{paid} of 4 folds earned their costs' in text
    assert f'| {x.pooled["rows"]:,.0f} |' in text and x.verdict65.said in text


def test_a_cards_json_is_small_and_reads_back(tmp_path):
    file = cards.example_card(tmp_path)
    x = cards.read_card(file)
    assert file.stat().st_size < 400_000 and cards.write_card(tmp_path, x).read_bytes() == file.read_bytes()
    assert len(file.read_text().splitlines()) == len(cards.Card.model_fields) + 2          # a field a line: a diff can be read
    walk = cards.example_walk_forward(tmp_path / 'walk')
    assert cards.write_walk_forward(tmp_path / 'again', cards.read_walk_forward(walk)).read_bytes() == walk.read_bytes()


def test_the_same_card_makes_the_same_page(made):
    s, drawn = made
    again = pages.execute_report(CARD, drawn['model_card'].with_name('again.html'), {}, s, 'simulated', title='model_card: model card')
    assert again.read_bytes() == drawn['model_card'].read_bytes()


# A browser

CHROMIUM = next((b for n in ('chromium', 'chromium-browser', 'google-chrome') if (b := shutil.which(n))), None)


def console(page, profile, *more):
    "What the browser says while it shows `page`, and what it prints: the page's DOM with --dump-dom."
    r = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', f'--user-data-dir={profile}',
        '--enable-logging=stderr', '--virtual-time-budget=20000', *more, page.as_uri()], capture_output=True, text=True, timeout=120)
    return [line for line in r.stderr.splitlines() if 'CONSOLE' in line], r.stdout


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium on this machine')
def test_a_browser_opens_the_pages_without_complaint(made, tmp_path):
    for name in NAMES:
        said, dom = console(made[1][name], tmp_path / 'profile', '--dump-dom')
        assert said == [] and 'Where this comes from' in dom
        if name == 'backtest': assert 'data-drawn="yes"' in dom and dom.count('main-svg') > 1      # plotly has drawn, from the page alone
    bad = tmp_path / 'bad.html'        # the same ears hear a page that breaks its policy
    bad.write_text(made[1]['bare'].read_text().replace('</body>', '<script>1</script></body>'))
    said, _ = console(bad, tmp_path / 'profile', '--dump-dom')
    assert any('Content Security Policy' in line for line in said)


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium on this machine')
def test_the_committed_report_opens_and_is_photographed(tmp_path):
    "SCREENSHOTS=docs makes the picture that the README shows."
    page, picture = TEMPLATES.parents[1] / 'reports/backtests/90d_BTCUSDT.html', Path(os.environ.get('SCREENSHOTS', tmp_path)).resolve() / 'report.png'
    said, _ = console(page, tmp_path / 'profile', '--window-size=860,1500', f'--screenshot={picture}')
    assert said == [] and picture.stat().st_size > 50_000
    pages.check_offline(page.read_text(), page.name)
    sheet = page.with_name('90d_BTCUSDT_tearsheet.html')
    assert console(sheet, tmp_path / 'profile', '--dump-dom')[0] == [] and 'recorded data' in sheet.read_text()


# What goes wrong leaves nothing behind

def notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    nb.cells[0].metadata['tags'] = ['parameters']
    path.write_text(nbformat.writes(nb))
    return path


def files(folder): return sorted(str(f.relative_to(folder)) for f in folder.rglob('*'))


def test_a_torn_result_is_one_error_and_no_page(tmp_path):
    s = Settings(home=tmp_path)
    folder = recorded(tmp_path / 'data' / 'results')
    (folder / 'portfolio.parquet').write_bytes(b'PAR1')
    before = files(tmp_path)
    with pytest.raises(Stop, match=r'report backtest: .*BadData: .*damaged.*nothing was written'):
        pages.execute_report(BACKTEST, s.reports_dir / 'x.html', {'result': folder, 'name': 'portfolio'}, s, 'recorded', text=True)
    assert files(tmp_path) == before


def test_a_kernel_that_dies_is_one_error(tmp_path):
    s, out = Settings(home=tmp_path), tmp_path / 'reports/demo/x.html'
    with pytest.raises(Stop, match='report dies: DeadKernelError'):
        pages.execute_report(notebook(tmp_path / 'dies.ipynb', 'x = 1', 'import os; os._exit(9)'), out, {}, s, 'simulated')
    assert not out.parent.exists()


def test_a_page_without_a_stamp_or_with_a_link_is_refused(tmp_path):
    s, out = Settings(home=tmp_path), tmp_path / 'reports/demo/x.html'
    with pytest.raises(Refused, match='unstamped'): pages.execute_report(notebook(tmp_path / 'a.ipynb', 'x = 1'), out, {}, s, 'simulated')
    linked = f"class P:\n def _repr_mimebundle_(self, **k): return {{'text/html': '<img src=https://x/y.png>', '{pages.STAMP}': {{'source': 'simulated'}}}}\nP()"
    with pytest.raises(Stop, match='stand alone'): pages.execute_report(notebook(tmp_path / 'b.ipynb', 'x = 1', linked), out, {}, s, 'simulated', text=True)
    with pytest.raises(BadData, match='ends with .html'): pages.execute_report(BACKTEST, out.with_suffix('.pdf'), {}, s, 'simulated')
    assert not out.parent.exists()


def test_an_example_never_becomes_a_recorded_report(tmp_path):
    "A forgotten parameter shows the built-in example; its stamp keeps it out of reports/."
    s = Settings(home=tmp_path)
    with pytest.raises(Refused, match='shows simulated results, not recorded'): pages.execute_report(CARD, s.reports_dir / 'card.html', {}, s, 'recorded')
    assert not s.reports_dir.exists()


# The board

numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))


@given(st.sampled_from(list(cards.KPIS)), numbers, st.sampled_from(['recorded', 'simulated', 'exchange', None]))
def test_only_evidence_is_judged(name, value, source):
    k = cards.judge(name, value, source)
    counts = {'market': ('recorded', 'exchange'), 'machine': ('recorded', 'exchange', 'simulated', None), 'operation': ('exchange',)}[k.evidence]
    judged = value is not None and math.isfinite(value) and source in counts
    assert (k.status != 'not measured') == judged
    if judged: assert (k.status == 'met') == (value >= k.target if k.better == 'high' else value <= k.target)
    else: assert k.note
    json.dumps(pages.plain(cards.replace(k).__dict__), allow_nan=False)


def test_the_board_reads_back_and_prints(made, tmp_path):
    from rich.console import Console
    s = Settings(home=tmp_path)
    x = cards.load_result(made[0].data_dir / 'results', 'portfolio')
    b = cards.board(x.provenance, x.figures, x.score, latency_ms=12.0, machine='2 cores', rehearsal={'uptime': 0.999})
    file = cards.write_board(places(s, 'recorded'), b, s)
    assert json.loads(file.read_text()) == b and b['kpis']['sharpe']['status'] == 'missed' and b['kpis']['latency_p95']['status'] == 'met'
    text = file.with_name('KPI.md').read_text()
    assert '✘ missed' in text and '## Rehearsal' in text and '| uptime | 0.999 |' in text and 'ties left out' in text
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(cards.board_table(b))
    for k in b['kpis'].values(): assert k['title'] in screen.export_text(clear=False)
    elsewhere = Places(source='recorded', data=tmp_path.parent / 'x', reports=tmp_path.parent / 'x')
    with pytest.raises(Refused): cards.write_board(elsewhere, b, s)


# Saved results

def test_a_result_of_other_closes_or_another_name_is_refused(tmp_path):
    cards.example_result(tmp_path)
    for f in tmp_path.glob('BTCUSDT*'): shutil.copy(f, f.with_name(f.name.replace('BTCUSDT', 'OTHER')))
    with pytest.raises(BadData, match='of another backtest'): cards.load_result(tmp_path, 'OTHER')
    (tmp_path / 'BTCUSDT_fills.parquet').unlink()
    with pytest.raises(Missing): cards.load_result(tmp_path, 'BTCUSDT')
    with pytest.raises(BadData, match='expected letters'): cards.load_result(tmp_path, '../BTCUSDT')


def test_closes_that_are_not_the_backtests_are_not_saved(tmp_path):
    from realdeal.backtest import Result, Step
    from realdeal.types import Account, Decision, Fill, Snapshot
    import numpy as np
    fill = Fill('id', 'BTC/USDT', 'buy', 1.0, 100.0, 0.0, time=0)
    step = Step(Snapshot(0, {}, {}, {}, Account(1000.0)), Decision(0, {}, {}), (fill,))
    closes = np.array([[100.0], [110.0]])
    r = Result(np.array([0, 60_000]), np.array([900.0, 900.0]), np.array([1000.0, 1010.0]), np.array([1000.0, 1100.0]), (step,), {'sharpe': math.nan})
    p = cards.read_card(cards.example_card(tmp_path)).provenance
    with pytest.raises(BadData, match='differ from the equity'): cards.save_result(tmp_path, 'X', r, {}, p, ['BTC/USDT'], closes * 2, Settings())
    assert not list(tmp_path.glob('X*'))
    cards.save_result(tmp_path, 'X', r, {}, p, ['BTC/USDT'], closes, Settings())
    x = cards.load_result(tmp_path, 'X')
    assert math.isnan(x.figures['sharpe']) and x.minutes['position_BTCUSDT'].to_list() == [1.0, 1.0] and x.fills['price'][0] == 100.0
    assert isinstance(x.minutes, pl.DataFrame) and 'home' not in x.settings
