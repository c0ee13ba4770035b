"""The backtest, judged from outside: by an accountant that was written from the chapters' prose, by tables of candles whose fills were worked out by hand, and by other libraries' figures."""
import itertools, math
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import lru_cache
import empyrical, numpy as np, pandas as pd, polars as pl, pytest, quantstats.stats as qs
from scipy import stats
from realdeal import performance as perf
from realdeal.backtest import Payment, accounts, backtest, costs_of, fold, tape, work
from realdeal.features import Panel
from realdeal.fills import Working, terms_of
from realdeal.orders import plan
from realdeal.settings import Settings
from realdeal.store import read_quotes
from realdeal.types import DAY, MINUTE, Account, BadData, Decision, Fill, Intent, MarketRules, Missing, Signal

START = 1_704_067_200_000     # 2024-01-01
X, Y = 'X/USDT', 'Y/USDT'


def times_of(rows): return [START + i * MINUTE for i in range(len(rows))]


def frame(times, rows, origins=None):
    "Candles as the store gives them; `rows`: (open, high, low, close, volume)."
    return pl.DataFrame(rows, schema=['open', 'high', 'low', 'close', 'volume'], orient='row').cast(pl.Float64).with_columns(time=pl.Series(times, dtype=pl.Int64), origin=pl.Series(origins or ['venue'] * len(rows)))


def hand_panel(decisions, closes, sigma):
    "Rows at the times of decisions and nothing that the fold does not read; closes, sigma: (symbols, decisions)."
    n, k = len(closes), len(decisions)
    return Panel(tuple((X, Y)[:n]), np.tile(decisions, n), np.repeat(np.arange(n), k), np.empty((n * k, 0)), *[np.ravel(closes)] * 3, np.ravel(sigma), np.ones(n * k, bool), ())


# The accountant: one minute after the other, slow and plain. He knows the candles, the target weights, the rules and the settings, and nothing of the code that he judges.

class Ledger:
    "One symbol: every minute since its first candle. A minute that the venue does not have is flat and has no volume; a synthetic one has none either."
    def __init__(self, df, end):
        seen = {r['time']: r for r in df.iter_rows(named=True)}
        self.rows, last = {}, None
        for t in range(min(seen), end, MINUTE):
            r = seen.get(t)
            if r is None: self.rows[t] = (last, last, last, last, 0.0)
            else: self.rows[t] = (r['open'], r['high'], r['low'], r['close'], 0.0 if r['origin'] == 'synthetic' else r['volume'])
            last = self.rows[t][3]

    def close_before(self, t): return self.rows[t - MINUTE][3]

    def sigma_before(self, t):
        "Standard deviation of a minute's log return over the day before `t`; nothing is said in the first hour."
        closes = [self.rows[u][3] for u in range(t - DAY - MINUTE, t, MINUTE) if u in self.rows]
        return float(np.std(np.diff(np.log(closes)), ddof=1)) if len(closes) > 60 else 0.0

    def volume_before(self, t):
        before = [self.rows[u][4] for u in range(t - DAY, t, MINUTE) if u in self.rows]
        return sum(before) if len(before) >= 60 else 0.0


def in_lots(amount, lot): return math.floor(amount / lot + 1e-9)


def on_tick(price, tick, side):
    "A buyer's price goes down to the tick and a seller's up: the one that is further away."
    steps = (Decimal(repr(price)) / Decimal(repr(tick))).quantize(Decimal('1e-9')).to_integral_value(ROUND_FLOOR if side == 'buy' else ROUND_CEILING)
    return float(steps * Decimal(repr(tick)))


def accountant(targets, candles, rules, s, start, end, rates=None):
    "Cash and equity at the close of each minute of [start, end), fills (time, symbol, side, lots, price, fee, liquidity), and what was paid by kind. `targets`: {time: {symbol: weight}}."
    c, spot, maker = s.costs, s.orders.market == 'spot', s.orders.execution == 'maker'
    books = {x: Ledger(df, end) for x, df in candles.items()}
    lots, cash, orders = dict.fromkeys(candles, 0), s.risk.capital, []
    curve, money, fills, paid = [], [], [], {'fees': 0.0, 'spread': 0.0, 'slippage': 0.0, 'funding': 0.0}
    for t in range(start, end, MINUTE):
        if t in targets:       # whatever is left of the last decision's orders is over
            price = {x: books[x].close_before(t) for x in books}
            orders, cash_then = [], cash
            equity = cash + sum(lots[x] * rules[x].lot * price[x] for x in books)
            trade, cost, budget = {}, 0.0, cash_then
            for x, weight in targets[t].items():
                held = lots[x] * rules[x].lot
                if weight == 0 and abs(held) * price[x] >= rules[x].min_notional: trade[x] = -held             # a position that can be closed is closed, band or not
                elif abs(weight - held * price[x] / equity) < max(s.strategy.band, 1e-12): continue
                else: trade[x] = weight * equity / price[x] - held
                if trade[x] > 0: cost += trade[x] * price[x]
                else:
                    sold = in_lots(-trade[x], rules[x].lot) * rules[x].lot * price[x]                             # what is sold, not what was meant to be
                    budget += sold if sold >= rules[x].min_notional else 0.0
            for x, amount in trade.items():
                if amount > 0 and spot: amount *= min(1.0, budget * 0.995 / cost)                             # half a percent is kept back for costs
                n = in_lots(abs(amount), rules[x].lot)
                if n and n * rules[x].lot * price[x] >= rules[x].min_notional:
                    orders.append({'symbol': x, 'side': 'buy' if amount > 0 else 'sell', 'lots': n, 'arrives': t + s.orders.latency * MINUTE})
            orders.sort(key=lambda o: (o['side'] == 'buy', o['symbol']))                                      # sales first
        if not spot:           # funding, on what is held when the minute opens
            for x in rates or {}:
                if t in rates[x] and lots[x]:
                    due = lots[x] * rules[x].lot * books[x].rows[t][0] * rates[x][t]
                    cash, paid['funding'] = cash - due, paid['funding'] + due
        for o in orders:
            x, sign, age = o['symbol'], 1 if o['side'] == 'buy' else -1, (t - o['arrives']) // MINUTE
            lot, tick, book = rules[x].lot, rules[x].tick, books[x]
            opened, high, low, _, volume = book.rows[t]
            if age < 0 or volume == 0 or o['lots'] == 0: continue
            rests = maker and age < s.orders.patience
            if maker and not rests and s.orders.then == 'give up': continue
            n = min(o['lots'], in_lots(c.participation * volume, lot))
            seen = t - s.orders.latency * MINUTE if rests else t                                                # a quote knows what was known when it left
            half = max(c.half_spread, c.spread_vol * book.sigma_before(seen)) if c.spread_vol else c.half_spread
            if rests:
                price, fee = on_tick(book.close_before(seen) * (1 - sign * half), tick, o['side']), c.maker_fee
                if sign > 0 and not low < price * (1 - c.margin): continue
                if sign < 0 and not high > price * (1 + c.margin): continue
            else:
                impact = c.impact * book.sigma_before(t) * math.sqrt(1440) * math.sqrt(n * lot / book.volume_before(t)) if c.impact and book.volume_before(t) else 0.0
                price, fee = opened * (1 + sign * (half + c.slippage + impact)), c.taker_fee
            if spot and sign > 0: n = min(n, in_lots(max(0.0, cash) / (price * (1 + fee)), lot))                # cut down to the cash there is
            if n == 0: continue
            value = n * lot * price
            cash, lots[x], o['lots'] = cash - sign * value - value * fee, lots[x] + sign * n, o['lots'] - n
            fills.append((t, x, o['side'], n, price, value * fee, 'maker' if rests else 'taker'))
            paid['fees'] += value * fee
            if rests: paid['spread'] += sign * (price - book.close_before(t)) * n * lot
            else:
                paid['spread'] += half * opened * n * lot
                paid['slippage'] += sign * (price - opened * (1 + sign * half)) * n * lot
        money.append(cash)
        curve.append(cash + sum(lots[x] * rules[x].lot * books[x].rows[t][3] for x in books))
    return np.array(money), np.array(curve), fills, paid


