# Two commands do everything on a machine with Python 3.11, make, git and a C compiler: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Threads that spin while they wait cost more than they give on few cores.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lab reports sync lint chapters notebooks pytest gate bench clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## Install into .venv and set the git hooks

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "realdeal needs Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[research,dev]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then git config core.hooksPath .githooks; fi
	@touch $@

demo: $(READY) ## The main job offline, on the embedded simulated market; at most 10 minutes on 2 cores
	$(BIN)/realdeal demo

test: sync lint chapters notebooks pytest gate ## Everything CI runs: sync, ruff, mypy, chapters, report notebooks, pytest with coverage, the gate

lab: $(READY) ## JupyterLab on the first page
	$(BIN)/jupyter lab nbs/index.ipynb

reports: $(READY) ## Draw the reports of the recorded run again, from its saved results
	$(BIN)/realdeal report --source recorded

sync: $(READY) ## Fail when clean or export would change a file
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT \
	&& cp -r pyproject.toml settings.ini README.md nbs realdeal "$$copy" && cd "$$copy" \
	&& $(CURDIR)/$(BIN)/nbdev-clean && $(CURDIR)/$(BIN)/nbdev-export && cd $(CURDIR) \
	&& diff -r -x __pycache__ -x .ipynb_checkpoints -x .last_checked nbs "$$copy/nbs" && diff -r -x __pycache__ realdeal "$$copy/realdeal" \
	&& echo "sync: notebooks are clean and the package is what they export"

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check nbs realdeal tests benchmarks
	$(BIN)/mypy

chapters: $(READY) ## Run every chapter from top to bottom (nbdev-test)
	$(BIN)/nbdev-test nbs --n-workers 2 --skip-folder-re reports

notebooks: $(READY) ## Run the first page and the report templates in a real kernel (nbval)
	$(BIN)/pytest --nbval-lax -p no:cacheprovider nbs/index.ipynb nbs/reports

pytest: $(READY) ## The tests, with coverage of the package
	rm -f .coverage .coverage.*
	$(BIN)/pytest --cov --cov-report=term --cov-fail-under=80

gate: $(READY) ## Compute the pinned backtests anew; fails when a figure fell, or changed without a reason
	$(BIN)/realdeal kpi --gate

bench: $(READY) ## The benchmarks: ratios in one run on the same work
	$(BIN)/python -m benchmarks

clean: ## Remove what the demo made (the environment and recorded results stay)
	rm -rf data/demo reports/demo
