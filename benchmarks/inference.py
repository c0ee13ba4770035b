"""`python -m benchmarks.inference [--models FOLDER] [--rounds N] [--json]`: one prediction, from features to probability, on one thread while the other cores are busy.

Four ways of the same TFT on the same windows, in turn: ours (ONNX Runtime, from the panel's raw features), the bare ONNX session, torch's forward, and pytorch-forecasting's own
`predict` on its data set; then the whole ensemble, many threads at once, a cold start, and what a backtest pays for a row. Nothing here passes or fails."""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss
from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import END, frames, rates
from realdeal.ensemble import SequenceMember, load_predictor, read_verified
from realdeal.features import STEP, panel
from realdeal.settings import read_settings
from realdeal.tft import load_pt, quiet
from realdeal.types import DAY

COLD = """
import sys, time
began = time.perf_counter()
from pathlib import Path
from realdeal.ensemble import load_predictor
from realdeal.settings import read_settings
imported = time.perf_counter()
load_predictor(Path(sys.argv[1]), read_settings(sys.argv[2], env={}))
print(imported - began, time.perf_counter() - imported)
"""


def spin(stop: Any) -> None:
    """A core that is busy with something else."""
    x = np.random.default_rng(0).normal(size=(300, 300))
    while not stop.is_set(): x = np.tanh(x @ x / 300)


def library(model: Any, p: Any) -> Callable[[int], object]:
    """The same network as pytorch-forecasting's users run it: its data set and its `predict`, for the window that ends in a row."""
    f, h = model.form, model.hparams
    frame = pd.DataFrame(f.scaler(p.X[:, [p.names.index(n) for n in f.names]]), columns=[f"x{i}" for i in range(len(f.names))])
    frame["time"], frame["symbol"], frame["y"] = (p.times // STEP).astype(int), p.group.astype(str), 0.0
    reals, known = [f"x{i}" for i in range(len(f.names))], [f"x{i}" for i in f.known_at]
    with quiet():
        data = TimeSeriesDataSet(frame[:400], time_idx="time", target="y", group_ids=["symbol"], max_encoder_length=f.steps, min_encoder_length=f.steps, max_prediction_length=f.ahead,
            time_varying_known_reals=known, time_varying_unknown_reals=[r for r in reals if r not in known], target_normalizer=None, scalers={r: None for r in reals})
        net = TemporalFusionTransformer.from_dataset(data, hidden_size=h.hidden_size, attention_head_size=h.attention_heads, hidden_continuous_size=max(h.hidden_size // 2, 4), output_size=4,
            loss=QuantileLoss([0.1, 0.3, 0.5, 0.9])).eval()

    def run(row: int) -> object:
        with quiet(): return net.predict(frame[row - f.steps - f.ahead + 1:row + 1], mode="raw", trainer_kwargs={"logger": False, "accelerator": "cpu", "enable_progress_bar": False})
    return run


def timed(work: Callable[[int], object], rows: np.ndarray) -> list[float]:
    took = []
    for r in rows:
        began = time.perf_counter()
        work(int(r))
        took.append((time.perf_counter() - began) * 1000)
    return took


def main() -> None:
    args = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__, epilog="Example: python -m benchmarks.inference --models data/models --rounds 300")
    args.add_argument("--models", type=Path, default=Path("data/models"), help="the folder of the champion")
    args.add_argument("--rounds", type=int, default=300, help="predictions of each row; the library's own predict does a twentieth")
    args.add_argument("--json", action="store_true", help="print the rows as JSON")
    given = args.parse_args()
    torch.set_num_threads(1)
    s = read_settings(env={})
    predictor, model = load_predictor(given.models, s), load_pt(read_verified(given.models, "best_tft.pt")[0])
    candles = frames()
    p = panel(candles, {k: rates(k) for k in candles}, END, start=END - 20 * DAY)
    member = next(m for m in predictor.members if isinstance(m, SequenceMember))
    Z, f = model.form.scaler(p.X[:, [p.names.index(n) for n in model.form.names]]), model.form
    window = {r: {"encoder": Z[None, r - f.steps + 1:r + 1], "decoder": f.decoder(p.times[r:r + 1])} for r in range(len(p) - given.rounds, len(p))}
    tensors = {r: [torch.from_numpy(np.ascontiguousarray(v)) for v in w.values()] for r, w in window.items()}
    rows, stability, own = np.array(list(window)), predictor.stability(p), library(model, p)

    def forward(r: int) -> object:
        with torch.no_grad(): return [n(*tensors[r]) for n in model.nets]

    ways: dict[str, tuple[Callable[[int], object], np.ndarray]] = {
        "ours: TFT from raw features": (lambda r: member.say(p, np.array([r]), {}), rows), "bare ONNX session": (lambda r: member._session.run(None, window[r]), rows),
        f"torch forward, {len(model.nets)} networks": (forward, rows), "pytorch-forecasting predict, one network": (own, rows[::20]),
        "the whole ensemble, drift and prices included": (lambda r: predictor.predict(p, np.array([r]), stability=stability), rows)}
    stop = multiprocessing.Event()
    others = [multiprocessing.Process(target=spin, args=(stop,), daemon=True) for _ in range(max(1, (os.cpu_count() or 1) - 1))]
    for o in others: o.start()
    told: list[dict[str, Any]] = []
    try:
        for name, (work, some) in ways.items():
            timed(work, some[:5])
            took = timed(work, some)
            told.append({"what": name, "ms": {f"p{q}": float(np.quantile(took, q / 100)) for q in (50, 95, 99)}})
        for t in told: t["to_ours"] = t["ms"]["p50"] / told[0]["ms"]["p50"]
        began = time.perf_counter()
        with ThreadPoolExecutor(8) as pool: many = list(pool.map(lambda r: member.raw(p, np.array([r]))[0], rows))
        equal = np.array_equal(np.array(many), np.concatenate([member.raw(p, np.array([r])) for r in rows]), equal_nan=True)
        told.append({"what": f"eight threads at once, a row (equal to one thread: {equal})", "ms": {"p50": (time.perf_counter() - began) / len(rows) / 2 * 1000}})
    finally:
        stop.set()
        for o in others: o.join()
    began = time.perf_counter()
    predictor.voices(p, np.arange(len(p)))
    told.append({"what": "a row of a backtest, all cores", "ms": {"p50": (time.perf_counter() - began) / len(p) * 1000}})
    cold = [[float(x) for x in subprocess.run([sys.executable, "-c", COLD, str(given.models), str(s.home / "settings.ini")], capture_output=True, text=True, check=True).stdout.split()] for _ in range(5)]
    told.append({"what": "cold start: models loaded", "ms": {"p50": statistics.median(x[1] for x in cold) * 1000}})
    told.append({"what": "cold start: libraries imported", "ms": {"p50": statistics.median(x[0] for x in cold) * 1000}})
    if given.json: return print(json.dumps(told, indent=1))
    table = Table("one prediction, another core busy", "p50 ms", "p95 ms", "p99 ms", "to ours")
    for t in told: table.add_row(t["what"], *(f"{t['ms'][q]:.2f}" if q in t["ms"] else "" for q in ("p50", "p95", "p99")), f"{t['to_ours']:.2f}" if "to_ours" in t else "")
    Console(width=130).print(table)


if __name__ == "__main__": main()
