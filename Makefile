# Two commands do everything on a fresh machine: `make demo` and `make test`; `make test-slow` is the rest of the tests.
# Each finds a Python by itself (.ci/find-python) and makes its own environment; nothing outside this folder is changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-gpu lint format docs reference cuda-compiler clean

packages := jquant pallas_kernels convert eval
python := .venv/bin/python
pip := -m pip --disable-pip-version-check install -qq
ready := .venv/.ready
reference_ready := .venv-reference/.ready

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(ready) ## make .venv: Python >= 3.12, this package and what develops it, at the pinned versions

$(ready): pyproject.toml constraints.txt
	@interpreter=$$(.ci/find-python 3.12); echo "environment: .venv with $$interpreter (some minutes the first time)"; \
	  [ -x $(python) ] || "$$interpreter" -m venv .venv
	@$(python) $(pip) --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: $(ready) ## obtain a small model, quantize it to 4 bits, measure it, chat with it
	@.venv/bin/jquant demo

test: $(ready) ## the tests, without those marked slow
	@$(python) -m pytest --numprocesses 2 --dist worksteal -m 'not slow'

test-slow: $(ready) ## the slow tests: a real model, torch beside us, whole comparisons
	@$(python) -m pytest --numprocesses 2 --dist worksteal -m slow

gpu_tests := tests/kernels tests/kv/test_step.py tests/formats/test_prepared.py tests/models/test_layers.py tests/models/test_prompts.py tests/test_runtime.py tests/test_targets.py

seconds := 600
lines := gpu-tests.jsonl

test-gpu: $(ready) ## the tests that need an H100 or H200, by ten processes, begun within seconds=600; results in lines=
	@JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
	  $(python) -m pytest --numprocesses 10 --dist worksteal -m gpu --seconds $(seconds) --lines $(lines) $(gpu_tests)

lint: $(ready) ## ruff, formatting and types
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy $(packages)

format: $(ready) ## rewrite files as `make lint` wants them
	@$(python) -m ruff check --fix-only --quiet .
	@$(python) -m ruff format .

docs: $(ready) ## build the documentation site in .cache/site, warnings being errors
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet
	@echo "open .cache/site/index.html"

reference: $(reference_ready) ## make .venv-reference: Python 3.11 with torch, readers of formats and lm-eval, which tests compare with

$(reference_ready): .ci/reference.txt .ci/reference-gptqmodel.txt
	@interpreter=$$(.ci/find-python 3.11 exact); echo "environment: .venv-reference with $$interpreter"; \
	  [ -x .venv-reference/bin/python ] || "$$interpreter" -m venv .venv-reference
	@.venv-reference/bin/python $(pip) --no-compile --requirement .ci/reference.txt
	@.venv-reference/bin/python $(pip) --no-compile --no-deps --requirement .ci/reference-gptqmodel.txt
	@touch $@

cuda-compiler: .cache/cuda/.ready ## XLA's compiler for NVIDIA GPUs in .cache/cuda, with which tests compile kernels without a GPU

.cache/cuda/.ready: $(ready)
	@version=$$($(python) -c 'import jaxlib; print(jaxlib.__version__)'); \
	  $(python) $(pip) --no-deps --no-compile --upgrade --target .cache/cuda \
	    jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	@touch $@

clean: ## remove the environments and everything that was built or cached
	@rm -rf .venv .venv-reference .cache build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find $(packages) tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
