# One way in. `make` lists the targets; the first one that needs the environment creates .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
OUT    ?= out

.DEFAULT_GOAL := help
.PHONY: help demo test test-lab test-triton test-sanitized test-gpu test-triton36 audit audit-all audit-golden lint \
	typecheck format clean \
	bench bench-quick bench-sweep bench-gpu readme-tables study study-quick

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 14

# The stamp is newer than what it was built from, so a second call installs nothing again.
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/simd/*)
$(VENV)/.installed: $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch numpy triton setuptools pybind11
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# An interpreter given as PY is used as it is, where there may be no network: nothing is installed or built.
ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.installed
else
export PYTHONPATH := .
endif

.venv: $(VENV)/.installed  ## the environment: pinned versions and the package, editable

demo: $(VENV)/.installed  ## train on glyphs, verify unseen ones, time the head (under 5 minutes)
	$(PY) -m examples.glyphs.demo --out $(OUT)

test: $(VENV)/.installed  ## all tests, one worker a core (each takes one thread)
	$(PY) -m pytest -n 2

# The tests of every backend run over the triton backend too where there is a GPU, over it alone where
# TRITON_INTERPRET is set; -k leaves out those that do not concern it.
EVERY_BACKEND := $(patsubst %,tests/test_backends/%.py,test_backends test_edges test_accuracy test_negatives)
TRITON_TESTS := -k triton $(EVERY_BACKEND) $(wildcard tests/test_*/test_triton*.py)
test-triton: $(VENV)/.installed  ## the triton backend in its interpreter, on the CPU (under 150 s on 2 cores)
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --disable-warnings $(TRITON_TESTS)

# CI runs this in place of test-triton: the same tests, and more.
test-sanitized: $(VENV)/.installed  ## test-triton with an eye on bounds, races and memory that nobody wrote
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --disable-warnings -p tests.sanitizer $(TRITON_TESTS)

# With PY=python3 it needs torch, triton, numpy and pytest alone. Compiling kernels is most of the time, so each
# file is a process of its own.
GPU_FILES := test_backends test_edges test_accuracy test_negatives \
	test_triton test_triton_shapes test_triton_host test_triton_gpu
test-gpu: $(READY)  ## the triton backend on this machine's GPU
	@$(MAKE) --no-print-directory --keep-going --jobs=5 --output-sync=target $(GPU_FILES:%=gpu-%)

gpu-%:
	$(PY) -m pytest --need-gpu -rs -k triton tests/test_backends/$*.py

# numpy 2.4 takes no one-element array for an int, which 3.6's interpreter hands to range().
VENV36 := .venv-triton36
test-triton36: $(VENV)/.installed  ## the same with the oldest Triton we promise, in an environment of its own
	test -x $(VENV36)/bin/python || $(PYTHON) -m venv $(VENV36)
	$(VENV36)/bin/python -m pip install -q -c constraints.txt torch setuptools pybind11 pytest pytest-xdist
	$(VENV36)/bin/python -m pip install -q 'triton==3.6.*' 'numpy<2.4'
	TRITON_INTERPRET=1 $(VENV36)/bin/python -m pytest -n 2 --disable-warnings $(TRITON_TESTS)
	$(VENV36)/bin/python -m pytest -n 2 tests/test_workshop/test_ring.py tests/test_workshop/test_audit.py
	$(VENV36)/bin/python -m expface_kernels.workshop.audit

audit: $(VENV)/.installed  ## compile the GPU kernels without a GPU: races, spills, registers, loads (under 4 minutes)
	$(PY) -m expface_kernels.workshop.audit

audit-all: $(VENV)/.installed  ## the same for every architecture (6 minutes)
	$(PY) -m expface_kernels.workshop.audit --all

audit-golden: $(VENV)/.installed  ## accept what the kernels compile to now as what audit compares with
	$(PY) -m expface_kernels.workshop.audit --all --golden

lint: $(VENV)/.installed  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed  ## let ruff rewrite what lint would complain about
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(VENV)/.installed  ## mypy
	$(PY) -m mypy

bench: $(VENV)/.installed  ## the head against its peers at B=256, C=100,000, D=512; leaves out/bench.jsonl
	@mkdir -p $(OUT)
	$(PY) -m bench --json $(OUT)/bench.jsonl

bench-quick: $(VENV)/.installed  ## the sweep at toy size, as CI runs it: do peers and ours agree?
	@mkdir -p $(OUT)
	$(PY) -m bench sweep --toy --json $(OUT)/bench-quick.jsonl --plots $(OUT)/bench-quick

RESULTS := bench/results
bench-sweep: $(VENV)/.installed  ## seconds and memory against C, B, D and workspace, with pictures (35 minutes)
	$(PY) -m bench sweep --json $(RESULTS)/cpu-sweep.jsonl --plots $(RESULTS)/cpu-sweep

# `make bench-gpu PY=python3` takes the Python that is there: no network and no matplotlib are needed.
bench-gpu: $(READY)  ## tune the kernels, then measure, on this machine's GPU (10 minutes)
	-$(PY) -m expface_kernels.workshop.autotune --seconds 120
	$(PY) -m bench gpu

readme-tables: $(VENV)/.installed  ## the tables of README and docs/benchmarks.md, from bench/results
	$(PY) -m bench readme

test-lab: $(VENV)/.installed  ## the tests of lab/, which `make test` leaves out
	$(PY) -m pytest -n 2 lab/tests

study: $(VENV)/.installed  ## label noise under every margin (hours; continues where it was stopped): docs/analysis.md
	$(PY) -m lab.noise_study run
	$(PY) -m lab.noise_study report --docs

study-quick: $(VENV)/.installed  ## the same path at toy size, as CI runs it (under a minute)
	rm -rf $(OUT)/study-quick
	$(PY) -m lab.noise_study run --quick --out $(OUT)/study-quick
	$(PY) -m lab.noise_study report --quick --out $(OUT)/study-quick

clean:  ## remove what building and running leave behind, .venv included
	rm -rf $(VENV) build out *.egg-info expface_kernels/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