@lru_cache
def paths(seed, days=3):
    "Two coins with jumps, minutes without volume (whose prices move nevertheless), gaps, and minutes that somebody made up. The first day is history."
    rng, n, made = np.random.default_rng(seed), days * 1440, {}
    for x, first, much in ((X, 100.0, 12.0), (Y, 20.0, 60.0)):
        close = first * np.exp((rng.normal(0, 0.001, n) + (rng.random(n) < 0.003) * rng.normal(0, 0.02, n)).cumsum())
        opened = np.r_[first, close[:-1]] * np.exp(rng.normal(0, 0.0003, n))
        high, low = np.maximum(opened, close) * np.exp(rng.exponential(0.0005, n)), np.minimum(opened, close) * np.exp(-rng.exponential(0.0005, n))
        volume = np.where(rng.random(n) < 0.06, 0.0, much * rng.lognormal(0, 1.2, n)).round(4)
        rows = [tuple(round(float(v[i]), 2) for v in (opened, high, low, close)) + (float(volume[i]),) for i in range(n)]
        missing, origins = rng.random(n) < 0.01, rng.choice(['venue', 'backfilled', 'synthetic'], n, p=[0.9, 0.05, 0.05])
        for g in rng.integers(2000, n - 60, 4): missing[g:g + rng.integers(2, 50)] = True
        keep = np.flatnonzero(~missing)
        made[x] = frame([START + int(i) * MINUTE for i in keep], [rows[i] for i in keep], [str(origins[i]) for i in keep])
    return made


WAYS = [(*way, k) for k in range(2) for way in itertools.product(('spot', 'perpetual'), ('taker', 'maker'), ('give up', 'take'), range(4)) if k == 0 or way[1] == 'maker' or way[2] == 'take']


def drawn(way):
    "Settings, rules, candles, decisions' panel and signals, rates."
    market, execution, then, latency, k = way
    rng = np.random.default_rng([WAYS.index(way), k])
    def one(*values): return values[rng.integers(len(values))]
    every = one(15, 30, 60)
    s = Settings().override(
        orders={'market': market, 'execution': execution, 'then': then, 'latency': latency, 'patience': int(rng.integers(1, min(11, every - latency)))},
        strategy={'decision_every': every, 'horizon': one(15, 30, 120), 'allow_short': market == 'perpetual', 'max_weight': one(0.5, 1.0), 'band': one(0.0, 0.05, 0.2)},
        costs={'maker_fee': one(-0.0002, 0.0, 0.0004), 'taker_fee': one(0.0, 0.0006), 'half_spread': one(0.0, 0.0002), 'spread_vol': one(0.0, 0.4), 'slippage': one(0.0, 0.0003),
            'impact': one(0.0, 0.8, 2.0), 'participation': one(1.0, 0.3, 0.05), 'margin': one(0.0, 0.0005)},
        risk={'max_gross': 1.0 if market == 'spot' else one(1.0, 2.0), 'max_drawdown': 0.5, 'max_daily_loss': 0.5})
    fine_lots, fine_ticks = one(True, False), one(True, False)
    rules = {x: MarketRules(x, lot=fine if fine_lots else lot, tick=0.01 if fine_ticks else tick, min_notional=one(5.0, 200.0)) for x, fine, lot, tick in ((X, 0.001, 0.5, 0.25), (Y, 0.01, 5.0, 0.04))}
    candles, start, end = paths(int(rng.integers(4))), START + DAY, START + 3 * DAY
    at = np.arange(start + (every * MINUTE if execution == 'maker' else 0), end, every * MINUTE)
    books = [Ledger(df, end) for df in candles.values()]
    p = hand_panel(at, [[b.close_before(t) for t in at] for b in books], np.exp(rng.uniform(math.log(0.0008), math.log(0.012), (2, len(at)))))
    sides = rng.choice(['long', 'short', 'flat'], len(p), p=[0.35, 0.3, 0.35])
    signals = [Signal(p.symbols[g], int(t), 0.6, str(side), 0.2) for g, t, side in zip(p.group, p.times, sides, strict=True)]
    rates = {x: {t: float(rng.normal(0, 0.001)) for t in range(start, end, 30 * MINUTE)} for x in candles}
    return s, rules, candles, p, signals, rates, start, end


def rates_frames(rates): return {x: pl.DataFrame({'time': list(r), 'rate': list(r.values())}) for x, r in rates.items()}


def told_apart(r, mine, rules):
    "Compare a backtest with what the accountant says: each minute to the cent, each fill, each kind of cost."
    money, curve, fills, paid = mine
    theirs = [(f.time, f.symbol, f.side, round(f.amount / rules[f.symbol].lot), f.price, f.fee, f.liquidity) for f in r.fills]
    for got, want in zip(theirs, fills, strict=False): assert got[:4] + got[6:] == want[:4] + want[6:] and got[4:6] == pytest.approx(want[4:6], rel=1e-9, abs=1e-9), (got, want)
    assert len(theirs) == len(fills)
    assert np.abs(r.cash - money).max() < 0.005 and np.abs(r.equity - curve).max() < 0.005
    for kind, value in paid.items(): assert r.figures[kind] == pytest.approx(value, abs=0.005), kind


