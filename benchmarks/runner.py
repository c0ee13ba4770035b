"""From the last bar of a decision to its orders on the wire: a runner of many symbols against the emulator, both as processes of their own. Example: python -m benchmarks.runner --symbols 10 --speed 1 --minutes 31"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

from realdeal.cli import DEMO
from realdeal.drill import DrillPlan, drill_settings
from realdeal.emulator import emulator_process
from realdeal.job import fetch_all
from realdeal.plan import Job
from realdeal.provenance import places
from realdeal.settings import Settings, read_settings
from realdeal.soak import calm_env
from realdeal.training import train
from realdeal.types import HOUR, MINUTE

EARLY = 3.0      # minutes of the wall from the start to the first decision: a runner that begins has three weeks of candles to bring, and should have heard a whole minute
COINS = "BTC ETH SOL XRP ADA DOGE LTC DOT LINK AVAX".split()


def small_models(s: Settings, folder: Path) -> Path:
    """A LightGBM and a TFT that know the symbols of `s`, as large as those that are committed, trained for a moment; where they lie."""
    model = {**DEMO, "trials": 2, "rounds": 50, "networks": s.model.networks, "hidden_size": s.model.hidden_size, "max_epochs": 1, "epoch_windows": 2000, "seeds": 1, "test_days": 5, "reserve_days": 6}
    job = Job(s.override(model=model, paths={"data": folder / "train"}), "simulated", 49, 0, say=lambda text: print(text, file=sys.stderr))
    asyncio.run(fetch_all(job))
    train(job)
    return job.places.challenger


def peak_of(pid: int) -> float:
    """MiB that the process held at most; 0 when it is gone."""
    with contextlib.suppress(OSError, StopIteration): return next(int(x.split()[1]) / 1024 for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 0.0


async def measure(s: Settings, folder: Path, models: Path, symbols: int, speed: float, minutes: int, hour: int) -> dict[str, object]:
    plan = DrillPlan(hour + minutes / 60 + 1, speed, "none", 7, s.data.symbols, execution="taker")
    file = drill_settings(s.override(strategy={"max_weight": 1 / symbols}), plan, folder)
    shutil.copytree(models, places(read_settings(file, env={}), "simulated").models)
    early = math.ceil(EARLY * speed)
    async with emulator_process(plan.emulator_args(plan.begin + hour * HOUR - early * MINUTE)) as url:
        p = await asyncio.create_subprocess_exec(sys.executable, "-m", "realdeal", "live", "--drill", "--emulator", url, "--settings", str(file), "--minutes", str(early + minutes), "--json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=calm_env())
        peak, began, reader = 0.0, time.monotonic(), asyncio.create_task(p.communicate())
        while not reader.done():
            peak = max(peak, peak_of(p.pid))
            await asyncio.wait({reader}, timeout=1.0)
        out, err = reader.result()
    if p.returncode: raise SystemExit(err.decode()[-2000:])
    told = json.loads(out)
    return {"symbols": symbols, "speed": speed, "minutes": minutes, "decisions": told["decisions"], "missed": told["missed"], "orders": told["orders"], "failed": told["failed_orders"], "latency_ms": told["latency_ms"], "peak_mib": round(peak), "wall_s": round(time.monotonic() - began)}


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--symbols", type=int, default=10, choices=range(1, 11))
    a.add_argument("--speed", type=float, default=1)
    a.add_argument("--minutes", type=int, default=31)
    a.add_argument("--hour", type=int, default=1, help="of the first decision; at 0, 8 and 16 it waits for the venue to tell the funding rate that is settled then")
    x = a.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        s = read_settings(env={}).override(data={"symbols": tuple(f"{c}/USDT" for c in COINS[:x.symbols])})
        models = small_models(s, Path(folder))
        print(json.dumps(asyncio.run(measure(s, Path(folder) / "live", models, x.symbols, x.speed, x.minutes, x.hour)), indent=1))


if __name__ == "__main__": main()
