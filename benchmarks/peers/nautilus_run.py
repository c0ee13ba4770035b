"""Time NautilusTrader on ready signals: nautilus_run.py DATA.parquet --rounds N

`BacktestEngine` with 1-minute external bars on a cash account. One strategy a symbol reads its next word at each bar's close and sends a market
order on a changed word, for half of the equity or, if less, for what the free cash pays. An order sent at a bar's close fills at that close;
make_data.py opens each candle there, so it is the next bar's open too.
Timed: `engine.run()`. Not timed: imports, reading of the file, making of instruments and `Bar` objects, `add_data`, the engine's making.
Each round has a fresh engine over the same bars. For speed: logging and the risk engine's checks are bypassed, the portfolio is not marked at
each bar, no analysis is made at the end, and the account is a hedging one, since 1.231 goes over all earlier positions of a netting one at
each fill (8.6 s, not 6.3 s, for 543 trades).
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import time
from decimal import Decimal

import nautilus_trader
import pandas as pd
from nautilus_trader.backtest.config import BacktestEngineConfig
from nautilus_trader.backtest.engine import BacktestEngine
from nautilus_trader.config import LoggingConfig, RiskEngineConfig
from nautilus_trader.model.currencies import BTC, ETH, USDT
from nautilus_trader.model.data import Bar, BarType
from nautilus_trader.model.enums import AccountType, OmsType, OrderSide
from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
from nautilus_trader.model.instruments import CurrencyPair
from nautilus_trader.model.objects import Money, Price, Quantity
from nautilus_trader.portfolio.config import PortfolioConfig
from nautilus_trader.trading.config import StrategyConfig
from nautilus_trader.trading.strategy import Strategy

FEE, CASH, VENUE = 0.0005, 10_000, Venue("SIM")


class Ready(Strategy):
    "Follows the ready `words` of one symbol; `bar_types` has those of all symbols, to mark the account's equity."

    def __init__(self, instrument: CurrencyPair, bar_types: dict[InstrumentId, BarType], words: list[int]) -> None:
        super().__init__(StrategyConfig(strategy_id=f"READY-{instrument.base_currency}"))
        self.instrument, self.bar_types, self.words = instrument, bar_types, iter(words)
        self.held: Quantity | None = None

    def on_start(self) -> None:
        self.subscribe_bars(self.bar_types[self.instrument.id])

    def on_bar(self, bar: Bar) -> None:
        word = next(self.words)
        if word < 0 or (word == 1) == (self.held is not None): return
        iid = self.instrument.id
        if word == 1:
            price = bar.close.as_double()
            account = self.portfolio.account(VENUE)
            equity = account.balance_total(USDT).as_double()
            for position in self.cache.positions_open():
                equity += position.quantity.as_double() * self.cache.bar(self.bar_types[position.instrument_id]).close.as_double()
            value = min(equity / 2, account.balance_free(USDT).as_double() / (1 + FEE))
            qty = self.held = self.instrument.make_qty(value / price, round_down=True)
        else: qty, self.held = self.held, None
        side, position = (OrderSide.BUY, None) if word == 1 else (OrderSide.SELL, self.cache.positions_open(instrument_id=iid)[0].id)
        self.submit_order(self.order_factory.market(iid, side, qty), position)


def pair(symbol: str) -> CurrencyPair:
    "A spot pair in 0.01 ticks and millionths of a coin."
    return CurrencyPair(InstrumentId(Symbol(symbol), VENUE), Symbol(symbol), {"BTC": BTC, "ETH": ETH}[symbol.split("/")[0]], USDT, 2, 6, Price.from_str("0.01"),
                        Quantity.from_str("0.000001"), 0, 0, maker_fee=Decimal("0.0005"), taker_fee=Decimal("0.0005"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    books = []
    for symbol, df in pd.read_parquet(a.data).groupby("symbol"):
        instrument = pair(symbol)
        bar_type = BarType.from_str(f"{instrument.id}-1-MINUTE-LAST-EXTERNAL")
        stamps = ((df.time + 60_000) * 1_000_000).tolist()  # Nautilus stamps a bar with its close, in ns
        bars = [Bar(bar_type, *(Price(x, 2) for x in ohlc), Quantity(v, 6), ts, ts)
                for *ohlc, v, ts in zip(*(df[c].tolist() for c in ("open", "high", "low", "close", "volume")), stamps, strict=True)]
        books.append((instrument, bar_type, bars, df.signal.tolist()))
    bar_types, seconds = {i.id: t for i, t, _, _ in books}, []
    for _ in range(a.rounds):
        engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True), risk_engine=RiskEngineConfig(bypass=True), run_analysis=False,
                                                     portfolio=PortfolioConfig(bar_updates=False)))
        engine.add_venue(VENUE, OmsType.HEDGING, AccountType.CASH, starting_balances=[Money(CASH, USDT)])
        for instrument, _, bars, words in books:
            engine.add_instrument(instrument)
            engine.add_data(bars)
            engine.add_strategy(Ready(instrument, bar_types, words))
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        engine.run()
        seconds.append(round(time.perf_counter() - begin, 4))
        trades = sum(o.is_closed and o.side == OrderSide.SELL and o.filled_qty > 0 for o in engine.cache.orders())
        equity = engine.portfolio.account(VENUE).balance_total(USDT).as_double()
        left = len(engine.cache.positions_open())
        engine.dispose()
    assert not left, f"{left} positions are open at the end"
    print(json.dumps({"engine": "NautilusTrader", "version": nautilus_trader.__version__, "seconds": seconds, "trades": trades, "final_equity": round(equity, 2)}))


if __name__ == "__main__":
    main()
