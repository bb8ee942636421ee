# make demo: the main job · make bench: docs/performance.md · make test: everything that CI checks · make PYTHON=python3.12 ...: another interpreter
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two test files at a time, each on a core of its own: most of a test is one process that waits for another.
# PASSIVE: threads of a test that wait leave the cores to the other; nnU-Net predicts with as many as there are cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/pytest -n 2 --dist loadfile
DEMO_ARGS ?=
BENCH_ARGS ?=
LOCK_ARGS ?=

BIN := $(VENV)/bin
UV ?= $(BIN)/uv
ROOT := $(CURDIR)
SITE := $(ROOT)/build/site

# A foreign PYTHONPATH would shadow the locked packages.
unexport PYTHONPATH
.DELETE_ON_ERROR:
.PHONY: help venv dev demo bench test test-long lint lock clean distclean python-version

help:
	@echo "make demo   train MaskSAM and nnU-Net for 3 minutes each, write demo_out/report.html"
	@echo "make bench  measure what the fast paths gain, write docs/performance.md (half an hour on two cores)"
	@echo "make test   lint, type check, import contracts, tests"
	@echo "make test-long  the tests that take minutes each, outside make test"
	@echo "make dev    virtual environment with the package in editable mode"
	@echo "make lock   resolve requirements.lock anew (LOCK_ARGS=--upgrade for newer versions)"
	@echo "make clean  build outputs and caches; make distclean: the virtual environment too"

# The two files stand for 'the locked versions are installed' and 'the package is installed'.
venv: $(VENV)/.package

python-version:
ifneq ($(origin PYTHON),file)
	@test ! -x $(BIN)/python || test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || \
		{ echo "$(VENV) holds $$($(BIN)/python -V), asked for $$($(PYTHON) -V): run make distclean first, or add VENV=DIR" >&2; exit 1; }
endif

# --no-deps: the lock is complete. Its hashes pick the same files whatever else pip is configured to look at.
$(VENV)/.deps: requirements.lock | python-version
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name one: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@touch $@

# Editable: a wheel's copy would be shadowed in part by the folders of the checkout.
$(VENV)/.package: $(VENV)/.deps pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

dev: venv
	@echo "run: . $(BIN)/activate"

demo: venv
	$(BIN)/masksam demo --out demo_out $(DEMO_ARGS)

bench: venv
	$(BIN)/python benchmarks/performance/bench.py $(BENCH_ARGS)

# Types and imports are checked on an installed wheel: neither tool follows the mapped folders of the checkout.
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-index --target $(SITE) build/wheel/*.whl
	cd $(SITE) && MYPYPATH=$(SITE) $(abspath $(BIN))/mypy --config-file $(ROOT)/pyproject.toml --cache-dir $(ROOT)/.mypy_cache -p masksam_nnunet
	cd $(SITE) && $(abspath $(BIN))/lint-imports --config $(ROOT)/pyproject.toml --no-cache

# pytest comes last: its closing lines are what is read.
test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-long: venv
	$(PYTEST) -m long $(PYTEST_ARGS)

lock: $(filter $(BIN)/uv,$(UV))
	env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL $(UV) pip compile pyproject.toml --extra dev \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock $(LOCK_ARGS)

$(BIN)/uv: | $(VENV)/.deps
	@test -x $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find masksam_nnunet plans trainers inference benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) demo_out