@pytest.mark.parametrize('way', WAYS, ids=lambda w: '-'.join(map(str, w)))
def test_the_accountant_agrees_to_the_cent(way):
    s, rules, candles, p, signals, rates, start, end = drawn(way)
    r = backtest(p, signals, candles, rules, s, start, end, rates_frames(rates))
    assert len(r.steps) == len(set(p.times.tolist())) and len(r.fills) > 10
    told_apart(r, accountant({x.decision.time: x.decision.targets for x in r.steps}, candles, rules, s, start, end, rates), rules)


@pytest.mark.parametrize('latency', range(4))
def test_orders_end_when_the_next_decision_is_due_made_or_not(latency):
    "One decision in six is made. Without funding: see `test_a_decision_after_a_pause_has_paid_its_funding`."
    s, rules, candles, p, signals, _, start, _ = drawn(('perpetual', 'taker', 'take', latency, 0))
    mask = np.isin(p.times, sorted(set(p.times.tolist()))[::6])
    few = [x for x, m in zip(signals, mask, strict=True) if m]
    last = max(x.time for x in few) + s.strategy.decision_every * MINUTE
    r = backtest(p.rows(mask), few, candles, rules, s, start, last)
    told_apart(r, accountant(orders_end({x.decision.time: x.decision.targets for x in r.steps}, s), candles, rules, s, start, last), rules)


def orders_end(targets, s):
    "An order lives until the next decision is due, made or not: a decision about nothing takes its place."
    return {t + s.strategy.decision_every * MINUTE: {} for t in targets} | targets


# Candle tables: the first minute is the one that opens with the decision; before it stood 100. Half of the spread is 0.1 %, the fee 0.1 %, ticks are halves, lots hundredths.

GONE, MADE_UP = None, 'synthetic'
QUIET = (100, 100, 100, 100, 9)
TAKER, REST = {}, {'execution': 'maker', 'patience': 2}
TABLE = [
    ('a taker pays half of the spread on top of the next open', TAKER, {}, ('buy', 2), [
        (101, 103, 99, 102, 9)], [(0, 'buy', 2, 101.101, 'taker')]),
    ('a seller gets as much less, and slippage takes its part', TAKER, {'slippage': 0.0005}, ('sell', 2), [
        (101, 103, 99, 102, 9)], [(0, 'sell', 2, 101 * 0.9985, 'taker')]),
    ('latency: the order arrives two minutes later', TAKER | {'latency': 2}, {}, ('buy', 2), [
        (101, 101, 101, 101, 9),                      # decided at its open
        (102, 102, 102, 102, 9),
        (103, 103, 103, 103, 9)], [(2, 'buy', 2, 103.103, 'taker')]),
    ('a halt: nothing is filled, and the next minute fills it', TAKER, {}, ('buy', 2), [
        (101, 109, 91, 101, 0),                       # prices move, nobody trades
        (102, 102, 102, 102, 9)], [(1, 'buy', 2, 102.102, 'taker')]),
    ('neither in a gap nor in a minute that was made up', TAKER, {}, ('sell', 2), [
        GONE,
        (102, 102, 102, 102, 9, MADE_UP),
        (103, 103, 103, 103, 9)], [(2, 'sell', 2, 103 * 0.999, 'taker')]),
    ('a tenth of each minute until there is enough', TAKER, {'participation': 0.1}, ('buy', 2), [
        (100, 100, 100, 100, 9),
        (101, 101, 101, 101, 4.19),                   # 0.419, down to the lot
        (102, 102, 102, 102, 0.05),                   # less than a lot
        (103, 103, 103, 103, 50)], [(0, 'buy', 0.9, 100.1, 'taker'), (1, 'buy', 0.41, 101.101, 'taker'), (3, 'buy', 0.69, 103.103, 'taker')]),
    ('a maker who is touched is not filled', REST, {}, ('buy', 2), [
        (100, 101, 99.5, 100, 9)], []),               # 99.9, on the tick that is further away: 99.5
    ('a maker through whose price the market trades', REST, {}, ('buy', 2), [
        (100, 101, 99.4, 100, 9)], [(0, 'buy', 2, 99.5, 'maker')]),
    ('through, but not by the margin', REST, {'margin': 0.002}, ('buy', 2), [
        (100, 101, 99.31, 100, 9)], []),              # 99.5 less 0.199 is 99.301
    ('through by the margin, at his own price', REST, {'margin': 0.002}, ('buy', 2), [
        (100, 101, 99.3, 100, 9)], [(0, 'buy', 2, 99.5, 'maker')]),
    ('a sale rests above', REST, {}, ('sell', 2), [
        (100, 100.5, 90, 100, 9),                     # 100.1, up to 100.5: touched
        (100, 100.6, 90, 100, 9)], [(1, 'sell', 2, 100.5, 'maker')]),
    ('a sale, through by the margin', REST, {'margin': 0.002}, ('sell', 2), [
        (100, 100.7, 90, 100, 9),                     # 100.5 and 0.201
        (100, 100.71, 90, 100, 9)], [(1, 'sell', 2, 100.5, 'maker')]),
    ('a price on a tick is that tick', REST, {'half_spread': 0.0}, ('buy', 2), [
        (100, 100, 99.9, 100, 9)], [(0, 'buy', 2, 100, 'maker')]),
    ('quoted again where the price went', REST, {}, ('buy', 2), [
        (100, 103, 100, 103, 9),                      # 99.5 is not reached
        (103, 103, 102, 103, 9)], [(1, 'buy', 2, 102.5, 'maker')]),
    ('a quote that was one minute on its way is one minute old', REST | {'latency': 1}, {}, ('buy', 2), [
        (100, 103, 90, 103, 9),                       # not there yet
        (103, 103, 99, 104, 9)], [(1, 'buy', 2, 99.5, 'maker')]),
    ('a maker too takes a share of the volume', REST, {'participation': 0.1}, ('buy', 2), [
        (100, 101, 90, 100, 9),
        (100, 101, 90, 100, 9),
        (100, 101, 90, 100, 9)], [(0, 'buy', 0.9, 99.5, 'maker'), (1, 'buy', 0.9, 99.5, 'maker')]),
    ('patience is over: given up', REST, {}, ('buy', 2), [
        QUIET, QUIET,
        (100, 100, 80, 90, 9)], []),
    ('patience is over: taken', REST | {'then': 'take'}, {}, ('buy', 2), [
        QUIET, QUIET,
        (101, 101, 80, 90, 9)], [(2, 'buy', 2, 101.101, 'taker')]),
    ('the last minute of patience counts, and so does a halt', REST | {'then': 'take'}, {}, ('buy', 2), [
        (100, 100, 80, 100, 0),
        (101, 101, 99.4, 100, 9)], [(1, 'buy', 2, 99.5, 'maker')]),
    ('a halt does not take patience into account: taken when it ends', REST | {'then': 'take'}, {}, ('buy', 2), [
        GONE, GONE, GONE,
        (98, 98, 98, 98, 9)], [(3, 'buy', 2, 98.098, 'taker')]),
    ('no more after the next decision', TAKER, {'participation': 0.01}, ('buy', 20), [
        *[(100, 100, 100, 100, 100)] * 3,             # the table ends, and so does the order
        ], [(i, 'buy', 1, 100.1, 'taker') for i in range(3)]),
]


