# One way in. `make` lists the targets; the first one that needs the environment creates .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
OUT    ?= out

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck format bench bench-toy clean

help:  ## list the targets
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 14

# The stamp is newer than what it was built from, so a second call installs nothing again.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/simd/*)
$(VENV)/.installed: $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch numpy triton setuptools pybind11
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

.venv: $(VENV)/.installed  ## the environment: pinned versions and the package, editable

demo: $(VENV)/.installed  ## train on glyphs, verify unseen ones, time the head (under 5 minutes)
	$(PY) -m examples.glyphs.demo --out $(OUT)

test: $(VENV)/.installed  ## all tests, one worker a core (each takes one thread)
	$(PY) -m pytest -n 2

lint: $(VENV)/.installed  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed  ## let ruff rewrite what lint would complain about
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(VENV)/.installed  ## mypy
	$(PY) -m mypy

bench: $(VENV)/.installed  ## the head against its peers at B=256, C=100,000, D=512
	$(PY) -m bench

bench-toy: $(VENV)/.installed  ## the same command at toy size, as CI runs it
	$(PY) -m bench --toy

clean:  ## remove what building and running leave behind, .venv included
	rm -rf $(VENV) build out *.egg-info expface_kernels/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
