"""The emulator against raw HTTP, raw sockets and the real ccxt client: what a venue refuses, limits, and in which order it speaks."""
import asyncio, json, time
from contextlib import asynccontextmanager
from urllib.parse import urlencode
import aiohttp, ccxt.pro, numpy as np, pytest
from ccxt.protobuf.mexc.PushDataV3ApiWrapper_pb2 import PushDataV3ApiWrapper
from realdeal.emulator import Emulator, Limits, emulator_process, serve
from realdeal.faults import VENUE_FAULTS, lasts
from realdeal.market import SIMULATED_START, BURST, SUMS, Candles, Trade, bar_of, checksum, generate, trades_at
from realdeal.types import DAY, MINUTE, BadData, MarketRules, Missing
from realdeal.venue import BookShape, Fees, NewOrder, Venue, VenueError, exact
from realdeal.wire import client_options, secret_of, sign

START = 1_735_689_600_000
NOW = START + DAY
HISTORIES = generate('realistic', ('BTC/USDT', 'ETH/USDT'), START, 2880, seed=11)
KEY = 'emulator-main'
DEALS, DEPTH, KLINE = ('spot@public.aggre.deals.v3.api.pb@100ms@BTCUSDT', 'spot@public.aggre.depth.v3.api.pb@100ms@BTCUSDT', 'spot@public.kline.v3.api.pb@BTCUSDT@Min1')
ORDERS, MYDEALS, ACCOUNT = (f'spot@private.{k}.v3.api.pb' for k in ('orders', 'deals', 'account'))


class Raw:
    "A client without manners: it says exactly what it is told to."
    def __init__(self, emulator, http): self.e, self.http = emulator, http

    async def ask(self, method, path, key=KEY, secret=None, stamp=0, signed=True, **params):
        headers = {'X-MEXC-APIKEY': key} if key else {}
        query = urlencode(params | ({'timestamp': self.e.clock.now + stamp} if signed else {}))
        if signed: query += '&signature=' + sign(secret or secret_of(key), query)
        async with self.http.request(method, f'{self.e.url}{path}?{query}', headers=headers) as r:
            self.headers = r.headers
            return r.status, await r.json()

    async def code(self, method, path, **kw):
        status, body = await self.ask(method, path, **kw)
        return (status, body['code']) if status != 200 else 200

    async def order(self, side='BUY', type='LIMIT', quantity='0.01', price='50000', **kw):
        given = {'side': side, 'type': type, 'quantity': quantity, 'price': price, 'symbol': 'BTCUSDT', **kw}
        return await self.ask('POST', '/api/v3/order', **{k: v for k, v in given.items() if v is not None})

    async def free(self, asset):
        body = (await self.ask('GET', '/api/v3/account'))[1]
        return {b['asset']: (float(b['free']), float(b['locked'])) for b in body['balances']}[asset]

    @asynccontextmanager
    async def stream(self, *channels, query=''):
        "A socket that is subscribed, and the list its frames go to."
        frames, acks = [], []
        async def read(ws):
            async for m in ws:
                if m.type == aiohttp.WSMsgType.BINARY: frames.append(m.data)
                else: acks.append(m.data)
        async with self.http.ws_connect(self.e.ws_url + query) as ws:
            task = asyncio.create_task(read(ws))
            await ws.send_json({'method': 'SUBSCRIPTION', 'params': list(channels)})
            async with asyncio.timeout(5):
                while not acks: await asyncio.sleep(.005)  # noqa: ASYNC110
            yield frames, acks, ws
            task.cancel()

    async def step(self, minutes=1):
        async with self.http.post(f'{self.e.url}/emulator/step', params={'minutes': minutes}) as r: body = r.status, await r.json()
        await asyncio.sleep(.1)  # the reader's own loop
        return body


@asynccontextmanager
async def raw(**kw):
    given = {'histories': HISTORIES, 'now': NOW, 'balances': {'USDT': 10_000, 'BTC': 1}, 'seed': 3, **kw}
    async with serve(**given) as e, aiohttp.ClientSession() as http: yield Raw(e, http)


def parsed(frames): return [PushDataV3ApiWrapper.FromString(f) for f in frames]


# ---- who may speak

async def test_a_wrong_signature_key_or_stamp_is_refused():
    async with raw() as r:
        account = '/api/v3/account'
        assert await r.code('GET', account) == 200
        assert await r.code('GET', account, secret='wrong') == (400, 700002)
        assert await r.code('GET', account, key='mx0real') == (400, 10072)
        assert await r.code('GET', account, key='') == (400, 10072)
        assert await r.code('GET', account, signed=False) == (400, 700002)
        assert [await r.code('GET', account, stamp=s) for s in (-5000, 1000)] == [200, 200]
        assert [await r.code('GET', account, stamp=s) for s in (-5001, 1001)] == [(400, 700003)] * 2
        assert await r.code('GET', account, stamp=-3000, recvWindow=2000) == (400, 700003)
        assert await r.code('GET', account, recvWindow=60001) == (400, 700005)


async def test_a_signed_request_cannot_be_altered():
    async with raw() as r:
        query = urlencode({'symbol': 'BTCUSDT', 'timestamp': NOW})
        url = f'{r.e.url}/api/v3/openOrders?{query.replace("BTC", "ETH")}&signature={sign(secret_of(KEY), query)}'
        async with r.http.get(url, headers={'X-MEXC-APIKEY': KEY}) as answer: assert (await answer.json())['code'] == 700002


