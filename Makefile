# `make quickstart` and `make test` need python3 (3.11 or newer), make and a package index, and nothing else:
# each makes .venv when it is missing, and installs only when setup.py or constraints.txt has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file training/accelerate/one_process.yaml
QUICKSTART := training/configs/quickstart

# accelerate launch would give a process one thread.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: help quickstart test bench quality style docs clean

help:
	@echo "make quickstart   train a tokenizer and a generator on photographs; results in outputs/quickstart"
	@echo "make test         run the tests"
	@echo "make bench        time the short forms of the benchmarks, and compare their ratios with stored ones"
	@echo "make quality      check style and imports"
	@echo "make style        repair style"
	@echo "make docs         build the documentation into site/"
	@echo "make clean        remove what the commands above have made, except .venv and outputs/"

# Threads that spin for a moment only: beside another busy program they would cost ten times their share.
quickstart: export OMP_NUM_THREADS ?= $(CORES)
quickstart: export GOMP_SPINCOUNT ?= 20000
quickstart: $(VENV)/.installed
	@echo "[1/4] Train a SoftVQ tokenizer"
	$(LAUNCH) training/train_softvq.py --config $(QUICKSTART)/softvq.yaml
	@echo "[2/4] Cache its latents"
	$(LAUNCH) training/cache_latents.py --config $(QUICKSTART)/cache_latents.yaml
	@echo "[3/4] Train a SiT generator on the latents"
	$(LAUNCH) training/train_sit.py --config $(QUICKSTART)/sit.yaml
	@echo "[4/4] Load the pipeline, reconstruct, generate, report"
	$(BIN)/python training/quickstart_report.py

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

bench: export OMP_NUM_THREADS ?= $(CORES)
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/check_ratios.py

quality: $(VENV)/.installed build/lib
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=build/lib $(BIN)/lint-imports --no-cache --no-logo

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs build/lib
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html"

clean:
	rm -rf build site .pytest_cache .ruff_cache .import_linter_cache

# The package as it is installed, pipelines/ in its place: what import-linter and the API pages read.
.PHONY: build/lib
build/lib: | $(VENV)/.installed
	@rm -rf $@
	@$(BIN)/python setup.py --quiet build_py --no-compile --build-lib $@

$(VENV)/.installed: setup.py constraints.txt | $(VENV)/bin/pip
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs: setup.py constraints.txt | $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments (its ensurepip or venv module is missing). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
