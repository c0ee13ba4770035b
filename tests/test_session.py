"""A runner's session on the emulator, told from its journal and made again from its store; what was changed afterwards is found and named."""
import asyncio, json, shutil, sqlite3
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
import polars as pl, pytest
from conftest import REPO, Demo, make_home, realdeal

pytest.importorskip('papermill')
from realdeal import pages
from realdeal.desk import KILL, resume, throw
from realdeal.emulator import serve
from realdeal.ensemble import load_predictor
from realdeal.exchange import Clock, Exchange
from realdeal.features import FUNDING_EVERY
from realdeal.live import Runner, restless, run_clock, run_steps
from realdeal.market import SIMULATED_START, funding, generate
from realdeal.provenance import places
from realdeal.results import find_journal, read_session, replayed, report_session, tell_session
from realdeal.store import Journal, Store, StoreKey
from realdeal.types import DAY, MINUTE, Bar, Minute, Missing, OrderStatus, Refused, slug
from realdeal.wire import client_options
from test_reports import CHROMIUM, console

SYMBOLS, DAYS = ('BTC/USDT', 'ETH/USDT'), 12
NOW = SIMULATED_START + (DAYS - 1) * DAY
KEY = StoreKey(source='simulated', venue='emulator', market='realistic-11')


@asynccontextmanager
async def living(s, now, shaped=restless, rate=0):
    "A runner that has started, and its emulator: decisions of a coin, models, store and journal where the command would have them."
    where = places(s, 'simulated')
    histories, rates = generate('realistic', SYMBOLS, SIMULATED_START, DAYS * 1440, seed=11), {x: funding(x, SIMULATED_START, DAYS * 1440, seed=11) for x in SYMBOLS}
    journal = Journal(KEY.journal(where.data, s.live.stage))
    async with serve(histories=histories, funding=rates, now=now, speed=rate or 'step', seed=11) as e:
        if rate: e.clock.run()
        async with Exchange(s, options=client_options(e.url), clock=Clock(rate)) as venue:
            runner = Runner(s, venue, Store(where.store, KEY), journal, shaped(load_predictor(where.models, s)), lambda _: None)
            await runner.start()
            yield e, runner
            await runner.finish()
    journal.close()


async def drill(s, minutes, every=lambda now: None, now=NOW, shaped=restless):
    async with living(s, now, shaped) as (e, runner): await run_steps(runner, e.url, asyncio.Event(), now + minutes * MINUTE, every)


def home_of(demo: Demo, folder: Path, stage='paper', **more):
    "Settings of a home of its own, with the demo's models."
    home = make_home(folder)
    shutil.copytree(demo.data / 'models', home / 'data' / 'demo' / 'models')
    return demo.job.s.override(live={'stage': stage}, **more).model_copy(update={'home': home})


@pytest.fixture(scope='module')
def lived(demo: Demo, tmp_path_factory):
    "Two hours on paper and as a testnet's."
    made = {}
    for stage in ('paper', 'testnet'):
        made[stage] = home_of(demo, tmp_path_factory.mktemp(stage) / 'home', stage)
        asyncio.run(drill(made[stage], 120))
    return made


@pytest.fixture(scope='module')
def drawn(lived): return {k: report_session(s, say=lambda _: None) for k, s in lived.items()}


def copy(s, folder):
    "The same home, to be spoiled."
    shutil.copytree(s.home, folder / 'spoiled', symlinks=True)
    return s.model_copy(update={'home': folder / 'spoiled'})


def told_of(s): return tell_session(read_session(s, find_journal(s)))
def lights(told): return {title: status for title, _, status, *_ in told['lights']}
def edit(s, table, where, change):
    "Change the JSON column `body` or `inputs` of one row of the journal."
    column = 'inputs' if table == 'decisions' else 'body'
    with sqlite3.connect(find_journal(s)) as db:
        row, text = db.execute(f'select rowid, {column} from {table} {where} limit 1').fetchone()
        db.execute(f'update {table} set {column} = ? where rowid = ?', (json.dumps(change(json.loads(text))), row))
    db.close()


def test_a_paper_session_is_made_again(drawn) -> None:
    told, _ = drawn['paper']
    n = told['parity']['compared']
    assert told['parity'] == {'compared': n, 'then': 0, 'share': 1.0, 'failed': '', 'lost': [], 'found': []} and lights(told)['Parity'] == 'met'
    assert n['features'] == 9 * 2 * 70 and n['predictions'] == 18 and n['account'] == 9 and n['orders'] == told['figures']['orders'] >= 3 and n['fills'] >= 3
    assert told['drill'] == 9 and told['fills'] and told['latency']['decision']['p50'] > 0
    assert lights(told) == {'Uptime': 'not measured', 'Missed decisions': 'met', 'Failed orders': 'met', 'Kills': 'met', 'Parity': 'met'}


