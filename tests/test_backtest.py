"""The backtest, judged from outside: by an accountant that was written from the chapters' prose, by tables of candles whose fills were worked out by hand, and by other libraries' figures."""
import itertools, math
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import lru_cache
import empyrical, numpy as np, pandas as pd, polars as pl, pytest, quantstats.stats as qs
from scipy import stats
from realdeal import performance as perf
from realdeal.backtest import accounts, backtest, costs_of, fold, tape, work
from realdeal.features import Panel
from realdeal.fills import terms_of
from realdeal.orders import plan
from realdeal.settings import Settings
from realdeal.types import DAY, MINUTE, Account, Decision, Fill, Intent, MarketRules, Signal

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
                else: budget += -trade[x] * price[x]
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
            half = max(c.half_spread, c.spread_vol * book.sigma_before(t)) if c.spread_vol else c.half_spread
            if rests:
                price, fee = on_tick(book.close_before(t - s.orders.latency * MINUTE) * (1 - sign * half), tick, o['side']), c.maker_fee
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
    late = execution == 'maker' and latency > 0
    s = Settings().override(
        orders={'market': market, 'execution': execution, 'then': then, 'latency': latency, 'patience': int(rng.integers(1, min(11, every - latency)))},
        strategy={'decision_every': every, 'horizon': one(15, 30, 120), 'allow_short': market == 'perpetual', 'max_weight': one(0.5, 1.0), 'band': one(0.0, 0.05, 0.2)},
        costs={'maker_fee': one(-0.0002, 0.0, 0.0004), 'taker_fee': one(0.0, 0.0006), 'half_spread': one(0.0, 0.0002), 'spread_vol': 0.0 if late else one(0.0, 0.4), 'slippage': one(0.0, 0.0003),
            'impact': one(0.0, 0.8, 2.0), 'participation': one(1.0, 0.3, 0.05), 'margin': one(0.0, 0.0005)},
        risk={'max_gross': 1.0 if market == 'spot' else one(1.0, 2.0), 'max_drawdown': 0.5, 'max_daily_loss': 0.5})
    fine_lots, fine_ticks = one(True, False), one(True, False)
    rules = {x: MarketRules(x, lot=fine if fine_lots else lot, tick=0.01 if fine_ticks else tick, min_notional=one(5.0, 200.0)) for x, fine, lot, tick in ((X, 0.001, 0.5, 0.25), (Y, 0.01, 5.0, 0.04))}
    candles, start, end = paths(int(rng.integers(4))), START + DAY, START + 3 * DAY
    at = np.arange(start + (every * MINUTE if execution == 'maker' else 0), end, every * MINUTE)
    books = [Ledger(df, end) for df in candles.values()]
    p = hand_panel(at, [[b.close_before(t) for t in at] for b in books], np.exp(rng.uniform(math.log(0.0008), math.log(0.012), (2, len(at)))))
    sides = rng.choice(['long', 'short', 'flat'], len(p), p=[0.35, 0.3, 0.35])
    signals = [Signal(p.symbols[g], int(t), 0.6, str(side), 0.2) for g, t, side in zip(p.group, p.times, sides, strict=True)]     # type: ignore[arg-type]
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
