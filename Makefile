# For a fresh machine: `make demo` runs a small example end to end, `make test` runs the tests.
# Both set up `.venv` first, with uv where it is installed and with pip where it is not; nothing else is written to.

SHELL  := /bin/bash
PYTHON ?= python3
UV     := $(shell command -v uv 2>/dev/null)
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Versions that the checks last passed with, so that the set-up stays reproducible.
CONSTRAINTS ?= .ci/constraints.txt

# DeepSpeed compiles its CPU communication op once (about 70 s) and keeps it here; `ninja` must be on PATH for that.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
# For the demo's two packages of real parts
export PIP := $(if $(UV),$(UV) pip,$(CURDIR)/$(PY) -m pip)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo demo-parts test test-slow test-faults test-nightly test-gpu lint bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## create .venv and install the package into it

demo: $(STAMP)  ## train, export and question a small LLaVA on real input (15 to 20 minutes on 2 CPU cores)
	bash scripts/demo.sh

demo-parts: $(STAMP)  ## make the checked-in demo parts again: the small CLIP tower and the pretrained projector
	bash playground/demo_parts.sh

test: $(STAMP)  ## the tests
	$(PY) -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the slow tier
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

test-faults: $(STAMP)  ## kills, full disks, fuzzing
	$(PY) -m pytest -m faults $(PYTEST_ARGS)

test-nightly: $(STAMP)  ## the tier of faults, with 500 kills and 20,000 wrong files (hours on 2 cores)
	KILLS=250 FUZZ_CASES=20000 STOPS=10 DISK_STEP=3 $(PY) -m pytest -m faults $(PYTEST_ARGS)

test-gpu: $(STAMP)  ## what needs a CUDA device
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff's rules, its format, and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --diff .
	$(VENV)/bin/mypy

bench: $(STAMP)  ## the benchmarks; tables on stdout, JSON in benchmarks/results (status 4: needs a GPU)
	for file in benchmarks/*.py; do $(PY) $$file || [ $$? -eq 4 ] || exit 1; done

clean:  ## remove the environment, caches and everything the demo made
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis playground/data playground/models playground/runs

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; fix: install Python 3.10 or newer, or make PYTHON=/path/to/python3" >&2; exit 4; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old; fix: make PYTHON=/path/to/python3.10 or newer" >&2; exit 4; }
	@command -v $${CXX:-c++} >/dev/null || { echo "error: no C++ compiler, which DeepSpeed needs to build an op; fix: install g++ (Debian, Ubuntu: build-essential)" >&2; exit 4; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "error: Python.h not found, which DeepSpeed's op includes; fix: install the Python headers (Debian, Ubuntu: python3-dev)" >&2; exit 4; }
ifeq ($(UV),)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: this Python cannot create environments; fix: install python3-venv, or uv" >&2; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,demo]' -c $(CONSTRAINTS)
else
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --python $(PY) -e '.[dev,demo]' -c $(CONSTRAINTS)
endif
	@touch $@