def test_a_venues_session_is_made_again_without_its_fills(drawn) -> None:
    told, _ = drawn['testnet']
    assert told['parity']['found'] == [] and set(told['parity']['compared']) == {'features', 'predictions', 'decisions', 'orders'}
    assert told['parity']['compared']['orders'] >= 3 and told['fills'] and told['latency']['order']['p50'] > 0


@pytest.mark.parametrize('stage', ['paper', 'testnet'])
def test_the_page_stands_alone(lived, drawn, stage, tmp_path) -> None:
    told, page = drawn[stage]
    assert page == lived[stage].home / 'reports' / 'demo' / 'sessions' / f'simulated-emulator-realistic-11-{stage}.html'
    html, text = page.read_text(), page.with_suffix('.md').read_text()
    assert pages.check_offline(html, page.name) and html.index('SIMULATED') < html.index('Stage ') and 'Traceback' not in html and '<pre' not in html and str(lived[stage].home) not in html + text
    assert text.startswith('# Session\n\n> **SIMULATED.**') and f'Stage {stage} at emulator' in text and 'A drill: a coin made 9 of the decisions' in text
    for r in told['fills']: assert f'| {r["amount"]:.8g} | {r["price"]:,.8g} | {r["fee"]:.6f} | {r["liquidity"]} | {r["client_id"]} |' in text
    for k, n in told['parity']['compared'].items(): assert f'| {k} | {n:,} | 0 | 0 |' in text
    for r in told['sessions']: assert f'| {r["code"]} | {r["settings"]} | {r["model"]} |' in text
    for i in told['incidents']: assert f'| {i["kind"]} |' in text
    if CHROMIUM is None: return
    said, dom = console(page, tmp_path / 'profile', '--dump-dom')
    assert said == [] and 'data-drawn="yes"' in dom and dom.count('main-svg') > 1


def test_settings_of_today_change_nothing(lived) -> None:
    other = lived['paper'].override(costs={'taker_fee': 0.01}, strategy={'target_vol': 0.5, 'max_weight': 0.1})
    assert told_of(other)['parity']['share'] == 1.0


def test_a_feature_moved_by_a_hair_is_named(lived, tmp_path) -> None:
    s = copy(lived['testnet'], tmp_path)
    def nudge(x):
        x['features']['ETH/USDT'][next(i for i, v in enumerate(x['features']['ETH/USDT']) if v)] *= 1 + 1e-7
        return x
    edit(s, 'decisions', f'where time = {NOW + 60 * MINUTE}', nudge)
    told = told_of(s)
    [d] = told['parity']['found']
    assert (d['time'], d['symbol'], d['kind'], d['why']) == (NOW + 60 * MINUTE, 'ETH/USDT', 'features', '') and 'feature ' in d['text']
    assert lights(told)['Parity'] == 'missed' and told['verdict'].startswith('**Red: parity.**') and '1 are **unexplained**' in told['verdict']


def test_a_fill_that_was_changed_is_named(lived, tmp_path) -> None:
    s = copy(lived['paper'], tmp_path)
    def dearer(x): return {**x, 'price': x['price'] * 1.0001}
    edit(s, 'fills', 'order by time', dearer)
    told = told_of(s)
    [d] = told['parity']['found']
    assert d['kind'] == 'fills' and not d['why'] and lights(told)['Parity'] == 'missed'


def test_a_candle_that_is_gone_is_named(lived, tmp_path) -> None:
    s = copy(lived['paper'], tmp_path)
    gone, found = NOW + 31 * MINUTE, 0
    for f in (places(s, 'simulated').store).rglob(f'candles/symbol={slug("BTC/USDT")}/*/*.parquet'):
        df = pl.read_parquet(f, hive_partitioning=False)
        df.filter(pl.col('time') != gone).write_parquet(f)
        found += len(df.filter(pl.col('time') == gone))
    assert found == 1
    told = told_of(s)
    assert told['parity']['lost'] == ['the store holds no minute of BTC/USDT from 2024-01-12 00:31 UTC to 2024-01-12 00:32 UTC'] and lights(told)['Parity'] == 'missed'
    assert {d['time'] for d in told['parity']['found'] if d['kind'] == 'features'} == {NOW + k * 15 * MINUTE for k in range(3, 9)} and not any(d['why'] for d in told['parity']['found'])


