# Everything happens in .venv, which every target brings up to date first.
# Needs Python >= 3.11 with venv, a C++ compiler, and an internet connection the first time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# PyPI's torch for Linux is a CUDA build of several GB, so the CPU build's index is asked as well.
# Another build: make venv TORCH_INDEX=https://... ; other options for every install: PIP_ARGS=...
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq $(PIP_ARGS)

# Threads that spin while they wait make small models many times slower on a busy machine.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: help venv demo demo-full bench bench-ops test test-kernels test-gpu contract lint format types clean FORCE

help:
	@echo "make demo       trace the bundled model and write a report to demo-out/"
	@echo "make demo-full  the same with every site, prompt and seed"
	@echo "make test       run the tests         make lint types   check style and types"
	@echo "make test-kernels  compile every kernel and look at it; minutes, no GPU needed"
	@echo "make test-gpu      kernels and engine on a CUDA device"
	@echo "make contract   test under the oldest and the newest libraries claimed; 3 minutes"
	@echo "make bench      whole sweeps side by side; an hour or two, on an idle machine"
	@echo "make bench-ops  only the ops against what they replace; a minute or two"
	@echo "make format     apply the style       make clean        remove what make made"

venv: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fasttrace needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: constraints.txt | $(BIN)/python
	@echo "installing the dependencies into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $$(grep '^torch==' constraints.txt)
	@$(INSTALL) -r constraints.txt
	@touch $@

# An editable install remembers where each module lies, so it is renewed when one is added or moved.
$(VENV)/.modules: FORCE | $(BIN)/python
	@find fasttrace kernels -name '*.py' | sort > $@.now
	@cmp -s $@.now $@ && rm $@.now || mv $@.now $@

# Editable, so that an edit needs no reinstall; csrc/ is compiled again when it changes.
$(VENV)/.installed: $(VENV)/.dependencies $(VENV)/.modules pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	@echo "compiling csrc/ and installing fasttrace into $(VENV)"
	@PATH="$(abspath $(BIN)):$$PATH" FASTTRACE_REQUIRE_EXT=1 \
		$(INSTALL) --no-build-isolation --no-deps -e .
	@$(PIP) check > /dev/null || $(PIP) check
	@touch $@

demo: venv
	$(BIN)/fasttrace demo --out demo-out

demo-full: venv
	$(BIN)/fasttrace demo --out demo-out --full

bench: venv
	$(BIN)/python bench/sweeps.py
	$(BIN)/python bench/ops.py

bench-ops: venv
	$(BIN)/python bench/ops.py

# Two processes with half the threads each: small models are bound by what one thread does.
test: venv
	OMP_NUM_THREADS=$$(( ($$(nproc) + 1) / 2 )) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not kernels_slow and not contract" $(PYTEST_ARGS)

# One process, which starts others itself.
test-kernels: venv
	$(BIN)/python -m pytest -m kernels_slow $(PYTEST_ARGS)

# Needs a CUDA device; Triton's kernels are compiled and not interpreted.
test-gpu: venv
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu -W ignore::DeprecationWarning $(PYTEST_ARGS)

# Under the oldest and the newest diffusers and transformers that are claimed; CONTRACT=latest.
contract: venv
	.ci/contract $(CONTRACT)

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror csrc/*

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*

types: venv
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