async def test_each_key_has_its_own_wallet_and_orders():
    async with raw() as r:
        _, placed = await r.order(newClientOrderId='mine')
        assert (await r.free('USDT'))[1] > 0
        assert await r.code('GET', '/api/v3/order', key='emulator-other', symbol='BTCUSDT', orderId=placed['orderId']) == (400, -2013)
        _, other = await r.ask('GET', '/api/v3/account', key='emulator-other')
        assert {b['asset']: b['locked'] for b in other['balances']}['USDT'] == '0'


@pytest.mark.parametrize('method,path', [('GET', '/api/v3/nothing'), ('PUT', '/api/v3/order'), ('GET', '/etc/passwd')])
async def test_what_does_not_exist_is_404(method, path):
    async with raw() as r: assert (await r.ask(method, path))[0] == 404


async def test_it_listens_on_loopback_only():
    async with raw() as r: assert r.e.runner.addresses[0][0] == '127.0.0.1'


# ---- what an order must be

@pytest.mark.parametrize('order,code', [
    ({'quantity': '0.0100001'}, 10096), ({'price': '50000.001'}, 30010), ({'quantity': '0.00009'}, 30002), ({'quantity': '0'}, 10102), ({'quantity': '-1'}, 10102),
    ({'quantity': 'many'}, 700008), ({'quantity': '1e40'}, 700008), ({'price': '1e-40'}, 700008), ({'price': 'Infinity'}, 10102), ({'quantity': 'NaN'}, 10102), ({'quantity': None}, 10102), ({'price': None}, 10102), ({'quantity': '1'}, 10101), ({'side': 'SELL', 'quantity': '1.1'}, 10101),
    ({'symbol': 'DOGEUSDT'}, -1121), ({'side': 'HOLD'}, 700008), ({'type': 'STOP'}, 700008), ({'newClientOrderId': 'x' * 33}, 700008), ({'newClientOrderId': 'a b'}, 700008),
    ({'type': 'MARKET', 'price': None, 'quantity': None, 'quoteOrderQty': '4.9'}, 30002), ({'type': 'MARKET', 'price': None, 'quantity': None, 'quoteOrderQty': '10001'}, 10101),
])
async def test_a_bad_order_is_refused_and_leaves_no_trace(order, code):
    async with raw() as r:
        before = await r.free('USDT')
        status, body = await r.order(**order)
        assert (status, body['code']) == (400, code), body
        assert await r.free('USDT') == before and r.e.venue.orders == {}
        given = {'side': 'BUY', 'type': 'LIMIT', 'quantity': '0.01', 'price': '50000', 'symbol': 'BTCUSDT', **order}
        assert await r.code('POST', '/api/v3/order/test', **{k: v for k, v in given.items() if v is not None}) == (400, code)


async def test_a_symbol_that_may_not_be_traded_by_api():
    async with raw(rules={s: MarketRules(s, 1e-6, .01, 5., active=s != 'BTC/USDT') for s in HISTORIES}) as r:
        assert (await r.order())[1]['code'] == 10007
        x = ccxt.pro.mexc(client_options(r.e.url))
        try:
            await x.load_time_difference()
            markets = await x.load_markets()
        finally: await x.close()
        assert not markets['BTC/USDT']['active'] and markets['ETH/USDT']['active']


async def test_an_open_client_id_is_refused_and_a_used_one_buys_again():
    async with raw() as r:
        assert (await r.order(newClientOrderId='a'))[0] == 200
        assert (await r.order(newClientOrderId='a'))[1]['code'] == 603
        assert await r.code('DELETE', '/api/v3/order', symbol='BTCUSDT', origClientOrderId='a') == 200
        assert await r.code('DELETE', '/api/v3/order', symbol='BTCUSDT', origClientOrderId='a') == (400, -2011)
        assert (await r.order(newClientOrderId='a'))[0] == 200
        market = {'type': 'MARKET', 'price': None, 'newClientOrderId': 'b', 'quantity': '0.001'}
        assert [(await r.order(**market))[0] for _ in range(2)] == [200, 200]  # filled at once, so the id is free: bought twice
        assert (await r.free('BTC'))[0] == pytest.approx(1.002)


# ---- matching