def test_an_order_that_vanished_and_a_decision_that_was_forged_are_named(lived, tmp_path) -> None:
    s = copy(lived['testnet'], tmp_path)
    with sqlite3.connect(find_journal(s)) as db:
        name, time = db.execute('select client_id, time from intents order by rowid limit 1').fetchone()
        for table in ('fills', 'orders', 'intents'): db.execute(f'delete from {table} where client_id = ?', (name,))
    db.close()
    [d] = told_of(s)['parity']['found']
    assert (d['time'], d['kind'], d['why']) == (time, 'orders', '') and name in d['text'] and 'none live' in d['text']


def test_a_model_that_is_gone_is_told_and_not_green(lived, tmp_path) -> None:
    s = copy(lived['paper'], tmp_path)
    shutil.rmtree(places(s, 'simulated').models)
    told = told_of(s)
    assert lights(told)['Parity'] == 'not measured' and 'no such model' in told['verdict'] and str(tmp_path) not in told['verdict']


def test_a_kill_and_a_restart_are_made_again(demo: Demo, tmp_path: Path) -> None:
    """A maker's switch thrown and resumed, once while orders are at work and once when some are due, and a second life that begins late and without the coin: what was held, and what was ended, met no more minutes. A minute that was amended behind the store's back explains itself."""
    s = home_of(demo, tmp_path / 'home', orders={'execution': 'maker', 'then': 'take'}, costs={'participation': 0.001})      # an order takes many minutes
    def switch(now):
        if now // MINUTE - NOW // MINUTE in (4, 52): throw(s.data_dir / KILL, 'a drill')
        if now // MINUTE - NOW // MINUTE in (12, 80): resume(s.data_dir / KILL, [KEY.journal(places(s, 'simulated').data, 'paper')], 'it was a drill')
    asyncio.run(drill(s, 100, switch))
    asyncio.run(drill(s, 45, now=NOW + 115 * MINUTE, shaped=lambda p: p))
    x = read_session(s, find_journal(s))
    told = tell_session(x)
    held, ended = {k for k, o in x.orders.items() if o.status == 'held'}, {k for k, o in x.orders.items() if o.until is not None}
    assert held and ended and told['parity']['found'] == [] and lights(told)['Parity'] == 'met'
    def different(of): return {k for k in of for d in replayed(replace(x, orders={**x.orders, k: replace(x.orders[k], status=OrderStatus.CANCELED, until=None)})).found if d.kind == 'fills' and k in d.text}
    assert different(held) == held and different(ended) == ended
    assert told['drill'] == 7 and [(d['time'] - NOW) // MINUTE for d in x.decisions] == list(range(0, 165, 15)) and told['parity']['compared']['fills'] > 2 and len(told['sessions']) == 2 and lights(told)['Kills'] == 'met' and len(told['kills']) == 2
    assert {'killed', 'stood down', 'resumed', 'held'} <= {i['kind'] for i in told['incidents']}
    # A minute that was amended after its decision, as the evidence in the store says.
    bar = Store(places(s, 'simulated').store, KEY).read('BTC/USDT', NOW + 40 * MINUTE, NOW + 41 * MINUTE)
    file = next(f for f in places(s, 'simulated').store.rglob(f'evidence/symbol={slug("BTC/USDT")}/*/*.parquet'))
    seen = pl.read_parquet(file, hive_partitioning=False)
    x.store.write('BTC/USDT', bar.with_columns(volume=pl.col('volume') * 2))
    before = replayed(x).found
    assert [d for d in before if not d.why], 'nobody says that it was amended'
    seen.with_columns(known=pl.when(pl.col('time') == NOW + 40 * MINUTE).then(90 * MINUTE).otherwise(pl.col('known'))).write_parquet(file)
    after = replayed(x).found
    assert len(after) == len(before) and any('became known later, such as BTC/USDT 2024-01-12 00:40 UTC after 5400.0 s' in d.why for d in after)
    assert {d.time for d in after if not d.why} == {d['time'] for d in x.decisions if d['inputs']['made'] > NOW + 131 * MINUTE and any(y.time == d['time'] for y in after)}


def test_what_was_not_known_is_not_known_again(demo: Demo, tmp_path: Path) -> None:
    """Streams and REST fall silent, and a rate settles meanwhile: what was decided in the dark is made again in the dark, to the last digit."""
    s, begin, settled = home_of(demo, tmp_path / 'home'), NOW + 450 * MINUTE, NOW + 480 * MINUTE
    async def storm():
        async with living(s, begin, rate=240.0) as (e, runner):
            living_on = asyncio.create_task(run_clock(runner, asyncio.Event(), begin + 75 * MINUTE))
            await asyncio.sleep((settled - 10 * MINUTE - e.clock.now) / 240_000)
            for name in ('mute', 'http_503', 'contract_down'): e.fault(name, 7.0)
            await living_on
    asyncio.run(storm())
    x = read_session(s, find_journal(s))
    told = tell_session(x)['parity']
    dark = [d for d in x.decisions if any(end > begin for holes in d['inputs'].get('blind', {}).values() for _, end in holes)]
    old = [d for d in x.decisions if d['time'] >= settled and all(seen['funding']['event_time'] == settled - FUNDING_EVERY for seen in d['inputs']['md'].values())]
    assert settled in [d['time'] for d in dark] and settled in [d['time'] for d in old] and told['then'] >= max(len(dark), len(old)) and told['found'] == [] and told['share'] == 1.0
    def different(of, **more):
        changed = [{**d, 'inputs': {**d['inputs'], **more}} if d in of else d for d in x.decisions]
        return {(y.time, 'funding' in y.text) for y in replayed(replace(x, rows={**x.rows, 'decisions': changed})).found if y.kind == 'features'}
    assert {t for t, _ in different(dark, blind={})} == {d['time'] for d in dark}
    new = {k: {**v, 'funding': {**v['funding'], 'event_time': settled}} for k, v in old[0]['inputs']['md'].items()}
    assert different(old, md=new) == {(d['time'], True) for d in old}


def test_what_was_amended_is_as_it_was(demo: Demo, tmp_path: Path) -> None:
    """Minutes are told differently after the decision that read them, one twice, one when it lies in Parquet: each decision is made again with the bar that it knew."""
    s = home_of(demo, tmp_path / 'home')
    def amended(bar, factor): return Minute('BTC/USDT', replace(bar, high=bar.high * factor, volume=bar.volume * factor), (), None, 'rest')
    async def lives():
        for began in (NOW, NOW + 45 * MINUTE):
            async with living(s, began) as (e, runner):
                bars = [Bar(*r) for r in runner.store.read('BTC/USDT', NOW - 20 * MINUTE, NOW - 18 * MINUTE).iter_rows()]
                def every(now, bars=bars):
                    for at, which, factor in ((5, 0, 1.5), (20, 0, 2.0), (20, 1, 1.5), (50, 1, 1.5), (65, 1, 3.0)):
                        if now // MINUTE == NOW // MINUTE + at: runner.store.keep([amended(bars[which], factor)])
                await run_steps(runner, e.url, asyncio.Event(), began + 45 * MINUTE, every)
    asyncio.run(lives())
    x = read_session(s, find_journal(s))
    assert (told := tell_session(x)['parity'])['found'] == [] and told['share'] == 1.0
    changed = {(d.time - NOW) // MINUTE for d in replayed(replace(x, rows={**x.rows, 'decisions': [{**d, 'inputs': {**d['inputs'], 'read': 10**15}} for d in x.decisions]})).found if d.kind == 'features'}
    assert changed == {0, 15, 30, 45, 60} and told['then'] == len(changed) and [(d['time'] - NOW) // MINUTE for d in x.decisions] == list(range(0, 105, 15))


def test_orders_whose_minute_was_not_over_cannot_be_made_again(demo: Demo, tmp_path: Path) -> None:
    s = home_of(demo, tmp_path / 'home')
    asyncio.run(drill(s, 90, now=NOW + 450 * MINUTE))
    told = told_of(s)
    assert {(d['kind'], d['time'] - NOW) for d in told['parity']['found']} == {('fills', 540 * MINUTE)} and lights(told)['Parity'] == 'met'
    assert all(d['why'] == f'the store holds no minute of {d["symbol"]} from 2024-01-12 09:00 UTC on' for d in told['parity']['found'])


def test_what_is_simulated_stays_in_its_place(drawn, lived) -> None:
    s, file = lived['paper'], places(lived['paper'], 'simulated').data / 'sessions' / 'simulated-emulator-realistic-11-paper.json'
    for source, out in (('simulated', s.reports_dir / 'sessions' / 'x.html'), ('recorded', s.reports_dir / 'sessions' / 'x.html')):
        with pytest.raises(Refused): pages.execute_report(REPO / 'nbs' / 'reports' / 'session.ipynb', out, {'session': file}, s, source)
    assert not (s.reports_dir / 'sessions').exists()
    with pytest.raises(Missing, match='there are simulated-emulator-realistic-11-paper'): find_journal(s, 'other')


def test_the_command_draws_the_demos_session(demo: Demo) -> None:
    done = realdeal('report', '--session', '--json', home=demo.home)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told['parity']['share'] == 1.0 and (demo.home / told['page']).is_file() and told['page'].startswith('reports/demo/sessions/')
    done = realdeal('report', '--session', 'another', home=demo.home)
    assert done.returncode == 66 and 'no such journal' in done.stderr
    assert realdeal('report', 'another', home=demo.home).returncode == 78
