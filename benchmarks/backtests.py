"""`python -m benchmarks.backtests [--peers FOLDER] [--rounds N] [--years Y] [--json]`: backtests side by side, on the same ready signals.

First the engines: 90 days of minutes, one symbol and two, long for half of the equity about three times a day, a decision every 15 minutes (`benchmarks/peers`; each in its own environment below FOLDER, made by
`benchmarks/peers/make_venvs.sh FOLDER`; those that are not there are left out). Then ours alone: a decision every minute, the accounts beside vectorbt's, a grid of 500 costs beside one run, and how time and memory grow
with the years. Nothing here passes or fails."""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).parent / "peers"
ENGINES = {"freqtrade": "freqtrade_run.py", "nautilus": "nautilus_run.py", "backtesting": "backtestingpy_run.py"}

OURS = """
import gc, json, resource, sys, time
import numpy as np
from benchmarks.__main__ import signals
from realdeal.backtest import accounts, fold, tape, vectorbt_accounts
from realdeal.features import Panel
from realdeal.market import generate
from realdeal.sensitivity import grid, passes, sweep, targets_of
from realdeal.settings import Settings
from realdeal.types import DAY, MINUTE, Account, MarketRules
import polars as pl

start, days, s = 1_546_300_800_000, int(sys.argv[1]), Settings()
end = start + days * DAY
candles = {k: pl.DataFrame({n: getattr(c, n) for n in ("time", "open", "high", "low", "close", "volume")}).with_columns(origin=pl.lit("venue")) for k, c in generate("realistic", ["BTC/USDT", "ETH/USDT"], start, days * 1440, 7).items()}
rules = {k: MarketRules(k, lot=1e-5, tick=0.01, min_notional=5.0) for k in candles}
t = tape(candles, start, end, s.costs)
at = np.arange(15, len(t.times), 15)
times, close = np.tile(t.times[at], 2), t.close[at - 1].T.ravel()
p = Panel(symbols=t.symbols, times=times, group=np.repeat([0, 1], len(at)), X=np.empty((len(times), 0)), close=close, high=close, low=close, sigma=np.full(len(times), 0.004), real=np.ones(len(times), bool), names=())
said = signals(p)

def took(f):
    gc.collect(), gc.freeze()
    began = time.perf_counter()
    made = f()
    return time.perf_counter() - began, made

run, steps = took(lambda: fold(p, said, t, rules, s, Account(10_000.0)))
fills = [f for x in steps for f in x.fills]
mine, _ = took(lambda: accounts(fills, t, 10_000.0))
told = {"days": days, "decisions": len(steps), "fills": len(fills), "fold": run, "accounts": mine, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
if days <= 90:
    vectorbt_accounts(fills, t, 10_000.0, 7)
    told["vectorbt"], _ = took(lambda: vectorbt_accounts(fills, t, 10_000.0, 7))
    x = targets_of(steps, t)
    told["compile"], _ = took(lambda: next(passes(x, t, rules, s)))
    told["one_pass"], _ = took(lambda: next(passes(x, t, rules, s)))
    told["grid"], cells = took(lambda: sweep(x, t, rules, s, grid(s)))
    told["cells"] = len(cells)
print(json.dumps(told))
"""


def ask(python: str, *args: str) -> dict[str, Any]:
    """What a script prints last, as JSON."""
    env = {**os.environ, "PYTHONPATH": os.getcwd()} if python == sys.executable else dict(os.environ)
    r = subprocess.run([python, *args], capture_output=True, text=True, env=env)
    if r.returncode: raise SystemExit(f"{args[0][:60]}: {r.stderr.strip().splitlines()[-1] if r.stderr.strip() else r.returncode}")
    told: dict[str, Any] = json.loads(r.stdout.strip().splitlines()[-1])
    return told


def engines(folder: Path, peers: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Every engine on one symbol and on two."""
    found = []
    for symbols in (1, 2):
        data = folder / f"{symbols}.parquet"
        subprocess.run([sys.executable, str(PEERS / "make_data.py"), str(data), "--symbols", str(symbols)], check=True)
        here = {"realdeal": (sys.executable, "realdeal_run.py"), "vectorbt": (sys.executable, "vectorbt_run.py"), "plain loop": (sys.executable, "reference_run.py"),
            **{n: (str(peers / f"venv-{n}/bin/python"), f) for n, f in ENGINES.items() if peers and (peers / f"venv-{n}").is_dir()}}
        for python, script in here.values(): found.append({**ask(python, str(PEERS / script), str(data), "--rounds", str(rounds)), "symbols": symbols})
    return found


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Example: python -m benchmarks.backtests --peers /tmp/peers")
    a.add_argument("--peers", type=Path, help="folder with the peers' environments")
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--years", type=int, default=7, help="the longest history of ours")
    a.add_argument("--json", action="store_true")
    arg = a.parse_args()
    with tempfile.TemporaryDirectory() as d:
        table = engines(Path(d), arg.peers, arg.rounds)
        minute = Path(d) / "minute.parquet"
        subprocess.run([sys.executable, str(PEERS / "make_data.py"), str(minute), "--symbols", "1", "--every-minute"], check=True)
        every = ask(sys.executable, str(PEERS / "realdeal_run.py"), str(minute), "--rounds", str(arg.rounds), "--every-minute")
    grown = [ask(sys.executable, "-c", OURS, str(n)) for n in dict.fromkeys((90, 365, 365 * max(1, arg.years // 2), 365 * arg.years))]
    if arg.json: return print(json.dumps({"engines": table, "every_minute": every, "grown": grown}, indent=1))
    shown = Table(title=f"90 days, a decision every 15 minutes, median of {arg.rounds}")
    for h in ("engine", "version", "symbols", "seconds", "times ours", "trades", "equity"): shown.add_column(h)
    own = {r["symbols"]: statistics.median(r["seconds"]) for r in table if r["engine"] == "realdeal"}
    for r in table: shown.add_row(r["engine"], r["version"], str(r["symbols"]), f'{(m := statistics.median(r["seconds"])):.3f}', f'{m / own[r["symbols"]]:.1f}', str(r["trades"]), f'{r["final_equity"]:,.2f}')
    first, more = grown[0], Table(title="ours, two symbols, a decision every 15 minutes")
    for h in ("days", "decisions", "fills", "fold s", "us a decision", "accounts s", "peak GB"): more.add_column(h)
    for g in grown: more.add_row(str(g["days"]), f'{g["decisions"]:,}', f'{g["fills"]:,}', f'{g["fold"]:.2f}', f'{g["fold"] / g["decisions"] * 1e6:.1f}', f'{g["accounts"]:.3f}', f'{g["peak_gb"]:.2f}')
    console = Console()
    console.print(shown)
    console.print(more)
    console.print(f'a decision every minute: {every["us_a_step"]:.1f} us each, fills and accounts included; accounts alone {first["accounts"] * 1000:.1f} ms, vectorbt\'s of the same fills {first["vectorbt"] * 1000:.1f} ms; '
        f'{first["cells"]} cells {first["grid"]:.2f} s, which is {first["grid"] / first["fold"]:.1f} runs (compiling them once: {first["compile"]:.1f} s)')


if __name__ == "__main__": main()
