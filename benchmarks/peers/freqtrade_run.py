"""Time freqtrade on ready signals: freqtrade_run.py DATA.parquet --rounds N [--hyperopt]

A minimal strategy copies the ready words into enter_long and exit_long; no stop, no return target, market orders, two slots of an unlimited
stake, i.e. half of the (closed) balance each. No network: the exchange is made with `validate=False` and its markets are written by hand.
Timed: `Backtesting.backtest(processed, start, end)`: its conversion of the frames to lists, the event loop and the frame of trades.
Not timed: imports, reading of the file, candle loading, indicators and entry/exit signals, statistics, reports and the export, which a
`freqtrade backtesting` run has too. With --hyperopt the run mode is hyperopt's, which records neither wallet nor progress.
What the preparation left in memory is frozen out of garbage collection before each round.
"""
import argparse
import gc
import json
import logging
import tempfile
import time
from pathlib import Path

import freqtrade
import pandas as pd
from freqtrade.enums import CandleType, RunMode
from freqtrade.optimize.backtesting import Backtesting
from freqtrade.resolvers import ExchangeResolver

FEE, CASH = 0.0005, 10_000.0
STRATEGY = '''
from freqtrade.strategy import IStrategy

class Ready(IStrategy):
    INTERFACE_VERSION = 3
    timeframe = "1m"
    minimal_roi = {}
    stoploss = -0.99
    startup_candle_count = 0
    order_types = {"entry": "market", "exit": "market", "stoploss": "market", "stoploss_on_exchange": False}

    def populate_indicators(self, dataframe, metadata): return dataframe

    def populate_entry_trend(self, dataframe, metadata):
        dataframe["enter_long"] = (dataframe["signal"] == 1).astype(int)
        return dataframe

    def populate_exit_trend(self, dataframe, metadata):
        dataframe["exit_long"] = (dataframe["signal"] == 0).astype(int)
        return dataframe
'''


def config(folder: Path, pairs: list[str], mode: RunMode) -> dict:
    "The least that `Backtesting` asks for."
    (folder / "ready.py").write_text(STRATEGY)
    pricing = {"price_side": "other", "use_order_book": False}
    return {"runmode": mode, "strategy": "Ready", "strategy_path": str(folder), "user_data_dir": folder, "datadir": folder, "timeframe": "1m", "fee": FEE,
            "max_open_trades": 2, "stake_currency": "USDT", "stake_amount": "unlimited", "dry_run": True, "dry_run_wallet": CASH, "tradable_balance_ratio": 1.0,
            "amend_last_stake_amount": False, "last_stake_amount_min_ratio": 0.5, "trading_mode": "spot", "margin_mode": "", "candle_type_def": CandleType.SPOT,
            "exchange": {"name": "binance", "pair_whitelist": pairs, "pair_blacklist": []}, "pairlists": [{"method": "StaticPairList"}], "entry_pricing": pricing,
            "exit_pricing": pricing, "dataformat_ohlcv": "feather", "dataformat_trades": "feather", "export": "none", "internals": {}}


def market(pair: str) -> dict:
    "A spot market as ccxt would list it, in 0.01 ticks and millionths of a coin."
    base, quote = pair.split("/")
    limit = {"min": None, "max": None}
    return {"id": base + quote, "symbol": pair, "base": base, "quote": quote, "active": True, "spot": True, "margin": False, "swap": False, "future": False, "type": "spot",
            "precision": {"price": 0.01, "amount": 1e-6}, "limits": {"amount": limit, "price": limit, "cost": limit, "leverage": limit}, "info": {},
            "contractSize": None, "taker": FEE, "maker": FEE}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("data")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--hyperopt", action="store_true")
    a = p.parse_args()
    logging.disable(logging.WARNING)
    frames = {}
    for pair, df in pd.read_parquet(a.data).groupby("symbol"):
        df = df.drop(columns="symbol").rename(columns={"time": "date"}).reset_index(drop=True)
        frames[pair] = df.assign(date=pd.to_datetime(df.date, unit="ms", utc=True))
    with tempfile.TemporaryDirectory() as folder:
        conf = config(Path(folder), list(frames), RunMode.HYPEROPT if a.hyperopt else RunMode.BACKTEST)
        exchange = ExchangeResolver.load_exchange(conf, validate=False)
        exchange._markets = {pair: market(pair) for pair in frames}
        exchange._api.set_markets(exchange._markets)
        tests = Backtesting(conf, exchange)
    strategy = tests.strategylist[0]
    tests._set_strategy(strategy)
    seconds = []
    for _ in range(a.rounds):
        ready = strategy.advise_all_indicators({pair: df.copy() for pair, df in frames.items()})
        start, end = (f(df.date.iloc[i] for df in ready.values()).to_pydatetime() for f, i in ((min, 0), (max, -1)))
        gc.collect(), gc.freeze()
        begin = time.perf_counter()
        result = tests.backtest(processed=ready, start_date=start, end_date=end)
        seconds.append(round(time.perf_counter() - begin, 4))
    print(json.dumps({"engine": "freqtrade (hyperopt mode)" if a.hyperopt else "freqtrade", "version": freqtrade.__version__, "seconds": seconds,
                      "trades": len(result["results"]), "final_equity": round(result["final_balance"], 2)}))


if __name__ == "__main__":
    main()
