# Every target sets itself up: on a fresh machine `make demo` or `make test` is all there is to run.
# TORCH pins the local CPU build for development; the package itself only asks for torch >= 2.6.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint bench bench-scoring docs clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(TORCH)" -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python recipes/demo/prepare.py --output .demo
	$(BIN)/trl sft --config recipes/demo.yaml
	$(BIN)/xtf report .demo/run/xtf/scores.parquet
	$(BIN)/xtf show .demo/run/xtf/scores.parquet -n 3
	@echo "score table: .demo/run/xtf/scores.parquet   summary: .demo/run/xtf/summary.json"

test: $(STAMP) lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m xtf_plugin.config_docs --check

bench: bench-scoring

bench-scoring: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_scoring
	$(BIN)/python -m tests.benchmarks.bench_overheads

docs: $(STAMP)
	$(BIN)/python -m xtf_plugin.config_docs

clean:
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache
