"""`python -m benchmarks.recovery [--rounds N]`: seconds from the venue's return until every stream is up again and every minute that ended before is known."""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from realdeal.emulator import Emulator, serve
from realdeal.ingest import Follower, open_market
from realdeal.market import generate
from realdeal.settings import Settings
from realdeal.store import Store
from realdeal.types import DAY, MINUTE

START, SYMBOLS, SPEED = 1_704_067_200_000, ("BTC/USDT", "ETH/USDT"), 60.0
# What is down together, each for so many seconds; single acts first.
OUTAGES = {"connections cut": (("drop",), 0.0), "no connection, REST 503": (("drop", "no_connect", "http_503"), 8.0), "REST 429 and Retry-After": (("http_429",), 8.0),
    "half-open connections": (("half_open",), 4.0), "pongs without data": (("mute",), 8.0), "garbage from REST, frames malformed": (("html_200", "malformed"), 8.0)}


async def one(e: Emulator, f: Follower, names: tuple[str, ...], seconds: float) -> tuple[float, float]:
    """Cause the outage; seconds until the streams are up, and until every minute that ended before the return is known."""
    for n in names: e.fault(n, 0.0 if n in ("drop", "half_open") else seconds, seed=7)
    await asyncio.sleep(seconds)
    returned, before = time.monotonic(), e.clock.now // MINUTE * MINUTE
    up = 0.0
    while time.monotonic() - returned < 60:
        await asyncio.sleep(0.02)
        # An end of the market that nobody has heard of yet is not known to be lost: it must have been closed first.
        if not up and all(x.now and not x.now.gone.is_set() and time.monotonic() - x.now.heard < 1 for x in f.streams.links): up = time.monotonic() - returned
        if up and all((s.final or 0) + MINUTE >= before for s in f.feed.symbols.values()): return up, time.monotonic() - returned
    return up, 60.0


async def measure(rounds: int, say: Console) -> None:
    s = Settings().override(data={"close_grace_ms": int(500 * SPEED), "time_sync": 5, "stream_silence": 3})
    table = Table("outage", "streams up, s (median, worst)", "minutes known, s (median, worst)")
    with tempfile.TemporaryDirectory() as folder:
        async with serve(histories=generate("null", SYMBOLS, START, 3 * 1440, seed=7), now=START + DAY, seed=7, speed=SPEED, name="recovery") as e, open_market(s, e.url) as market:
            f, stop = Follower(market.venue, Store(Path(folder), market.key), s, say=lambda _: None), asyncio.Event()
            f.begin()
            await f.streams.open()
            running = asyncio.create_task(f.run(stop))
            for what, (names, seconds) in OUTAGES.items():
                found = []
                for k in range(rounds):
                    await asyncio.sleep(4)
                    found.append(await one(e, f, names, seconds))
                    say.print(f"{what}, round {k + 1}: up after {found[-1][0]:.2f} s, known after {found[-1][1]:.2f} s")
                table.add_row(what, *(f"{statistics.median(x):.2f}, {max(x):.2f}" for x in zip(*found, strict=True)))
            await e.clock.pause()
            stop.set()
            with contextlib.suppress(asyncio.CancelledError): await running
            told = f.ledger()
    say.print(table)
    say.print(f"dropped {told['dropped']} of {told['minutes']} minutes")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, epilog="Example: python -m benchmarks.recovery --rounds 5")
    options.add_argument("--rounds", type=int, default=5)
    asyncio.run(measure(options.parse_args().rounds, Console()))