def on(rows, start=START):
    "Candles of a table: a minute at 100 before it, then its rows."
    there = [(i, r) for i, r in enumerate([QUIET, *rows]) if r]
    return frame([start + (i - 1) * MINUTE for i, _ in there], [r[:5] for _, r in there], [r[5] if len(r) > 5 else 'venue' for _, r in there])


def by_hand(orders, costs, market='perpetual', least=5.0, **more):
    "Settings of the tables and rules of both symbols."
    s = Settings().override(orders={'market': market, **orders}, costs={'half_spread': 0.001, 'slippage': 0.0, 'taker_fee': 0.001, 'maker_fee': 0.0, 'participation': 1.0, 'margin': 0.0} | costs, **more)
    return s, {x: MarketRules(x, lot=0.01, tick=0.5, min_notional=least) for x in (X, Y)}


def at_work(s, rules, t, orders, account, now=1, due=()):
    "Account, fills and funding of orders (symbol, side, amount) that are decided at minute `now` of a tape and work to its end."
    fills, paid = list[Fill](), list[Payment]()
    after = work([Intent(f'{k}', x, side, amount, START) for k, (x, side, amount) in enumerate(orders)], account, t, now, len(t.times), {x: terms_of(s, rules[x]) for x in t.symbols}, list(due), fills, paid)
    return after, fills, paid


