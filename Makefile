# megatron_ext: train, test, lint, bench, clean. Each target sets up what it needs.
#
#   make train                  trains the small DeepSeek-V3 of examples/ on 4 ranks; RANKS=8 for 8, ARGS="..." for the script
#   make test                   lint, then every test that is neither slow nor needs a GPU
#   make test-all               the slow ones too (full equivalence tables, long trainings); test-gpu: those for a CUDA device
#   make lint | bench | clean   (clean leaves .venv; distclean takes it too)
#
# Without PYTHON=, an environment of the project's own is made in .venv: torch first and pinned, so that nothing later pulls
# another build of it, then DeepSpeed (its operators are compiled at run time, none now), then this package, editable.
# TORCH_PIP_ARGS goes to pip when it installs torch, for an index of CPU builds, say.
# With PYTHON=/path/to/python that environment is used as it is: nothing is installed, the CPU kernels are compiled in place.

TORCH     ?= 2.13.0
DEEPSPEED ?= 0.19.8
RANKS     ?= 4
ARGS      ?=
PYTEST_ARGS ?=
TORCH_PIP_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help train test test-all test-gpu lint bench kernels clean distclean

VENV := .venv
ifeq ($(strip $(PYTHON)),)
  PY := $(CURDIR)/$(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.installed
else
  PY := $(PYTHON)
  ENVIRONMENT :=
endif
# The launcher starts ranks with the Python it runs on, and DeepSpeed's builds look for `ninja` beside it. PYTHONPATH is for
# an environment of somebody else's, where this package is not installed.
RUN = PATH="$$(dirname "$$(command -v "$(PY)")"):$$PATH" PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$(PY)"
PIP = "$(PY)" -m pip --disable-pip-version-check -q install --no-compile
LIBRARY := kernels/cpu/libmegatron_ext_cpu.so

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

train: kernels
	@$(RUN) -m deepspeed.launcher.runner --num_gpus $(RANKS) \
	    examples/pretrain_deepseek_v3.py --deepspeed_config examples/pretrain_deepseek_v3.json $(ARGS)

test: lint kernels
	@$(RUN) -m pytest $(PYTEST_ARGS)

test-all: lint kernels
	@$(RUN) -m pytest -m "not gpu" $(PYTEST_ARGS)

test-gpu: kernels
	@$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

# An environment of somebody else's may lack the linters; ours has them.
lint: $(ENVIRONMENT)
	@if "$(PY)" -c 'import ruff' 2>/dev/null; then "$(PY)" -m ruff check .; else echo "ruff is not in this environment: skipped"; fi
	@if "$(PY)" -c 'import mypy' 2>/dev/null; then "$(PY)" -m mypy; else echo "mypy is not in this environment: skipped"; fi

bench: kernels
	@mkdir -p runs/benchmarks
	@for script in benchmarks/*.py; do \
	    echo "$$script"; $(RUN) "$$script" --json "runs/benchmarks/$$(basename "$$script" .py).json"; done

kernels: $(LIBRARY)

$(LIBRARY): $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cuda/*.cu kernels/cuda/*.cuh kernels/cuda/*.h) setup.py | $(ENVIRONMENT)
	@echo "compiling the kernels"
	@"$(PY)" setup.py --quiet build_ext --inplace

# Each step leaves a mark, so an interrupted set-up goes on where it stopped and a finished one costs nothing.
$(VENV)/.installed: $(VENV)/.deepspeed-$(DEEPSPEED) pyproject.toml
	@echo "installing megatron_ext and what its tests need"
	@$(PIP) "torch==$(TORCH)" --no-build-isolation -e ".[test,lint]"
	@touch $@

$(VENV)/.deepspeed-$(DEEPSPEED): $(VENV)/.torch-$(TORCH)
	@echo "installing deepspeed $(DEEPSPEED)"
	@DS_BUILD_OPS=0 $(PIP) "torch==$(TORCH)" --no-build-isolation "deepspeed==$(DEEPSPEED)"
	@touch $@

$(VENV)/.torch-$(TORCH): $(VENV)/.created
	@echo "installing torch $(TORCH)"
	@$(PIP) "torch==$(TORCH)" $(TORCH_PIP_ARGS)
	@touch $@

# The first of these that runs, is 3.11 or newer and can make environments. (A name on PATH may be a shim of nothing.)
$(VENV)/.created:
	@for python in python3.11 python3.12 python3.13 python3; do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "creating $(VENV) with $$("$$python" --version)"; \
	        "$$python" -m venv $(VENV); $(PIP) "setuptools>=77" wheel; touch $@; exit 0; \
	    fi; \
	done; echo "Python 3.11 or newer with venv is needed (Debian: apt install python3-venv), or give PYTHON=" >&2; exit 1

clean:
	rm -rf build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kernels/cpu/*.so kernels/cuda/*.cubin kernels/*/*.unfinished
	find kernels megatron_ext tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
