#!/usr/bin/env bash
# Make one venv for each engine: make_venvs.sh DIR [freqtrade|nautilus|backtesting ...]
# PYTHON names the interpreter to use (default python3.11; NautilusTrader after 1.221 asks for 3.12). Packages come by name only, from the
# registry pip is set to. vectorbt_run.py wants vectorbt[rust] and pyarrow: make_venvs.sh DIR vectorbt, or a venv that has them.
set -euo pipefail
dir=$1; shift
[ $# -gt 0 ] || set -- freqtrade nautilus backtesting
for name in "$@"; do
  case $name in
    freqtrade)   packages="freqtrade pyarrow" ;;
    nautilus)    packages="nautilus_trader pyarrow" ;;
    vectorbt)    packages="vectorbt[rust] pyarrow" ;;
    backtesting) packages="backtesting pyarrow" ;;
    *) echo "unknown engine: $name" >&2; exit 2 ;;
  esac
  "${PYTHON:-python3.11}" -m venv "$dir/venv-$name"
  "$dir/venv-$name/bin/python" -m pip install --quiet $packages
done