def worked(s, rules, tables, orders, account, due=()):
    "What orders get in tables of candles, minutes counted from the decision."
    t = tape({x: on(rows) for x, rows in tables.items()}, START - MINUTE, START + len(tables[X]) * MINUTE, s.costs)
    after, fills, paid = at_work(s, rules, t, orders, account, due=due)
    return after, [((f.time - START) // MINUTE, f.symbol, f.side, f.amount, f.price, f.liquidity) for f in fills], paid, fills


def same_fills(got, want): assert [g[:2] + g[4:] for g in got] == [w[:2] + w[4:] for w in want] and [g[2:4] for g in got] == [pytest.approx(w[2:4], abs=1e-9) for w in want], (got, want)


@pytest.mark.parametrize('what, orders, costs, order, rows, want', TABLE, ids=[x[0] for x in TABLE])
def test_candle_table(what, orders, costs, order, rows, want):
    s, rules = by_hand(orders, costs)
    after, got, _, fills = worked(s, rules, {X: rows}, [(X, *order)], Account(1000.0, {X: 5.0}))
    same_fills([(g[0], *g[2:]) for g in got], want)
    assert all(f.fee == pytest.approx(f.amount * f.price * (0.001 if f.liquidity == 'taker' else 0.0)) for f in fills)
    sign = 1 if order[0] == 'buy' else -1
    assert after.positions[X] == pytest.approx(5 + sign * sum(w[2] for w in want)) and after.cash == pytest.approx(1000 - sum(w[2] * w[3] * (sign + (0.001 if w[4] == 'taker' else 0)) for w in want))


def test_an_order_that_was_given_up_gets_nothing_more():
    s, rules = by_hand(REST, {})
    t = tape({X: on([(100, 101, 80, 90, 9)])}, START - MINUTE, START + MINUTE, s.costs)
    for age, got in ((1, True), (2, False)): assert bool(Working(Intent('a', X, 'buy', 2.0, START), 2.0, age).meet(START, 1000.0, t.met(1, 0), terms_of(s, rules[X]))[1]) is got


def test_a_rebate_is_paid_to_the_maker():
    s, rules = by_hand(REST, {'maker_fee': -0.0002})
    after, _, _, (f,) = worked(s, rules, {X: [(100, 101, 99, 100, 9)]}, [(X, 'buy', 2)], Account(1000.0))
    assert f.fee == pytest.approx(-2 * 99.5 * 0.0002) and after.cash == pytest.approx(1000 - 199 + 0.0398)


def test_a_purchase_is_cut_to_the_cash_on_spot_alone():
    for market, amount in (('spot', 0.99), ('perpetual', 2)):          # one coin costs 100 * 1.001 * 1.001 = 100.2001
        s, rules = by_hand(TAKER, {}, market)
        after, got, *_ = worked(s, rules, {X: [QUIET]}, [(X, 'buy', 2)], Account(100.0))
        same_fills(got, [(0, X, 'buy', amount, 100.1, 'taker')])
        assert (after.cash >= 0) is (market == 'spot')
    s, rules = by_hand(REST, {'maker_fee': 0.01}, 'spot')
    same_fills(worked(s, rules, {X: [(100, 101, 99, 100, 9)]}, [(X, 'buy', 2)], Account(100.0))[1], [(0, X, 'buy', 0.99, 99.5, 'maker')])     # 100 / (99.5 * 1.01) = 0.995


def test_a_sale_pays_for_a_purchase_in_the_same_minute_or_as_soon_as_it_is_filled():
    s, rules = by_hand(TAKER, {}, 'spot')
    orders, poor = [(X, 'sell', 1), (Y, 'buy', 0.9)], Account(0.0, {X: 1.0})
    same_fills(worked(s, rules, {X: [QUIET], Y: [QUIET]}, orders, poor)[1], [(0, X, 'sell', 1, 99.9, 'taker'), (0, Y, 'buy', 0.9, 100.1, 'taker')])
    halt = [(100, 100, 100, 100, 0), QUIET]
    same_fills(worked(s, rules, {X: halt, Y: [QUIET, QUIET]}, orders, poor)[1], [(1, X, 'sell', 1, 99.9, 'taker'), (1, Y, 'buy', 0.9, 100.1, 'taker')])
    d = Decision(START, {Y: 0.5, X: 0.0}, {})
    assert [(i.symbol, i.side) for i in plan(d, poor, {X: 100.0, Y: 100.0}, rules, s)] == [(X, 'sell'), (Y, 'buy')]


def test_funding_is_paid_before_the_fills_of_its_minute():
    "At the open, on what was held until then: the seller of minute 1 pays for it, the buyer of minute 1 does not; who is short is paid. What falls due when all orders are over, the fold pays."
    s, rules = by_hand(TAKER | {'latency': 1}, {})
    rows = [QUIET, (110, 120, 90, 100, 9), (100, 100, 100, 100, 9)]
    for held, side, want in ((2.0, 'sell', [(1, -2 * 110 * 0.01)]), (0.0, 'buy', []), (-2.0, 'buy', [(1, 2 * 110 * 0.01)])):
        after, got, paid, fills = worked(s, rules, {X: rows}, [(X, side, 2)], Account(1000.0, {X: held}), [(3, 0, 0.01), (2, 0, 0.01)])
        assert [((x.time - START) // MINUTE, x.cash) for x in paid] == [(i, pytest.approx(v)) for i, v in want] and [g[0] for g in got] == [1]
        assert after.cash == pytest.approx(1000 + sum(v for _, v in want) + fills[0].cash)
    r, candles = {X: pl.DataFrame({'time': [START], 'rate': [0.01]})}, {X: on([QUIET] * 15)}
    for market, n in (('spot', 0), ('perpetual', 1)):          # spot knows no funding
        s, rules = by_hand(TAKER, {}, market)
        p = hand_panel([START - 15 * MINUTE, START], [[100.0, 100.0]], np.full((1, 2), 1e-9))
        early = pl.concat([frame([START - 16 * MINUTE], [QUIET]), candles[X]])
        early = early.vstack(frame([START - k * MINUTE for k in range(15, 1, -1)], [QUIET] * 14)).sort('time')
        assert len(backtest(p, [Signal(X, int(t), 0.6, 'long', 0.2) for t in p.times], {X: early}, rules, s, START - 15 * MINUTE, START + 15 * MINUTE, r).paid) == n


def test_impact_goes_with_the_root_of_the_amount():
    s, rules = by_hand(TAKER, {'impact': 0.5})
    t = tape({X: on([QUIET])}, START - MINUTE, START + MINUTE, s.costs)
    t = replace(t, day_sigma=np.full((2, 1), 0.04), day_volume=np.full((2, 1), 400.0))
    for side, amount, price in (('buy', 4, 100 * (1 + 0.001 + 0.5 * 0.04 * 0.1)), ('buy', 1, 100 * (1 + 0.001 + 0.5 * 0.04 * 0.05)), ('sell', 4, 100 * (1 - 0.001 - 0.002))):
        _, (f,), _ = at_work(s, rules, t, [(X, side, amount)], Account(0.0))
        assert f.price == pytest.approx(price)
        assert costs_of([f], t) == pytest.approx({'fees': amount * price * 0.001, 'spread': 0.1 * amount, 'slippage': abs(price - 100) * amount - 0.1 * amount, 'funding': 0, 'maker_share': 0})


def test_conditions_know_the_day_before_and_nothing_of_their_own_minute():
    "Half of the spread is that of the settings or a multiple of yesterday's volatility; recorded books say better."
    rng = np.random.default_rng(5)
    close = 100 * np.exp(rng.normal(0, 0.001, 3000).cumsum())
    rows = [(float(c), float(c), float(c), float(c), float(v)) for c, v in zip(close, rng.random(3000), strict=True)]
    costs = Settings().override(costs={'half_spread': 0.0005, 'spread_vol': 0.5, 'impact': 1.0}).costs
    bid = pl.DataFrame({'time': [START + 2990 * MINUTE + 7, START + 2990 * MINUTE + 30_000], 'bid': [99.0, 98.0], 'ask': [101.0, 102.0]})
    t = tape({X: frame(times_of(rows), rows, ['synthetic' if i == 2500 else 'venue' for i in range(3000)])}, START, START + 3000 * MINUTE, costs, {X: bid})
    for i in (30, 60, 100, 1439, 1440, 1441, 2600, 2999):
        sigma = np.diff(np.log(close[max(0, i - 1441):i])).std(ddof=1) if i > 60 else 0
        volume = sum(r[4] for k, r in enumerate(rows[max(0, i - 1440):i], max(0, i - 1440)) if k != 2500) if i >= 60 else 0
        assert (t.day_sigma[i, 0], t.day_volume[i, 0], t.half_spread[i, 0]) == pytest.approx((sigma * math.sqrt(1440), volume, max(0.0005, sigma / 2)), rel=1e-8)
    assert t.half_spread[2991, 0] == pytest.approx(0.015) and t.half_spread[2990, 0] < 0.001 and t.volume[2500, 0] == 0       # the books of a minute are known in the next


# From weights to orders

@pytest.mark.parametrize('what, market, weights, cash, held, band, want', [
    ('down to the lot', 'spot', {X: 0.5}, 1001.9, {}, 0.05, [(X, 'buy', 5.0)]),
    ('inside the band', 'spot', {X: 0.5}, 540.0, {X: 4.6}, 0.05, []),
    ('outside of it', 'spot', {X: 0.5}, 560.0, {X: 4.4}, 0.05, [(X, 'buy', 0.6)]),
    ('a close is never held back', 'spot', {X: 0.0}, 990.0, {X: 0.1}, 0.05, [(X, 'sell', 0.1)]),
    ('below the least notional it is dust', 'spot', {X: 0.0}, 990.0, {X: 0.04}, 0.0, []),
    ('dust goes with the next sale', 'spot', {X: 0.0}, 990.0, {X: 0.05}, 0.0, [(X, 'sell', 0.05)]),
    ('a small change is not sent', 'spot', {X: 0.5}, 504.0, {X: 4.96}, 0.0, []),
    ('costs are kept back from the last of the cash', 'spot', {X: 1.0}, 1000.0, {}, 0.05, [(X, 'buy', 9.95)]),
    ('and shared by all purchases', 'spot', {X: 0.75, Y: 0.25}, 1000.0, {}, 0.05, [(X, 'buy', 7.46), (Y, 'buy', 2.48)]),
    ('a sale brings what a purchase needs', 'spot', {X: 0.0, Y: 0.9}, 0.0, {X: 10.0}, 0.05, [(X, 'sell', 10.0), (Y, 'buy', 9.0)]),
    ('a symbol that is absent stays', 'spot', {Y: 0.5}, 500.0, {X: 5.0}, 0.05, [(Y, 'buy', 4.97)]),
    ('from long to short in one order', 'perpetual', {X: -0.5}, 500.0, {X: 5.0}, 0.05, [(X, 'sell', 10.0)]),
    ('from short to long', 'perpetual', {X: 0.5}, 1500.0, {X: -5.0}, 0.05, [(X, 'buy', 10.0)]),
    ('a perpetual needs no cash', 'perpetual', {X: 1.0, Y: 1.0}, 1000.0, {}, 0.05, [(X, 'buy', 10.0), (Y, 'buy', 10.0)]),
    ('a short is closed', 'perpetual', {X: 0.0}, 1010.0, {X: -0.1}, 0.05, [(X, 'buy', 0.1)]),
])
def test_orders_of_weights(what, market, weights, cash, held, band, want):
    s, rules = by_hand(TAKER, {}, market, strategy={'band': band})
    assert [(i.symbol, i.side, i.amount) for i in plan(Decision(START, weights, {}), Account(cash, held), {X: 100.0, Y: 100.0}, rules, s)] == want


def test_the_fold_turns_a_long_short_and_ends_orders_with_the_next_decision():
    "Without costs, at 100: 5 coins bought, 10 sold at once. With 0.2 coins a minute the purchase is cut short by the next decision, and what is there is sold."
    free = {'half_spread': 0.0, 'taker_fee': 0.0}
    p = hand_panel([START, START + 15 * MINUTE, START + 30 * MINUTE], [[100.0] * 3], np.full((1, 3), 1e-9))
    def run(costs, *sides, **strategy):
        s, rules = by_hand(TAKER, free | costs, strategy={'allow_short': True, 'horizon': 15} | strategy, risk={'capital': 1000.0})
        r = backtest(p, [Signal(X, int(t), 0.6, side, 0.2) for t, side in zip(p.times, sides, strict=True)], {X: on([(100, 100, 100, 100, 20)] * 45)}, rules, s, START - MINUTE, START + 45 * MINUTE)
        return [((f.time - START) // MINUTE, f.side, f.amount) for f in r.fills]
    assert run({}, 'long', 'short', 'flat') == [(0, 'buy', 5.0), (15, 'sell', 10.0), (30, 'buy', 5.0)]
    slow = run({'participation': 0.01}, 'long', 'flat', 'flat')
    assert [x[:2] for x in slow] == [(i, 'buy') for i in range(15)] + [(i, 'sell') for i in range(15, 30)] and all(x[2] == pytest.approx(0.2) for x in slow)


# Where prose and program once parted

@pytest.mark.parametrize('x, step', [(233.54808, 1e-5), (120_000_000.1, 0.1), (sum([8.28] * 100), 0.001)])
def test_rounding_down_is_free_of_binary_dust(x, step):
    from realdeal.orders import round_down
    assert round_down(x, step) == pytest.approx(x, rel=1e-12)


def test_all_purchases_cost_no_more_than_the_cash_and_what_the_sales_bring():
    s, rules = by_hand(TAKER, {}, 'spot', strategy={'band': 0.0, 'max_weight': 1.0})
    coarse = {X: replace(rules[X], lot=1.0), Y: rules[Y]}
    orders = plan(Decision(START, {X: 0.41, Y: 0.59}, {}), Account(0.0, {X: 6.0, Y: 4.0}), {X: 100.0, Y: 100.0}, coarse, s)      # 1.9 coins are to be sold, 1 can be
    assert sum(i.amount * 100 * i.sign for i in orders) <= 0


def test_a_maker_in_the_first_minute_quotes_at_the_last_price_before_it():
    s, rules = by_hand(REST, {})
    t = tape({X: on([(110, 110, 99, 110, 9)])}, START, START + MINUTE, s.costs)          # what 110 is, nobody knew when it was quoted
    assert [f.price for f in at_work(s, rules, t, [(X, 'buy', 1.0)], Account(1000.0), 0)[1]] == [99.5]


def test_a_quote_on_its_way_knows_the_spread_of_when_it_left():
    s, rules = by_hand(REST | {'latency': 1}, {})
    t = tape({X: on([QUIET, (100, 101, 90, 100, 9)])}, START - MINUTE, START + 2 * MINUTE, s.costs)
    t = replace(t, half_spread=np.array([[0.001], [0.001], [0.05]]))
    _, (f,), _ = at_work(s, rules, t, [(X, 'buy', 1.0)], Account(1000.0))
    assert f.price == 99.5


def test_funding_is_paid_to_the_end_of_the_tape():
    s, rules = by_hand(TAKER, {})
    p = hand_panel([START], [[100.0]], np.full((1, 1), 1e-9))
    t = tape({X: on([QUIET] * 20)}, START - MINUTE, START + 20 * MINUTE, s.costs)
    step, = fold(p, [Signal(X, START, 0.6, 'long', 0.2)], t, rules, s, Account(1000.0), {X: pl.DataFrame({'time': [START + 17 * MINUTE], 'rate': [0.01]})})
    assert len(step.paid) == 1


def test_a_decision_after_a_pause_has_paid_its_funding():
    s, rules = by_hand(TAKER, {'half_spread': 0.0, 'taker_fee': 0.0})
    p = hand_panel([START, START + 30 * MINUTE], [[100.0] * 2], np.full((1, 2), 1e-9))
    t = tape({X: on([QUIET] * 45)}, START - MINUTE, START + 45 * MINUTE, s.costs)
    steps = fold(p, [Signal(X, int(x), 0.6, 'long', 0.2) for x in p.times], t, rules, s, Account(1000.0), {X: pl.DataFrame({'time': [START + 17 * MINUTE], 'rate': [0.01]})})
    assert steps[1].snapshot.equity == pytest.approx(995)


# Figures, by hand and by two other libraries

def daily(seed):
    rng = np.random.default_rng(seed)
    r = rng.standard_t(4, int(rng.integers(20, 800))) * 0.012 + rng.normal(0, 0.002)
    return r, pd.Series(r, pd.date_range('2024-01-01', periods=len(r)))


def of_days(r, fills=(), cash=1000.0):
    "The figures of a curve that moves at the last minute of each day."
    times = START + np.arange(len(r)) * DAY + DAY - MINUTE
    return perf.figures(times, cash * (1 + r).cumprod(), np.zeros(len(r)), fills, cash)


@pytest.mark.parametrize('seed', range(20))
def test_ratios_are_those_of_quantstats_and_empyrical(seed):
    r, series = daily(seed)
    f, near = of_days(r), lambda x: pytest.approx(x, rel=1e-9, abs=1e-12)
    assert f['sharpe'] == near(float(perf.sharpe(r))) == near(qs.sharpe(series, periods=365)) == near(empyrical.sharpe_ratio(series, annualization=365))
    assert f['sortino'] == near(float(perf.sortino(r))) == near(qs.sortino(series, periods=365)) == near(empyrical.sortino_ratio(series, annualization=365))
    assert f['volatility'] == near(qs.volatility(series, periods=365)) == near(empyrical.annual_volatility(series, annualization=365))
    assert f['growth'] == near(perf.growth(r)) == near(qs.cagr(series, periods=365)) == near(empyrical.cagr(series, annualization=365))
    assert f['total_return'] == near(qs.comp(series)) == near(empyrical.cum_returns_final(series))
    assert f['max_drawdown'] == near(float(perf.RATIOS['drawdown_of_days'](r))) == near(-qs.max_drawdown(series)) == near(-empyrical.max_drawdown(series))
    assert f['calmar'] == near(qs.calmar(series, periods=365)) == near(empyrical.calmar_ratio(series, annualization=365))
    many = np.stack([r, -r, r[::-1]])
    for k in ('sharpe', 'sortino', 'drawdown_of_days', 'total_return', 'volatility'): assert perf.RATIOS[k](many) == near([float(perf.RATIOS[k](x)) for x in many])


@pytest.mark.parametrize('seed', range(5))
def test_ratios_are_what_plain_sums_say(seed):
    r, _ = daily(seed)
    n, mean = len(r), sum(r) / len(r)
    f = of_days(r)
    assert f['volatility'] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in r) / (n - 1)) * math.sqrt(365), rel=1e-9) and f['sharpe'] == pytest.approx(mean * 365 / f['volatility'], rel=1e-9)
    assert f['sortino'] == pytest.approx(mean / math.sqrt(sum(x ** 2 for x in r if x < 0) / n) * math.sqrt(365), rel=1e-9)
    value, top, deepest = 1.0, 1.0, 0.0
    for x in r:
        value *= 1 + x
        top = max(top, value)
        deepest = max(deepest, (top - value) / top)
    assert f['max_drawdown'] == pytest.approx(deepest) and f['growth'] == pytest.approx(value ** (365 / n) - 1) and f['calmar'] == pytest.approx(f['growth'] / deepest) and f['days'] == n
    w = perf.windows(r, 15)
    assert w['sharpe'] == pytest.approx([float(perf.sharpe(r[i:i + 15])) for i in range(n - 14)]) and w['total_return'] == pytest.approx([np.prod(1 + r[i:i + 15]) - 1 for i in range(n - 14)])


def test_the_drawdown_of_minutes_is_deeper_and_the_days_are_midnight_to_midnight():
    times = START - 90 * MINUTE + np.arange(3000) * MINUTE          # the first day has an hour and a half, the last one is not over
    equity = 1000 + 30 * np.sin(np.arange(3000) / 40)
    days, r = perf.daily_returns(times, equity, 990.0)
    assert days.tolist() == [START - DAY, START, START + DAY, START + 2 * DAY] and r == pytest.approx(np.array([equity[89], equity[1529], equity[2969], equity[2999]]) / [990, equity[89], equity[1529], equity[2969]] - 1)
    assert abs(perf.drawdown(equity, 990.0) - (1 - 970 / 1030)) < 1e-4 and perf.drawdown(equity, 990.0) > float(perf.RATIOS['drawdown_of_days'](r))
    assert perf.drawdown(np.array([95.0, 99.0]), 100.0) == pytest.approx(0.05) and perf.drawdown(np.array([101.0, 102.0]), 100.0) == 0


@pytest.mark.parametrize('seed', range(10))
def test_closed_trades_add_up_to_the_money(seed):
    "Fills that end flat: what the closed trades made is what the cash gained. Whoever holds one lot at a time knows each profit."
    rng = np.random.default_rng(seed)
    fills = [Fill('', (X, Y)[rng.integers(2)], ('buy', 'sell')[rng.integers(2)], float(rng.integers(1, 9)), float(rng.uniform(90, 110)), float(rng.normal(0, 1)), START + i * MINUTE) for i in range(60)]
    for x in (X, Y):
        held = sum(f.sign * f.amount for f in fills if f.symbol == x)
        if held: fills.append(Fill('', x, 'sell' if held > 0 else 'buy', abs(held), 100.0, 0.5, START + DAY - MINUTE))
    assert perf.closed_trades(fills)[1].sum() == pytest.approx(sum(f.cash for f in fills))
    trips = [(float(rng.uniform(90, 110)), float(rng.uniform(90, 110)), int(rng.choice([-1, 1]))) for _ in range(30)]
    there_and_back = [f for a, b, sign in trips for f in (Fill('', X, 'buy' if sign > 0 else 'sell', 2.0, a, 0.3, START), Fill('', X, 'sell' if sign > 0 else 'buy', 2.0, b, 0.1, START))]
    profits = [2 * sign * (b - a) - 0.4 for a, b, sign in trips]
    assert perf.closed_trades(there_and_back)[1] == pytest.approx(profits)
    f = of_days(np.array([0.1, -0.05]), there_and_back)
    assert f['hit_rate'] == np.mean([x > 0 for x in profits]) and f['profit_factor'] == pytest.approx(sum(x for x in profits if x > 0) / -sum(x for x in profits if x < 0)) and (f['trades'], f['closed']) == (60, 30)
    assert f['turnover'] == pytest.approx(sum(2 * (a + b) for a, b, _ in trips) / np.mean([1100, 1045]) / 2)


def test_accounts_and_exposure_follow_from_fills():
    s, rules = by_hand(TAKER, {})
    t = tape({X: on([(100, 110, 90, 105, 9), (104, 110, 90, 95, 9)]), Y: on([QUIET, QUIET])}, START - MINUTE, START + 2 * MINUTE, s.costs)
    fills = [Fill('a', X, 'buy', 2.0, 101.0, 1.0, START), Fill('b', Y, 'sell', 1.0, 99.0, -0.5, START + MINUTE)]
    cash, equity = accounts(fills, t, 1000.0)
    assert cash.tolist() == [1000, 797, 896.5] and equity.tolist() == [1000, 797 + 210, 896.5 + 190 - 100]
    f = perf.figures(t.times, equity, np.array([0.0, 210.0, 290.0]), fills, 1000.0)
    assert f['exposure'] == pytest.approx((210 / 1007 + 290 / 986.5) / 3) and f['in_market'] == pytest.approx(2 / 3)


@pytest.mark.parametrize('seed', range(5))
def test_what_remains_after_all_that_was_tried(seed):
    "Deflated Sharpe and CSCV, once more from the papers' formulas."
    r, _ = daily(seed)
    n, ratio = len(r), r.mean() / r.std(ddof=1)
    for trials, spread in ((1, None), (50, None), (200, 1.3)):
        sd = 1 / math.sqrt(n - 1) if spread is None else spread / math.sqrt(365)
        bar = sd * ((1 - np.euler_gamma) * stats.norm.ppf(1 - 1 / trials) + np.euler_gamma * stats.norm.ppf(1 - 1 / (trials * math.e))) if trials > 1 else 0.0
        z = (ratio - bar) * math.sqrt(n - 1) / math.sqrt(1 - stats.skew(r) * ratio + (stats.kurtosis(r, fisher=False) - 1) / 4 * ratio ** 2)
        assert perf.deflated_sharpe(r, trials, spread) == pytest.approx(stats.norm.cdf(z), rel=1e-6, abs=1e-12)
    table = np.random.default_rng(seed).normal(0, 0.01, (43, 7))
    parts, logits = np.array_split(np.arange(43), 4), []
    for c in itertools.combinations(range(4), 2):
        into, out = (table[np.concatenate([parts[i] for i in range(4) if (i in c) is inside])] for inside in (True, False))
        best = (into.mean(0) / into.std(0)).argmax()
        rank = stats.rankdata(out.mean(0) / out.std(0))[best] / 8
        logits.append(math.log(rank / (1 - rank)))
    found = perf.overfitting(table, 4)
    assert sorted(found.logits) == pytest.approx(sorted(logits)) and found.probability == pytest.approx(np.mean([x <= 0 for x in logits]))


# The spread of recorded books

def test_the_spread_of_a_quotes_file_is_paid_in_the_next_minute_and_the_settings_in_all_others(tmp_path):
    s, rules = by_hand(TAKER, {'half_spread': 0.001, 'slippage': 0.0, 'taker_fee': 0.0})
    candles = {X: on([QUIET] * 30), Y: on([QUIET] * 30)}
    seen = [START + 4 * MINUTE, START + 4 * MINUTE + 30_000]
    pl.DataFrame({'time': seen, 'bid': [99.0, 97.0], 'ask': [101.0, 103.0]}).write_csv(tmp_path / 'XUSDT.csv')
    t = tape(candles, START - MINUTE, START + 30 * MINUTE, s.costs, read_quotes(tmp_path, [X, Y]))
    assert t.half_spread[t.at(START + 5 * MINUTE), 0] == pytest.approx(0.02)        # (0.01 + 0.03) / 2, known when its minute was over
    rest = np.delete(t.half_spread[:, 0], t.at(START + 5 * MINUTE))
    assert (rest == 0.001).all() and (t.half_spread[:, 1] == 0.001).all()
    for minute, paid in ((4, 100.1), (5, 102.0), (6, 100.1)):
        _, (f,), _ = at_work(s, rules, t, [(X, 'buy', 0.5)], Account(1000.0), t.at(START + minute * MINUTE))
        assert f.price == pytest.approx(paid)


def test_a_saved_result_is_of_the_quotes_that_were_given(demo, tmp_path):
    from realdeal import cards
    from realdeal.plan import report_span
    from realdeal.results import champion, measure, quotes_of, stem_of
    job, name, lines = replace(demo.job, say=lambda x: lines.append(x)), 'BTCUSDT', list()
    predictor, (start, end) = champion(job), report_span(job)
    def file(minute, ask):
        pl.DataFrame({'time': [start + minute * MINUTE], 'bid': [100.0], 'ask': [ask]}).write_parquet(tmp_path / 'BTCUSDT.parquet')
        return tmp_path
    def made(quotes): return measure(job, predictor, [name], quotes=quotes_of(job, quotes, ['BTC/USDT'])) is not None
    def saved(): return cards.load_result(job.places.data / 'results', stem_of(job, name))
    made(None)
    plain = saved()
    assert plain.provenance.quotes == ''
    assert made(file(7, 100.1)) and any('spread of 1 of ' in x for x in lines)
    first = saved()
    assert not made(tmp_path) and made(file(7, 100.2))
    other = saved()
    assert len({plain.key, first.key, other.key}) == len({'', first.provenance.quotes, other.provenance.quotes}) == 3
    assert made(None) and saved().key == plain.key                                  # nor is it taken for one without them
    for minute in (-2, (end - start) // MINUTE):
        with pytest.raises(Missing, match='no quote of BTC/USDT from'): made(file(minute, 100.1))


@pytest.mark.parametrize('workers', [1, 2])
def test_accounts_that_vectorbt_does_not_share_are_no_result_whoever_compares_them(workers, tmp_path, monkeypatch):
    from realdeal import results
    from realdeal.cards import example_card, read_card
    from realdeal.features import panel
    from realdeal.labels import forward_return
    from realdeal.market import generate
    s, end = Settings(), START + 16 * DAY
    candles = {x: results.frame_of(c) for x, c in generate('realistic', ['BTC/USDT'], START, 16 * 1440, 7).items()}
    p = panel(candles, {}, end, start=START + 12 * DAY)
    said = [Signal('BTC/USDT', int(t), 0.6, 'long' if i % 40 < 20 else 'flat', 0.2) for i, t in enumerate(p.times)]
    case = results.Case('x', p, said, forward_return(p, s.strategy.horizon), candles, {'BTC/USDT': MarketRules('BTC/USDT', lot=1e-5, tick=0.01, min_notional=5.0)}, s, START + 12 * DAY, end, read_card(example_card(tmp_path)).provenance, 1)
    case.save(tmp_path / 'right', 'x', workers)
    fair = results.tally
    monkeypatch.setattr(results, 'tally', lambda *a: replace(r := fair(*a), cash=r.cash + 0.01))
    with pytest.raises(BadData, match='the accounts of the fold and of vectorbt differ by 0.0100: a fill rule is broken'): case.save(tmp_path / 'wrong', 'x', workers)
    assert (tmp_path / 'right/x.json').exists() and not (tmp_path / 'wrong').exists()
