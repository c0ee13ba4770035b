"""`python -m benchmarks.study [--trials N] [--rows N] [--json]`: the trials of our study against the plain arrangement of the same search: every trial bins its own Dataset and grows until it stops early. Nothing here passes or fails."""
from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightgbm as lgb
import numpy as np
import optuna
from rich.console import Console
from rich.table import Table

from realdeal.audit import made_world
from realdeal.features import STEP, Panel, panel
from realdeal.labels import Labels, make_labels
from realdeal.lgbm import FIXED, open_study, prepare, run_study, space, take
from realdeal.scores import log_loss
from realdeal.settings import Settings
from realdeal.splits import Blocks, blocks
from realdeal.types import DAY


def material(rows: int) -> tuple[Panel, Labels, Blocks]:
    """Features and labels of a simulated market with `rows` rows to learn from, two symbols."""
    days = rows * STEP // DAY // 2 + 60
    w = made_world("realistic", days, 7)
    p = panel(w.candles, w.funding, w.end)
    return p, make_labels(p, "direction", 240), blocks(int(p.times[0]) // DAY * DAY + 20 * DAY, w.end // DAY * DAY, 20, 20, 240)


def plain(p: Panel, labels: Labels, b: Blocks, s: Settings) -> tuple[float, float]:
    """(seconds, best loss on the select block) of the search without pruning and without a shared Dataset."""
    at = {n: take(p, labels, b, n) for n in ("train", "stop", "select")}

    def objective(trial: optuna.Trial) -> float:
        params = {n: trial._suggest(n, d) for n, d in space(len(at["train"])).items()}
        train = lgb.Dataset(p.X[at["train"]], labels.y[at["train"]], params=FIXED)
        stop = lgb.Dataset(p.X[at["stop"]], labels.y[at["stop"]], reference=train, params=FIXED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grown = lgb.train({**FIXED, **params, "objective": "binary", "metric": "binary_logloss", "seed": s.run.seed}, train, s.model.rounds, valid_sets=[stop], callbacks=[lgb.early_stopping(s.model.early_stopping, verbose=False)])
        return log_loss(np.asarray(grown.predict(p.X[at["select"]])), labels.y[at["select"]])

    began = time.perf_counter()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=s.run.seed, multivariate=True))
    study.optimize(objective, n_trials=s.model.trials)
    return time.perf_counter() - began, study.best_value


def ours(p: Panel, labels: Labels, b: Blocks, s: Settings) -> tuple[float, float]:
    """The same by our study."""
    folder = Path(tempfile.mkdtemp())
    began = time.perf_counter()
    try:
        study = open_study(folder / "study.log", "bench")
        run_study(study, prepare(folder / "bins", p, labels, b), s, lambda _: None)
        return time.perf_counter() - began, study.best_value
    finally: shutil.rmtree(folder)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--trials", type=int, default=200)
    ask.add_argument("--rows", type=int, default=160_000, help="rows to learn from, both symbols together")
    ask.add_argument("--json", action="store_true")
    asked = ask.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    p, labels, b = material(asked.rows)
    learn = sum(len(take(p, labels, b, n)) for n in ("train", "stop", "select"))
    told = {}
    for name, run, workers in (("ours, one process", ours, 1), ("plain, one process", plain, 1), ("ours, two processes", ours, 2)):
        seconds, loss = run(p, labels, b, Settings().override(model={"trials": asked.trials, "workers": workers}))
        told[name] = {"seconds": round(seconds, 1), "best_loss": round(loss, 6)}
    base = told["plain, one process"]["seconds"]
    for row in told.values(): row["ratio"] = round(base / row["seconds"], 2)
    if asked.json: return print(json.dumps({"rows": learn, "features": len(p.names), "trials": asked.trials, "results": told}, indent=1))
    t = Table("arrangement", "seconds", "times quicker", "best loss on select", title=f"{asked.trials} trials, {learn:,} rows x {len(p.names)} features")
    for name, row in told.items(): t.add_row(name, f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['best_loss']:.6f}")
    Console().print(t)


if __name__ == "__main__": main()
