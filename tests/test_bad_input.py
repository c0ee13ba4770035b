"""Bad input ends with one clear sentence and an exit code: no traceback, nothing half-written."""
from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import Demo, realdeal
from hypothesis import given
from hypothesis import strategies as st

from realdeal.store import CANDLES, Journal, Store, StoreKey, check_candles
from realdeal.types import MINUTE, BadData, Stop

T0 = 1_704_067_200_000
GOOD = [(T0 + i * MINUTE, 100.0, 101.0, 99.0, 100.5, 1.0) for i in range(5)]
COLUMNS = ("time", "open", "high", "low", "close", "volume")


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == code, said
    assert "Traceback" not in said
    for w in words: assert w in said, said


@pytest.mark.parametrize(
    ("row", "values", "rule"),
    [
        (2, (T0 + MINUTE, 100.0, 101.0, 99.0, 100.0, 1.0), "row 2: the time is a duplicate"),
        (2, (T0, 100.0, 101.0, 99.0, 100.0, 1.0), "rows must be sorted"),
        (1, (T0 + MINUTE, 100.0, 101.0, -99.0, 100.0, 1.0), "row 1: a price is not above 0"),
        (3, (T0 + 3 * MINUTE, 100.0, 101.0, 99.0, float("nan"), 1.0), "row 3: a value is missing or not finite"),
        (3, (T0 + 3 * MINUTE, 100.0, 100.2, 99.0, 100.5, 1.0), "row 3: high is not the highest"),
        (4, (T0 + 4 * MINUTE, 100.0, 101.0, 99.0, 100.5, -1.0), "row 4: the volume is negative"),
        (4, (T0 + 4 * MINUTE + 1, 100.0, 101.0, 99.0, 100.5, 1.0), "not on a whole minute"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_candle_file(home: Path, row: int, values: tuple[float, ...], rule: str, suffix: str) -> None:
    rows = [*GOOD[:row], values, *GOOD[row + 1 :]]
    df = pl.DataFrame(rows, schema=COLUMNS, orient="row")
    file = home / f"mine{suffix}"
    df.write_csv(file) if suffix == ".csv" else df.write_parquet(file)
    refused(realdeal("import", file.name, "--symbol", "BTC/USDT", home=home), 65, file.name, rule)
    assert not list(home.glob("data/**/*.parquet")), "nothing was written"


def test_good_candle_file(home: Path) -> None:
    pl.DataFrame(GOOD, schema=COLUMNS, orient="row").write_csv(home / "mine.csv")
    done = realdeal("import", "mine.csv", "--symbol", "BTC/USDT", home=home)
    assert done.returncode == 0 and "5 of them new" in done.stdout
    assert pl.read_parquet(home / "data/imported/binance/candles_1m/BTCUSDT/2024.parquet").height == 5
    again = realdeal("import", "mine.csv", "--symbol", "BTC/USDT", home=home)
    assert again.returncode == 0 and "0 of them new" in again.stdout, "twice is the same as once"
    assert not (home / "data/store").exists(), "it is fetched from there through ccxt, like any recorded candle"


@pytest.mark.parametrize(
    ("name", "columns", "code", "rule"),
    [
        ("BTCUSDT.csv", {"time": [T0, T0 + 1], "bid": [100.0, 100.2], "ask": [100.1, 100.1]}, 65, f"BTCUSDT.csv: row 1: the bid is above the ask: ({T0 + 1}, 100.2, 100.1)"),
        ("BTCUSDT.parquet", {"time": [T0, T0 + 1], "bid": [0.0, 100.0], "ask": [100.1, 100.1]}, 65, "BTCUSDT.parquet: row 0: a price is not above 0"),
        ("BTCUSDT.parquet", {"time": [T0, T0 + 1], "bid": [100.0, float("nan")], "ask": [100.1, 100.1]}, 65, "row 1: a value is missing or not finite"),
        ("BTCUSDT.csv", {"time": [T0 + 1, T0], "bid": [100.0, 100.0], "ask": [100.1, 100.1]}, 65, "row 1: the time is before the row above: rows must be sorted"),
        ("BTCUSDT.csv", {"time": [T0], "bid": [100.0]}, 65, "no column ask; expected time, bid, ask"),
        ("BTCUSDT.csv", {"time": ["soon"], "bid": [100.0], "ask": [100.1]}, 65, "column time: cannot be read as dates: 'soon'"),
        ("BTCUSDT.csv", {"time": [T0], "bid": [100.0], "ask": ["much"]}, 65, "BTCUSDT.csv: "),
        ("BTCUSDT.csv", {"time": [T0 - MINUTE], "bid": [100.0], "ask": [100.1]}, 66, "no quote of BTC/USDT from"),
        ("mine.csv", {"time": [T0], "bid": [100.0], "ask": [100.1]}, 66, "no quotes of BTC/USDT; expected a file that is called after its symbol, such as BTCUSDT.parquet"),
    ],
)
def test_quotes(demo: Demo, tmp_path: Path, name: str, columns: dict[str, list[object]], code: int, rule: str) -> None:
    df = pl.DataFrame(columns)
    df.write_csv(tmp_path / name) if name.endswith("csv") else df.write_parquet(tmp_path / name)
    before = sorted(demo.data.glob("results/*"))
    report = ("report", "--source", "simulated", "--candles", "49", "--test-days", "5", "--reserve-days", "6", "--symbol", "BTC/USDT", "--quotes")
    refused(realdeal(*report, str(tmp_path / name), home=demo.home), code, rule)
    assert sorted(demo.data.glob("results/*")) == before, "nothing was written"


def test_no_quotes(demo: Demo) -> None:
    refused(realdeal("backtest", "--source", "simulated", "--days", "49", "--test-days", "5", "--reserve-days", "6", "--quotes", "nowhere", home=demo.home), 66, "nowhere: no such file or folder")


def test_venue_is_a_name(home: Path) -> None:
    pl.DataFrame(GOOD, schema=COLUMNS, orient="row").write_csv(home / "mine.csv")
    refused(realdeal("import", "mine.csv", "--symbol", "BTC/USDT", "--venue", "../../x", home=home), 78, "recorded_venue = ../../x")


def test_no_tracebacks_at_the_edge(home: Path) -> None:
    assert realdeal("emulator", "--port", "99999", home=home).returncode == 2
    assert realdeal("emulator", "--seed", "-1", home=home).returncode == 2
    (home / "reports/demo").mkdir(parents=True)
    for text in ("{", "{}", "[]"):
        (home / "reports/demo/kpi.json").write_text(text)
        refused(realdeal("kpi", "--source", "simulated", home=home), 65, "not a board")
    (home / "data/journals").mkdir(parents=True)
    refused(realdeal("live", "--emulator", "foo", home=home), 75, "no emulator answers at foo")


def test_damaged_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(Stop, match="the journal cannot be opened"): Journal(tmp_path / "journal.sqlite")


@given(st.lists(st.tuples(st.integers(-5, 5), *[st.floats(allow_nan=True, allow_infinity=True)] * 5), max_size=6))
def test_candles_from_anywhere(rows: list[tuple[float, ...]]) -> None:
    """Whatever comes in is either clean, by the rules said again here, or refused."""
    df = pl.DataFrame([(t * MINUTE, *r, "venue") for t, *r in rows], schema=CANDLES, orient="row")
    try: ok = check_candles(df, "anywhere")
    except BadData: return
    times = ok["time"].to_list()
    assert times == sorted(set(times))
    for _, o, h, low, c, v, _ in ok.iter_rows(): assert 0 < low <= min(o, c) <= max(o, c) <= h < float("inf") and 0 <= v < float("inf")


def test_unknown_symbol(home: Path) -> None:
    ini = home / "settings.ini"
    ini.write_text(ini.read_text().replace("symbols = BTC/USDT, ETH/USDT", "symbols = BTC/USDT, NOPE"))
    refused(realdeal("ingest", "--source", "simulated", home=home), 78, "symbol 'NOPE'", "BASE/QUOTE")


def test_wrong_key(home: Path) -> None:
    ini = home / "settings.ini"
    ini.write_text(ini.read_text().replace("max_drawdown =", "max_drawdwon ="))
    refused(realdeal("demo", home=home), 78, "settings.ini: [risk] max_drawdwon", "no such key")


def test_wrong_environment(home: Path) -> None:
    refused(realdeal("demo", home=home, REALDEAL_LIVE_STAGE="live"), 78, "settings.ini only")
    refused(realdeal("demo", home=home, REALDEAL_RISK_MAX_DRAWDOWN="0.4"), 78, "tightened")


def test_no_settings(tmp_path: Path) -> None:
    refused(realdeal("kpi", home=tmp_path), 78, "settings.ini: not found")


def test_no_emulator_answers(demo: Demo) -> None:
    refused(realdeal("live", "--emulator", "http://127.0.0.1:9", home=demo.home), 75, "no emulator answers at http://127.0.0.1:9")


def test_missing_model(home: Path) -> None:
    refused(realdeal("live", home=home), 66, "no manifest.json", "train them")


def test_missing_recorded_data(home: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "REALDEAL_DATA"}
    done = subprocess.run([sys.executable, "-m", "realdeal", "run", "--source", "recorded"], cwd=home, env=env, capture_output=True, text=True, timeout=120)
    refused(done, 66, "set REALDEAL_DATA")


def test_damaged_model(demo: Demo, tmp_path: Path) -> None:
    import shutil

    from realdeal.ensemble import load_predictor

    models = shutil.copytree(demo.data / "models", tmp_path / "models")
    blob = bytearray((models / "best_lgbm.pkl").read_bytes())
    blob[len(blob) // 2] ^= 1
    (models / "best_lgbm.pkl").write_bytes(blob)
    with pytest.raises(BadData, match=r"best_lgbm.pkl: its SHA-256 differs"): load_predictor(models, demo.job.s)


def test_simulated_model_never_reaches_a_real_venue(demo: Demo, home: Path) -> None:
    import shutil

    shutil.copytree(demo.data / "models", home / "data/models")
    refused(realdeal("live", home=home), 77, "trained on a simulated market")


def test_full_disk(home: Path) -> None:
    """A write that the disk refuses ends in one sentence and leaves neither a part nor a temporary file."""
    volumes = np.random.default_rng(0).random(40_000)
    rows = [(T0 + i * MINUTE, 100.0, 120.0, 90.0, 100.5, float(v)) for i, v in enumerate(volumes)]
    pl.DataFrame(rows, schema=COLUMNS, orient="row").write_parquet(home / "big.parquet")

    def small() -> None: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = ['realdeal', 'import', 'big.parquet', '--symbol', 'BTC/USDT']; from realdeal.cli import main; main()"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=home, capture_output=True, text=True, preexec_fn=small, timeout=120)
    refused(done, 73, "cannot be written", "nothing was changed")
    assert [f for f in home.glob("data/**/*") if f.is_file() and f.name != ".lock"] == []


def test_base_install_names_the_extra(home: Path) -> None:
    """Without the research libraries a command that needs them says which extra has them."""
    code = "import sys; sys.modules['optuna'] = None; sys.argv = ['realdeal', 'train', '--source', 'simulated', '--days', '150']; from realdeal.cli import main; main()"
    store = Store(home / "data/demo/store", StoreKey(source="simulated", venue="emulator", market="realistic-7"))
    start = 1_704_067_200_000
    for symbol in ("BTC/USDT", "ETH/USDT"): store.write(symbol, pl.DataFrame([(start + i * MINUTE, 100.0, 101.0, 99.0, 100.5, 1.0, "venue") for i in range(30)], schema=CANDLES, orient="row"))
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=120)
    refused(done, 66, "needs optuna", "realdeal[research]")
