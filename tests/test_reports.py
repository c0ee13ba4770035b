"""realdeal.cards and the report templates, on small data, end to end: papermill, nbconvert, a browser."""
import io, json, math, re, shutil, subprocess, time
from pathlib import Path
import nbformat, polars as pl, pytest
from hypothesis import given, strategies as st

pytest.importorskip('papermill')
from realdeal import cards
from realdeal.provenance import Places, places
from realdeal.settings import Settings
from realdeal.types import BadData, Missing, Refused, Stop

TEMPLATES = Path(__file__).parents[1] / 'nbs' / 'reports'
BACKTEST, CARD = TEMPLATES / 'backtest.ipynb', TEMPLATES / 'model_card.ipynb'


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


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Four reports in two processes: both examples, a recorded result, a bare card."
    s = Settings(home=tmp_path_factory.mktemp('home'))
    demo, real, said, began = places(s, 'simulated').reports, places(s, 'recorded').reports, [], time.monotonic()
    jobs = [
        cards.Job(BACKTEST, demo / 'backtest.html', {}, s, 'simulated', text=True),
        cards.Job(CARD, demo / 'model_card.html', {}, s, 'simulated', text=True),
        cards.Job(BACKTEST, real / 'backtests' / 'portfolio.html', {'result': recorded(s.data_dir / 'results'), 'name': 'portfolio'}, s, 'recorded', text=True),
        cards.Job(CARD, demo / 'bare.html', {'card': bare(s.home)}, s, 'simulated', title='A "bare" card'),
    ]
    out = cards.execute_reports(jobs, said.append)
    assert len(said) == 4 and time.monotonic() - began < 60
    return s, {f.stem: f for f in out}


NAMES = ('backtest', 'model_card', 'portfolio', 'bare')


@pytest.mark.parametrize('name', NAMES)
def test_page_stands_alone_and_shows_no_code(made, name):
    page = made[1][name].read_text()
    assert cards.check_offline(page, name) and len(page.encode()) < 5_000_000
    assert '<script' not in page and not re.search(r'(src|srcset)="?(https?:)?//', page) and '<link href="http' not in page
    assert cards.POLICY in page and 'width=device-width' in page
    assert 'import ' not in page and 'cards.' not in page and 'parameters' not in page
    assert 'Traceback' not in page and 'Warning' not in page and '<pre' not in page


def test_a_simulated_page_says_so_and_judges_nothing(made):
    page, text = made[1]['backtest'].read_text(), made[1]['backtest'].with_suffix('.md').read_text()
    assert page.index('SIMULATED') < page.index('BTCUSDT') and '✔' not in page and '✘' not in page
    assert text.startswith('# Backtest\n\n> **SIMULATED.**') and '| total return |' in text and '<div' not in text and 'base64' not in text


def test_a_recorded_page_is_judged_and_escapes(made):
    page, text = made[1]['portfolio'].read_text(), made[1]['portfolio'].with_suffix('.md').read_text()
    assert 'SIMULATED' not in page and 'On recorded prices' in page
    assert '✘ **Sharpe ratio, 90 days** 1.90: missed' in text and '✔ **Deepest drawdown** 5.0 %: met' in text
    assert '1 met, 2 missed' in text


def test_what_a_card_lacks_is_not_drawn(made):
    whole, little = made[1]['model_card'].read_text(), made[1]['bare'].read_text()
    assert whole.count('<figure>') == 7 and little.count('<figure>') == 1
    assert 'Not measured.' in little and 'Not scored.' in little and '<title>A &quot;bare&quot; card</title>' in little


def test_the_same_result_makes_the_same_page(made):
    s, pages = made
    again = cards.execute_report(CARD, pages['bare'].with_name('again.html'), {'card': s.home / 'bare.json'}, s, 'simulated', title='A "bare" card')
    assert again.read_bytes() == pages['bare'].read_bytes()


# A browser

CHROMIUM = next((b for n in ('chromium', 'chromium-browser', 'google-chrome') if (b := shutil.which(n))), None)


def console(page, profile):
    "What the browser says while it shows `page`, and the page's DOM."
    r = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', f'--user-data-dir={profile}',
        '--enable-logging=stderr', '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120)
    return [line for line in r.stderr.splitlines() if 'CONSOLE' in line], r.stdout


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium on this machine')
def test_a_browser_opens_the_pages_without_complaint(made, tmp_path):
    for name in NAMES:
        said, dom = console(made[1][name], tmp_path / 'profile')
        assert said == [] and 'Where this comes from' in dom
    bad = tmp_path / 'bad.html'        # the same ears hear a page that breaks its policy
    bad.write_text(made[1]['bare'].read_text().replace('</body>', '<script>1</script></body>'))
    said, _ = console(bad, tmp_path / 'profile')
    assert any('Content Security Policy' in line for line in said)


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
        cards.execute_report(BACKTEST, s.reports_dir / 'x.html', {'result': folder, 'name': 'portfolio'}, s, 'recorded', text=True)
    assert files(tmp_path) == before


def test_a_kernel_that_dies_is_one_error(tmp_path):
    s, out = Settings(home=tmp_path), tmp_path / 'reports/demo/x.html'
    with pytest.raises(Stop, match='report dies: DeadKernelError'):
        cards.execute_report(notebook(tmp_path / 'dies.ipynb', 'x = 1', 'import os; os._exit(9)'), out, {}, s, 'simulated')
    assert not out.parent.exists()


def test_a_page_without_a_stamp_or_with_a_link_is_refused(tmp_path):
    s, out = Settings(home=tmp_path), tmp_path / 'reports/demo/x.html'
    with pytest.raises(Refused, match='unstamped'): cards.execute_report(notebook(tmp_path / 'a.ipynb', 'x = 1'), out, {}, s, 'simulated')
    linked = f"class P:\n def _repr_mimebundle_(self, **k): return {{'text/html': '<img src=https://x/y.png>', '{cards.STAMP}': {{'source': 'simulated'}}}}\nP()"
    with pytest.raises(Stop, match='stand alone'): cards.execute_report(notebook(tmp_path / 'b.ipynb', 'x = 1', linked), out, {}, s, 'simulated', text=True)
    with pytest.raises(BadData, match='ends with .html'): cards.execute_report(BACKTEST, out.with_suffix('.pdf'), {}, s, 'simulated')
    assert not out.parent.exists()


def test_an_example_never_becomes_a_recorded_report(tmp_path):
    "A forgotten parameter shows the built-in example; its stamp keeps it out of reports/."
    s = Settings(home=tmp_path)
    with pytest.raises(Refused, match='shows simulated results, not recorded'): cards.execute_report(CARD, s.reports_dir / 'card.html', {}, s, 'recorded')
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
    json.dumps(cards.plain(cards.replace(k).__dict__), allow_nan=False)


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
