# One way in. `make` lists the targets; the first one that needs the environment creates .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
OUT    ?= out

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton test-gpu test-triton36 audit lint typecheck format bench bench-toy study study-quick clean

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

# The backend tests run over the triton backend alone where TRITON_INTERPRET is set.
TRITON_TESTS := tests/test_backends/test_backends.py $(wildcard tests/test_backends/test_triton*.py)
test-triton: $(VENV)/.installed  ## the triton backend in its interpreter, on the CPU (under 150 s on 2 cores)
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --disable-warnings $(TRITON_TESTS)

test-gpu: $(VENV)/.installed  ## the triton backend's own tests on this machine's GPU
	$(PY) -m pytest tests/test_backends/test_triton*.py

# numpy 2.4 takes no one-element array for an int, which 3.6's interpreter hands to range().
VENV36 := .venv-triton36
test-triton36: $(VENV)/.installed  ## the same with the oldest Triton we promise, in an environment of its own
	test -x $(VENV36)/bin/python || $(PYTHON) -m venv $(VENV36)
	$(VENV36)/bin/python -m pip install -q -c constraints.txt torch setuptools pybind11 pytest pytest-xdist
	$(VENV36)/bin/python -m pip install -q 'triton==3.6.*' 'numpy<2.4'
	TRITON_INTERPRET=1 $(VENV36)/bin/python -m pytest -n 2 --disable-warnings $(TRITON_TESTS)

audit: $(VENV)/.installed  ## compile the GPU kernels without a GPU: registers, shared memory, spills
	$(PY) -m expface_kernels.backends.triton.audit

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

study: $(VENV)/.installed  ## label noise under every margin (hours; goes on where it was stopped): docs/analysis.md
	$(PY) -m examples.glyphs.noise_study run
	$(PY) -m examples.glyphs.noise_study report --docs

study-quick: $(VENV)/.installed  ## the same path at toy size, as CI runs it (under a minute)
	rm -rf $(OUT)/study-quick
	$(PY) -m examples.glyphs.noise_study run --quick --out $(OUT)/study-quick
	$(PY) -m examples.glyphs.noise_study report --quick --out $(OUT)/study-quick

clean:  ## remove what building and running leave behind, .venv included
	rm -rf $(VENV) build out *.egg-info expface_kernels/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