async def test_a_market_order_eats_a_thin_book_in_part():
    async with raw(balances={'USDT': 1_000_000, 'BTC': 0}, shape=BookShape(level_quote=1_000., levels=5)) as r:
        depth = (await r.ask('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False))[1]
        there = sum(float(a) for _, a in depth['asks'])
        _, placed = await r.order(type='MARKET', price=None, quantity='1')
        _, order = await r.ask('GET', '/api/v3/order', symbol='BTCUSDT', orderId=placed['orderId'])
        assert order['status'] == 'PARTIALLY_CANCELED' and float(order['executedQty']) == pytest.approx(there) and there < 1
        _, deals = await r.ask('GET', '/api/v3/myTrades', symbol='BTCUSDT')
        assert len(deals) == 5 and not deals[0]['isMaker'] and sum(float(d['qty']) for d in deals) == pytest.approx(there)
        paid = sum(float(d['quoteQty']) + float(d['commission']) for d in deals)
        assert (await r.free('USDT'))[0] == pytest.approx(1_000_000 - paid, abs=1e-9) and (await r.free('BTC'))[0] == pytest.approx(there)
        assert (await r.ask('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False))[1]['asks'] == []


def steps(*prices):
    "One symbol whose minutes are flat at `prices`: every trade of a minute is at its price."
    p = np.array(prices, dtype=float)
    return {'BTC/USDT': Candles('BTC/USDT', START + MINUTE * np.arange(len(p)), p, p, p, p, np.full(len(p), 100.))}


async def test_a_resting_order_is_filled_only_when_traded_through():
    # minute 0: 60,000   1: at the order's price   2: a tick below it
    async with raw(histories=steps(60_000, 59_900, 59_899.99, 59_899.99), now=START) as r:
        _, placed = await r.order(price='59900', quantity='0.01')
        async def state(): return (await r.ask('GET', '/api/v3/order', symbol='BTCUSDT', orderId=placed['orderId']))[1]
        await r.step(2)  # stands 2 s into minute 2 only if its opening trade is sent: so that trade is through
        filled = await state()
        assert filled['status'] == 'FILLED' and filled['updateTime'] == START + 2 * MINUTE  # not a moment before
        assert float(filled['cummulativeQuoteQty']) == 599.
    async with raw(histories=steps(60_000, 59_900, 59_900, 59_900), now=START) as r:
        _, placed = await r.order(price='59900', quantity='0.01')
        await r.step(3)
        assert (await state())['status'] == 'NEW'  # two minutes of trades at its price, and none through it


async def test_post_only_and_fill_or_kill():
    async with raw(balances={'USDT': 100_000}) as r:
        ask = (await r.ask('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False))[1]['asks'][0][0]
        async def fate(**kw):
            _, placed = await r.order(price=ask, **kw)
            return (await r.ask('GET', '/api/v3/order', symbol='BTCUSDT', orderId=placed['orderId']))[1]['status']
        assert await fate(type='LIMIT_MAKER', quantity='0.0005') == 'CANCELED' and r.e.venue.deals == []
        assert await fate(type='FILL_OR_KILL', quantity='0.5') == 'CANCELED' and r.e.venue.deals == []
        assert await fate(type='FILL_OR_KILL', quantity='0.0005') == 'FILLED'
        assert await fate(type='IMMEDIATE_OR_CANCEL', quantity='0.5') == 'PARTIALLY_CANCELED'
        assert (await r.free('USDT'))[1] == 0  # nothing stays locked


# ---- limits

async def test_429_says_how_long_and_keeps_its_word():
    async with raw(limits=Limits(weight=5, window=1.)) as r:
        ask = {'symbol': 'BTCUSDT', 'interval': '1m', 'signed': False}
        answers = [await r.code('GET', '/api/v3/klines', **ask) for _ in range(6)]
        assert answers == [200] * 5 + [(429, 429)] and r.headers['Retry-After'] == '1'
        assert await r.code('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False) == 200  # each endpoint has its own budget
        await asyncio.sleep(1.)
        assert await r.code('GET', '/api/v3/klines', **ask) == 200
        x = ccxt.pro.mexc({**client_options(r.e.url), 'enableRateLimit': False})
        try:
            with pytest.raises(ccxt.RateLimitExceeded):
                for _ in range(6): await x.fetch_time()
        finally: await x.close()


async def test_a_connection_holds_so_many_subscriptions():
    async with raw(limits=Limits(subscriptions=2)) as r, r.stream(DEALS, DEPTH, KLINE) as (frames, acks, ws):
        assert acks[0] == json.dumps({'id': 0, 'code': 0, 'msg': f'Not Subscribed successfully! [{KLINE}].  Reason： Blocked! '})
        await ws.send_json({'method': 'UNSUBSCRIPTION', 'params': [DEPTH]})
        await ws.send_json({'method': 'SUBSCRIPTION', 'params': [KLINE]})
        await r.step()
        assert json.loads(acks[-1])['msg'] == KLINE and {f.channel for f in parsed(frames)} == {DEALS, KLINE}


@pytest.mark.parametrize('limits,channels,life', [
    (Limits(idle=.3), [], .3), (Limits(ping_timeout=.3), [DEALS], .3), (Limits(connection_age=.3), [DEALS], .3)])
async def test_a_connection_ends_with_its_limit(limits, channels, life):
    async with raw(limits=limits) as r, r.http.ws_connect(r.e.ws_url) as ws:
        began = time.monotonic()
        await ws.send_json({'method': 'SUBSCRIPTION', 'params': channels})
        async for _ in ws: pass
        assert ws.closed and life - .1 < time.monotonic() - began < life + 2
        assert r.e.hub.connections == [] and r.e.hub.listeners == {}


async def test_a_ping_keeps_a_connection():
    async with raw(limits=Limits(ping_timeout=.4)) as r, r.stream(DEALS) as (_, acks, ws):
        for _ in range(4):
            await asyncio.sleep(.2)
            await ws.send_json({'method': 'ping'})
        await asyncio.sleep(.1)
        assert not ws.closed and json.loads(acks[-1])['msg'] == 'PONG'


async def test_a_listen_key_expires_unless_kept():
    async with raw(limits=Limits(listen_key_life=.5)) as r:
        key = (await r.ask('POST', '/api/v3/userDataStream'))[1]['listenKey']
        async with r.stream(ORDERS, query=f'?listenKey={key}') as (_, _, ws):
            await asyncio.sleep(.3)
            assert await r.code('PUT', '/api/v3/userDataStream', listenKey=key) == 200
            await asyncio.sleep(.3)
            assert not ws.closed
            await asyncio.sleep(.4)
            assert ws.closed
        assert (await r.code('PUT', '/api/v3/userDataStream', listenKey=key))[1] == 730002
        async with r.http.ws_connect(f'{r.e.ws_url}?listenKey={key}') as ws: assert (await ws.receive()).data == 'Invalid listen key'


async def test_the_users_stream_is_the_users_own():
    async with raw() as r:
        keys = {k: (await r.ask('POST', '/api/v3/userDataStream', key=k))[1]['listenKey'] for k in (KEY, 'emulator-other')}
        async with r.stream(ORDERS, MYDEALS, ACCOUNT, query=f'?listenKey={keys[KEY]}') as (mine, _, _), \
                   r.stream(ORDERS, MYDEALS, ACCOUNT, query=f'?listenKey={keys["emulator-other"]}') as (others, _, _), r.stream(ORDERS) as (nobodys, acks, _):
            await r.order(type='MARKET', price=None, quantity='0.01', newClientOrderId='z')
            await asyncio.sleep(.1)
            assert [f.channel for f in parsed(mine)] == [ORDERS, MYDEALS, ORDERS, ACCOUNT, ACCOUNT] and others == nobodys == [] and 'Not Subscribed' in acks[0]
            order, deal = parsed(mine)[2].privateOrders, parsed(mine)[1].privateDeals
            assert (order.clientId, order.status, order.cumulativeQuantity) == ('z', 2, '0.01') and float(deal.feeAmount) == pytest.approx(float(deal.amount) * .0005)


@pytest.mark.parametrize('said', ['', 'hello', '[]', '{"method": 5}', '{"method":"SUBSCRIPTION","params":"x"}', '{"method":"SUBSCRIPTION","params":[7]}', '{"method":"SUBSCRIPTION"}'])
async def test_nonsense_is_answered_and_survived(said):
    async with raw() as r, r.http.ws_connect(r.e.ws_url) as ws:
        await ws.send_str(said)
        assert json.loads((await ws.receive()).data)['code'] == 0
        await ws.send_json({'method': 'PING'})
        assert json.loads((await ws.receive()).data)['msg'] == 'PONG'


@pytest.mark.parametrize('path,params', [('klines', {'interval': '2m'}), ('klines', {'interval': '1m', 'startTime': 'x'}), ('klines', {'interval': '1m', 'startTime': 'inf'}), ('klines', {'interval': '1m', 'endTime': '1e30'}),
                                         ('klines', {'interval': '1m', 'symbol': 'X'}), ('depth', {'limit': 'many'}), ('ticker/24hr', {'symbol': 'X'})])
async def test_a_nonsense_question_is_a_400(path, params):
    async with raw() as r: assert (await r.ask('GET', f'/api/v3/{path}', signed=False, **{'symbol': 'BTCUSDT', **params}))[0] == 400


# ---- the market's clock and what it sends

async def listen(minutes, **kw):
    async with raw(**kw) as r, r.stream(DEALS, DEPTH, KLINE, DEALS.replace('BTC', 'ETH')) as (frames, _, _):
        for _ in range(minutes): await r.step()
        return list(frames), r.e.record()


async def test_two_emulators_with_one_seed_send_the_same_frames():
    (one, record), (two, _), (other, _) = [await listen(3, seed=s) for s in (3, 3, 4)]
    assert one == two and one != other and len(one) == sum(r['frames'] for by in record.values() for r in by.values())


async def test_a_step_ends_after_the_next_opening_trade_and_rebuilds_the_bar():
    frames, record = await listen(3)
    messages, btc = parsed(frames), HISTORIES['BTC/USDT']
    times = [m.sendTime or m.createTime for m in messages]
    assert times == sorted(times) and times[0] > NOW and NOW + 3 * MINUTE <= times[-1] <= NOW + 3 * MINUTE + 2000
    deals = [d for m in messages if m.channel == DEALS for d in m.publicAggreDeals.deals]
    for k in (1, 2):  # the opening trade of minute 0 was before we listened
        minute = [Trade(d.time % MINUTE, float(d.price), float(d.quantity), d.tradeType == 1) for d in deals if d.time // MINUTE == NOW // MINUTE + k]
        bar = btc.bar(btc.index_at(NOW + k * MINUTE))
        assert bar_of(NOW + k * MINUTE, minute) == bar
        last = [m.publicSpotKline for m in messages if m.channel == KLINE and m.publicSpotKline.windowStart == bar.time // 1000][-1]
        assert [float(v) for v in (last.openingPrice, last.highestPrice, last.lowestPrice, last.closingPrice, last.volume)] == [bar.open, bar.high, bar.low, bar.close, bar.volume]
    assert record['BTCUSDT'][DEALS]['trades'] == len(deals) and record['BTCUSDT'][KLINE]['bars'] == 4


async def test_depth_frames_continue_the_snapshot_without_a_hole():
    async with raw(balances={'USDT': 1_000_000}) as r, r.stream(DEPTH) as (frames, _, _):
        await r.step()
        snapshot = (await r.ask('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False))[1]
        await r.order(type='MARKET', price=None, quantity='0.5')  # our own order moves the book too
        await r.step(5)
        final = (await r.ask('GET', '/api/v3/depth', symbol='BTCUSDT', signed=False))[1]
    deltas = [m.publicAggreDepths for m in parsed(frames)]
    assert all(int(b.fromVersion) == int(a.toVersion) + 1 for a, b in zip(deltas, deltas[1:], strict=False))
    book = {side: dict(snapshot[side]) for side in ('bids', 'asks')}
    for d in deltas:
        if int(d.fromVersion) <= snapshot['lastUpdateId']: continue
        for side in ('bids', 'asks'): book[side] |= {i.price: i.quantity for i in getattr(d, side)}
    for side in ('bids', 'asks'): assert {p: a for p, a in book[side].items() if float(a)} == dict(final[side])
    assert int(deltas[-1].toVersion) == final['lastUpdateId']
    assert any(int(d.toVersion) > int(d.fromVersion) for d in deltas)  # the order took several levels at once


async def test_closed_bars_are_final_and_the_future_is_not_told():
    async with raw() as r:
        ask = {'symbol': 'BTCUSDT', 'interval': '1m', 'startTime': NOW - MINUTE, 'endTime': NOW + DAY, 'signed': False}
        await r.step()
        first = (await r.ask('GET', '/api/v3/klines', **ask))[1]
        assert first[-1][0] == NOW + MINUTE and len(first) == 3
        await r.step(3)
        assert (await r.ask('GET', '/api/v3/klines', **ask))[1][:2] == first[:2]


async def test_a_page_has_at_most_500_bars():
    async with raw() as r:
        _, page = await r.ask('GET', '/api/v3/klines', symbol='BTCUSDT', interval='1m', startTime=START, endTime=NOW, limit=1000, signed=False)
        assert len(page) == 500 and page[0][0] == START


async def test_the_end_of_the_data_is_said():
    async with raw(now=START + 2878 * MINUTE) as r:
        assert (await r.step(2))[0] == 200
        status, body = await r.step()
        assert status == 409 and 'the data ends' in body['error'] and body['kind'] == 'Missing'


async def test_a_running_clock_never_outruns_its_speed_and_stops_at_the_end():
    async with raw(speed=600., now=START + 2868 * MINUTE) as r:
        assert (await r.step())[0] == 409
        began = time.monotonic()
        await r.http.post(f'{r.e.url}/emulator/run')
        while r.e.clock.running:
            assert r.e.clock.now - (START + 2868 * MINUTE) <= (time.monotonic() - began) * 600_000 + 1
            await asyncio.sleep(.02)
        assert r.e.clock.now == r.e.tape.end and time.monotonic() - began >= 1.2


async def test_a_clock_that_cannot_keep_up_waits():
    async with raw(speed=100_000.) as r, r.stream(DEALS, DEPTH, KLINE) as (frames, _, _):
        await r.http.post(f'{r.e.url}/emulator/run')
        while r.e.clock.running and not r.e.clock.slowed: await asyncio.sleep(.02)  # noqa: ASYNC110
        async with r.http.get(f'{r.e.url}/emulator/status') as s: status = await s.json()
        assert status['slowed'] > 0 and 0 < status['reached'] < 100_000
        await r.e.clock.pause()
        deals = [d.time for m in parsed(frames) if m.channel == DEALS for d in m.publicAggreDeals.deals]
        assert deals == [t.time for t in r.e.tape.ticks(NOW, deals[-1]) if t.symbol == 'BTC/USDT']  # late, never lost


@pytest.mark.parametrize('kw,error', [({'histories': {}}, Missing), ({'now': START - MINUTE}, BadData), ({'speed': 0}, BadData), ({'speed': 'fast'}, BadData)])
def test_a_wrong_emulator_is_not_built(kw, error):
    with pytest.raises(error): Emulator(**{'histories': HISTORIES, **kw})


async def test_the_running_bar_holds_only_what_was_traded():
    async with raw() as r:
        await r.step()
        _, (row,) = await r.ask('GET', '/api/v3/klines', symbol='BTCUSDT', interval='1m', limit=1, signed=False)
        done = [t for t in r.e.tape.minute('BTC/USDT', r.e.clock.now).ticks if t.time <= r.e.clock.now]
        assert float(row[5]) == pytest.approx(sum(t.amount for t in done)) and float(row[5]) < HISTORIES['BTC/USDT'].bar(HISTORIES['BTC/USDT'].index_at(row[0])).volume
        assert [float(row[k]) for k in (1, 2, 3, 4)] == [done[0].price, max(t.price for t in done), min(t.price for t in done), done[-1].price]


async def test_a_maker_gets_no_more_than_was_traded_and_hears_of_it():
    thin = steps(60_000, 59_000, 59_000, 59_000)
    thin = {'BTC/USDT': Candles('BTC/USDT', *thin['BTC/USDT'].columns[:5], np.full(4, .05))}
    async with raw(histories=thin, now=START, balances={'USDT': 100_000}) as r:
        key = (await r.ask('POST', '/api/v3/userDataStream'))[1]['listenKey']
        async with r.stream(ORDERS, MYDEALS, query=f'?listenKey={key}') as (frames, _, _):
            _, placed = await r.order(price='59500', quantity='1')
            await r.step(2)
            _, order = await r.ask('GET', '/api/v3/order', symbol='BTCUSDT', orderId=placed['orderId'])
            traded = sum(t.amount for t in r.e.tape.ticks(START, r.e.clock.now))
            assert order['status'] == 'PARTIALLY_FILLED' and .04 < float(order['executedQty']) <= traded
            deals = [m.privateDeals for m in parsed(frames) if m.channel == MYDEALS]
            assert sum(float(d.quantity) for d in deals) == pytest.approx(float(order['executedQty'])) and all(d.isMaker and d.price == '59500' for d in deals)


@pytest.mark.parametrize('seed', range(5))
def test_no_money_appears_or_vanishes(seed):
    "Random orders against a random walk: balances are the opening plus the deals, and what is locked belongs to open orders, to the last digit."
    rng, rules = np.random.default_rng(seed), MarketRules('BTC/USDT', 1e-6, .01, 5.)
    v = Venue({'BTC/USDT': rules}, {'USDT': 5_000, 'BTC': '0.1'}, Fees(maker=.0002, taker=.0005), BookShape(level_quote=500.), seed)
    price, refused = 60_000., 0
    for t in range(600):
        price = round(price * float(np.exp(rng.normal(0, .0005))), 2)
        v.trade('BTC/USDT', t, price, round(float(rng.exponential(.01)), 6))
        kind = str(rng.choice(['LIMIT', 'LIMIT_MAKER', 'MARKET', 'IMMEDIATE_OR_CANCEL', 'FILL_OR_KILL']))
        at = None if kind == 'MARKET' else exact(round(price * (1 + float(rng.normal(0, .001))), 2))
        by_cost = kind == 'MARKET' and rng.random() < .5
        amount = None if by_cost else exact(round(float(rng.exponential(.02)), 6))
        try: v.place('a', NewOrder('BTC/USDT', str(rng.choice(['BUY', 'SELL'])), kind, amount, at, exact(round(float(rng.exponential(500)), 2)) if by_cost else None), t)
        except VenueError: refused += 1
        if rng.random() < .3 and (mine := v.open_orders('a')): v.cancel('a', 'BTC/USDT', t, mine[int(rng.integers(len(mine)))].id)
        if t % 20: continue
        usdt, btc = v.ledger.balance('a', 'USDT'), v.ledger.balance('a', 'BTC')
        signed = [(1 if d.side == 'BUY' else -1, d) for d in v.deals]
        assert sum(usdt) == 5_000 - sum(k * d.price * d.amount + d.fee for k, d in signed) and sum(btc) == exact('0.1') + sum(k * d.amount for k, d in signed)
        assert usdt.locked == sum(o.locked for o in v.open_orders('a') if o.is_buy) and btc.locked == sum(o.locked for o in v.open_orders('a') if not o.is_buy)
        assert min(*usdt, *btc) >= 0 and all(o.filled <= o.amount for o in v.orders.values() if o.request.cost is None)
    assert len(v.deals) > 50 and refused > 10 and any(d.is_maker for d in v.deals)


async def test_during_a_halt_no_order_is_taken_but_one_can_be_cancelled():
    flat = steps(60_000, 60_000, 60_000, 60_000)['BTC/USDT']
    halted = {'BTC/USDT': flat.take(np.array([True, False, True, True]))}  # minute 1 is missing
    async with raw(histories=halted, now=START) as r:
        _, placed = await r.order()
        await r.step()
        assert (await r.order())[1]['code'] == 30000
        assert await r.code('DELETE', '/api/v3/order', symbol='BTCUSDT', orderId=placed['orderId']) == 200
        await r.step()
        assert (await r.order())[0] == 200


# ---- faults

ETH_DEALS, MINI, TICKER = DEALS.replace('BTC', 'ETH'), 'spot@public.miniTicker.v3.api.pb@BTCUSDT@UTC+8', 'spot@public.aggre.bookTicker.v3.api.pb@100ms@BTCUSDT'

async def fault(r, name, **kw):
    async with r.http.post(f'{r.e.url}/emulator/fault', params={'name': name, **kw}) as answer: return answer.status, await answer.json()

async def ended(r, name):
    "Wait until the venue says that the fault is over."
    async with asyncio.timeout(5):
        while name in r.e.status()['faults']['on']: await asyncio.sleep(.02)  # noqa: ASYNC110

async def pong(ws, acks):
    "Is a ping answered?"
    before = len(acks)
    await ws.send_json({'method': 'PING'})
    await asyncio.sleep(.1)
    return len(acks) > before


@pytest.mark.parametrize('name,code', [('drop', 1006), ('close', 1001)])
async def test_all_connections_end(name, code):
    async with raw() as r, r.stream(DEALS) as (_, _, one), r.stream(KLINE) as (_, _, other):
        told = (await fault(r, name))[1]['faults']
        await asyncio.sleep(.2)
        assert [ws.close_code for ws in (one, other)] == [code, code] and told == {'on': [], 'came': {name: 1}, 'bit': {name: 2}}
        assert r.e.hub.connections == [] and r.e.hub.listeners == {}
        async with r.stream(DEALS) as (frames, _, _):
            await r.step()
            assert frames


async def test_a_half_open_connection_is_silent_until_it_is_dropped():
    async with raw() as r, r.stream(DEALS) as (dead, acks, ws):
        await fault(r, 'half_open')
        async with r.stream(DEALS) as (frames, others, alive):
            await r.step()
            assert frames and not dead and not await pong(ws, acks) and await pong(alive, others) and not ws.closed
            await ws.ping()
            with pytest.raises(TimeoutError): await asyncio.wait_for(ws.close(), .3)  # not even a close frame is answered
            assert len(r.e.hub.connections) == 2 and r.e.status()['faults']['bit']['half_open'] == len(frames)
            await fault(r, 'drop')
            await asyncio.sleep(.3)
            assert r.e.hub.connections == []


async def test_a_dead_connection_is_given_up_when_the_client_has_gone():
    async with raw() as r, r.http.ws_connect(r.e.ws_url) as ws:
        await ws.send_json({'method': 'SUBSCRIPTION', 'params': [DEALS]})
        await ws.receive()
        await fault(r, 'half_open')
        ws._response.connection.transport.abort()
        await asyncio.sleep(.3)
        assert r.e.hub.connections == [] and r.e.hub.listeners == {}


async def test_a_dead_connection_does_not_grow_older_than_others_and_ends_without_a_word():
    async with raw(limits=Limits(connection_age=.5)) as r, r.stream(DEALS) as (_, _, ws):
        await fault(r, 'half_open')
        await asyncio.sleep(.3)
        assert len(r.e.hub.connections) == 1
        await asyncio.sleep(.5)
        assert r.e.hub.connections == [] and ws.close_code == 1006


@pytest.mark.parametrize('name,silent', [('mute', [True, True, True]), ('deaf', [True, False, False])])
async def test_what_is_not_sent_is_lost(name, silent):
    async with raw() as r, r.stream(DEALS, ETH_DEALS, KLINE) as (frames, acks, ws):
        await fault(r, name, seconds=.5, seed=4)
        assert (await r.step())[0] == 200 and await pong(ws, acks)
        heard = {f.channel for f in parsed(frames)}
        deaf = r.e.hub.faults.lasting[name].target or DEALS
        assert deaf in (DEALS, ETH_DEALS) and [ch not in heard for ch in (deaf, ({DEALS, ETH_DEALS} - {deaf}).pop(), KLINE)] == silent
        lost = r.e.status()['frames'] - len(frames)
        assert lost == r.e.status()['faults']['bit'][name] > 0
        await ended(r, name)
        await r.step()
        assert {f.channel for f in parsed(frames)} == {DEALS, ETH_DEALS, KLINE} and r.e.status()['frames'] - len(frames) == lost


@pytest.mark.parametrize('name', ['malformed', 'duplicate', 'late', 'reorder'])
async def test_frames_are_spoiled_and_nothing_else_is_lost(name):
    async with raw() as calm, calm.stream(DEALS, KLINE, DEPTH) as (clean, _, _): await calm.step(2)
    async with raw() as r, r.stream(DEALS, KLINE, DEPTH) as (frames, _, _):
        await fault(r, name, seconds=.6, seed=5)
        await r.step()
        during = len(frames)
        await ended(r, name)
        await r.step()
        await asyncio.sleep(2 if name == 'late' else 0)
        bit = r.e.status()['faults']['bit'][name]
        assert frames != clean
        if name == 'malformed':
            wrong = [k for k, f in enumerate(frames) if f != clean[k]]
            assert len(frames) == len(clean) and len(wrong) == bit > 3 and max(wrong) < during
        if name == 'duplicate': assert frames == [f for f in clean[:during // 2] for _ in range(2)] + clean[during // 2:] and 2 * bit == during > 0
        if name in ('late', 'reorder'): assert sorted(frames) == sorted(clean) and bit > 3


async def test_a_refused_subscription_and_a_refused_handshake():
    async with raw() as r:
        await fault(r, 'refuse', seconds=.3)
        async with r.stream(DEALS) as (_, acks, ws):
            assert json.loads(acks[0])['msg'] == f'Not Subscribed successfully! [{DEALS}].  Reason： Blocked! '
            await ended(r, 'refuse')
            await ws.send_json({'method': 'SUBSCRIPTION', 'params': [DEALS]})
            await asyncio.sleep(.1)
            assert json.loads(acks[-1])['msg'] == DEALS
        await fault(r, 'no_connect', seconds=.5, seed=1)
        met = []
        for _ in range(12):
            with pytest.raises(aiohttp.WSServerHandshakeError) as e: await r.http.ws_connect(r.e.ws_url)
            met.append((e.value.status, e.value.headers.get('Retry-After')))
        assert set(met) == {(503, None), (429, '1')}
        await ended(r, 'no_connect')
        async with r.stream(DEALS): pass


@pytest.mark.parametrize('name,status,retry,body', [
    ('http_429', 429, '1', '{'), ('http_418', 418, '2', 'Banned'), ('http_500', 500, None, '{"code": 500'), ('http_503', 503, None, 'S'), ('html_200', 200, None, '<!DOCTYPE html>'),
    ('truncated_200', 200, None, '[['), ('empty_200', 200, None, '[]')])
async def test_public_rest_answers_wrongly(name, status, retry, body):
    async with raw() as r:
        url = f'{r.e.url}/api/v3/klines?symbol=BTCUSDT&interval=1m&limit=10'
        async def ask():
            async with r.http.get(url) as answer: return answer.status, answer.headers.get('Retry-After'), await answer.text()
        good = await ask()
        await fault(r, name, seconds=.2)
        bad = await ask()
        assert bad[:2] == (status, retry) and bad[2].startswith(body) and bad[2] != good[2]
        assert (await r.ask('GET', '/api/v3/account'))[0] == 200 and r.e.status()['faults']['bit'][name] == 1  # what is signed is not public
        await ended(r, name)
        assert await ask() == good


@pytest.mark.parametrize('name,error', [('http_429', ccxt.RateLimitExceeded), ('http_418', ccxt.DDoSProtection), ('http_500', ccxt.ExchangeError), ('http_503', ccxt.ExchangeNotAvailable), ('contract_down', ccxt.ExchangeNotAvailable)])
async def test_the_real_client_meets_the_fault(name, error):
    async with raw() as r:
        x = ccxt.pro.mexc({**client_options(r.e.url), 'enableRateLimit': False})
        try:
            await x.load_time_difference()
            await fault(r, name, seconds=.3)
            with pytest.raises(error): await x.load_markets(reload=True)
            if name == 'contract_down': assert await x.fetch_time() == r.e.clock.now
            await ended(r, name)
            assert 'BTC/USDT' in await x.load_markets(reload=True)
        finally: await x.close()


async def test_the_clock_is_wrong_where_it_is_told_and_where_it_is_checked():
    async with raw() as r, r.stream(DEALS) as (frames, _, _):
        async def told(): return (await r.ask('GET', '/api/v3/time', signed=False))[1]['serverTime']
        await fault(r, 'skew', seconds=.6)
        assert await told() == NOW + 5000 and await r.code('GET', '/api/v3/account', stamp=-1) == (400, 700003) and await r.code('GET', '/api/v3/account', stamp=5000) == 200
        await r.step()
        assert max(f.sendTime for f in parsed(frames)) <= r.e.clock.now
        await ended(r, 'skew')
        assert await told() == r.e.clock.now and await r.code('GET', '/api/v3/account') == 200


async def test_every_fault_of_the_venue_can_be_started_and_nonsense_cannot():
    async with raw() as r:
        for name in VENUE_FAULTS: assert (await fault(r, name, **({'seconds': 30} if lasts(name) else {})))[0] == 200
        assert r.e.status()['faults']['came'] == dict.fromkeys(VENUE_FAULTS, 1) and set(r.e.status()['faults']['on']) == {n for n in VENUE_FAULTS if lasts(n)}
        for name, seconds in (('rain', 1), ('kill', 1), ('mute', 0), ('mute', -1), ('mute', 1e9)): assert (await fault(r, name, seconds=seconds))[0] == 409
        assert (await fault(r, 'mute', seconds='soon'))[0] == 400


# ---- a busy market, and the truth about it

async def test_every_trade_of_a_burst_arrives_and_can_be_asked_for():
    busy = {'BTC/USDT': {NOW + MINUTE: BURST}}
    async with raw(busy=busy) as r, r.stream(DEALS, KLINE, DEPTH, TICKER, MINI, ETH_DEALS) as (frames, _, _):
        began = time.monotonic()
        await r.step(4)
        assert time.monotonic() - began < 15
        async with asyncio.timeout(10):
            while len(frames) < r.e.status()['frames']: await asyncio.sleep(.05)  # noqa: ASYNC110
        truth = {}
        for s in ('BTCUSDT', 'ETHUSDT'):
            async with r.http.get(f'{r.e.url}/emulator/minutes', params={'symbol': s, 'start': NOW, 'end': NOW + DAY}) as answer: truth[s] = await answer.json()
        x = ccxt.pro.mexc({**client_options(r.e.url), 'enableRateLimit': False})
        x.session = r.http
        try:
            await x.load_time_difference()
            await x.load_markets()
            paged, since = [], NOW + MINUTE
            while page := await x.fetch_trades('BTC/USDT', since, 1000, {'until': NOW + 3 * MINUTE - 1}): paged, since = paged + page, page[-1]['timestamp'] + 1
        finally: await x.close()
    assert [t[0] for t in truth['BTCUSDT']] == [NOW + k * MINUTE for k in (1, 2, 3)] and truth['BTCUSDT'][0][1] == BURST > truth['BTCUSDT'][1][1]
    heard = {'BTCUSDT': {}, 'ETHUSDT': {}}
    for f in parsed(frames):
        for d in f.publicAggreDeals.deals: heard[f.symbol].setdefault(d.time - d.time % MINUTE, []).append((d.time, float(d.price), float(d.quantity), d.tradeType == 1))
    asked = {}
    for t in paged: asked.setdefault(t['timestamp'] - t['timestamp'] % MINUTE, []).append((t['timestamp'], t['price'], t['amount'], t['side'] == 'buy'))
    for s, rows in truth.items():
        for opened, n, total, *ohlcv in rows:
            c = HISTORIES[s.replace('USDT', '/USDT')]
            bar = c.bar(c.index_at(opened))
            assert ohlcv == [bar.open, bar.high, bar.low, bar.close, bar.volume]
            for found in (heard[s][opened], asked[opened] if s == 'BTCUSDT' and opened in asked else heard[s][opened]):
                assert (len(found), sum(checksum(*t) for t in found) % SUMS) == (n, total)
    assert set(asked) == {NOW + MINUTE, NOW + 2 * MINUTE}


async def test_the_truth_is_what_happened_whatever_was_sent():
    halted = steps(*[60_000] * 6)['BTC/USDT'].take(np.array([True, True, False, True, True, True]))
    async with raw(histories={'BTC/USDT': halted}, now=START + 30_000) as r:
        async def minutes(**kw): return (await r.ask('GET', '/emulator/minutes', signed=False, **{'symbol': 'BTCUSDT', **kw}))[1]
        await fault(r, 'mute', seconds=30)
        assert await minutes() == []
        await r.step(4)
        rows = await minutes()
        assert [row[0] for row in rows] == [START + k * MINUTE for k in (1, 3)]  # the first was over half when we came, the halt was not offered, the last is not over
        ticks = trades_at(r.e.tape, 'BTC/USDT', r.e.clock.now, START + MINUTE, START + 2 * MINUTE - 1, 1000)
        assert rows[0][1:] == [len(ticks), sum(checksum(t.time, t.price, t.amount, t.is_buy) for t in ticks) % SUMS, 60_000, 60_000, 60_000, 60_000, 100]
        assert await minutes(start=START + 2 * MINUTE) == rows[1:] and await minutes(end=START + 2 * MINUTE) == rows[:1]
        assert (await r.ask('GET', '/emulator/minutes', signed=False, symbol='X'))[0] == 400


async def test_a_process_of_its_own_with_limits_of_its_own():
    args = ['--days', '2', '--bursts', '1', '--speed', 'step', '--connection-age', '5', '--subscriptions', '3', '--weight', '4', '--now', str(SIMULATED_START + DAY), '--end', str(SIMULATED_START + DAY + 3 * MINUTE)]
    async with emulator_process(args) as url, aiohttp.ClientSession() as http:
        async with http.post(f'{url}/emulator/step', params={'minutes': 3}) as r: told = await r.json()
        assert {k: told['limits'][k] for k in ('connection_age', 'subscriptions', 'weight', 'idle')} == {'connection_age': 5., 'subscriptions': 3, 'weight': 4, 'idle': 30.}
        trades = []
        for s in ('BTCUSDT', 'ETHUSDT'):
            async with http.get(f'{url}/emulator/minutes', params={'symbol': s}) as r: trades += [row[1] for row in await r.json()]
        assert len(trades) == 4
