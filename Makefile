# Every target sets itself up: on a fresh machine `make demo` or `make test` is all there is to run.
# TORCH pins the local CPU build for development; the package itself only asks for torch >= 2.9.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-lowest lint bench bench-scoring bench-streaming proof proof-gpu docs clean

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

# The lowest versions that pyproject.toml states, in a virtual environment of their own; the tests are those in which
# other packages' behaviour shows. TORCH stays what it is: PyPI's lower builds for Linux bring gigabytes of CUDA.
LOWEST = .venv-lowest
LOWEST_FILES = scorer attributes callback hook_trl store selection config config_errors cli opening excerpts typical selectors second_looks
LOWEST_TESTS = $(LOWEST_FILES:%=tests/test_%.py) \
	tests/test_end_to_end.py::test_other_launchers_apply_the_block \
	tests/test_end_to_end.py::test_score_agrees_with_eager_float32

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml tests/constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --upgrade pip
	$(LOWEST)/bin/python -m pip install -q "$(TORCH)"
	$(LOWEST)/bin/python -m pip install -q "$(TORCH)" -e ".[dev]" -c tests/constraints-lowest.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m xtf_plugin.config_docs --check

bench: bench-scoring bench-streaming

bench-scoring: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_scoring
	$(BIN)/python -m tests.benchmarks.bench_overheads

bench-streaming: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_streaming

# From nothing to the tables of docs/evidence.md: about an hour on two cores. Started again, it goes on where it stopped.
proof: $(STAMP)
	$(BIN)/python -m tests.benchmarks.proof --folder .proof

# Larger models and more seeds; started again until nothing is missing, each time at most ten minutes.
proof-gpu: $(STAMP)
	$(BIN)/python -m tests.benchmarks.proof --folder .proof-gpu --scale gpu --minutes 9

docs: $(STAMP)
	$(BIN)/python -m xtf_plugin.config_docs

clean:
	rm -rf .demo .pytest_cache .mypy_cache .ruff_cache
