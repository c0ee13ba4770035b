"""From the kill switch to the last order that left, while orders are sent as fast as they go. Example: python -m benchmarks.kill --rounds 100"""
from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from realdeal.broker import CcxtBroker
from realdeal.desk import KILL, Desk, Switch, remember, resume, throw
from realdeal.emulator import serve
from realdeal.exchange import Clock, Exchange
from realdeal.market import SIMULATED_START, generate
from realdeal.risk import Standing
from realdeal.settings import Settings
from realdeal.store import Journal
from realdeal.types import DAY, Intent
from realdeal.wire import client_options

SENDERS = 4


async def measure(rounds: int) -> dict[str, object]:
    s = Settings().override(data={"symbols": ("BTC/USDT",), "rate_limit_ms": 1}, live={"stage": "testnet"}, risk={"max_orders": 1_000_000})
    histories = generate("realistic", ("BTC/USDT",), SIMULATED_START, 3 * 1440, seed=7)
    took, sent = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder, journal = Path(name), Journal(Path(name) / "journal.sqlite")
        async with serve(histories=histories, now=SIMULATED_START + 2 * DAY, balances={"USDT": 1e9, "BTC": 1e3}) as e, Exchange(s, options=client_options(e.url), clock=Clock(rate=0)) as venue:
            e.throttle.limits = type(e.limits)(weight=1_000_000)
            memory, at = remember(journal, 1e6), Standing(mark=float(e.venue.books["BTC/USDT"].last), age=0.0, equity=1e6)
            desk = Desk(journal, CcxtBroker(venue, lambda: ()), memory, Switch(folder / KILL, journal, venue.clock.now), s, now=venue.clock.now, standing=lambda symbol: at, rules={"BTC/USDT": venue.rules("BTC/USDT")}, say=lambda text: None)
            venue.client.gate = desk.gate
            going = True

            async def send(k: int) -> None:
                n = 0
                while going:
                    n += 1
                    i = Intent(f"rd-{k}-{n}", "BTC/USDT", "sell" if n % 2 else "buy", 0.001, venue.clock.now())
                    journal.add_intent(i)
                    await desk.send(i)
                    await asyncio.sleep(0.001 if desk.switch.why() else 0)

            senders = [asyncio.create_task(send(k)) for k in range(SENDERS)]
            rng = np.random.default_rng(7)
            for _ in range(rounds):
                await asyncio.sleep(float(rng.uniform(0.05, 0.15)))
                before = len(e.arrivals("emulator-main").sent)
                thrown = time.time()
                throw(folder / KILL, "a benchmark")
                await asyncio.sleep(0.3)
                there = e.arrivals("emulator-main").sent
                took.append(max(0.0, (there[-1] - thrown) * 1000) if there else 0.0)
                sent = len(there)
                assert before, "orders were being sent"
                resume(folder / KILL, [journal.path], "a benchmark")
            going = False
            await asyncio.gather(*senders)
        journal.close()
    return {"kills": rounds, "orders": sent, "ms": {f"p{q}": round(float(np.percentile(took, q)), 2) for q in (50, 99)}, "max_ms": round(max(took), 2)}


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--rounds", type=int, default=100)
    print(json.dumps(asyncio.run(measure(a.parse_args().rounds)), indent=1))


if __name__ == "__main__": main()
