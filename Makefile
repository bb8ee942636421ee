# make help lists the targets. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two test files at a time, each on one core: most tests are one process that waits for another. PASSIVE: threads that
# wait leave the cores to the other file, because nnU-Net predicts with as many threads as there are cores.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
BENCH_ARGS ?=
LOCK_ARGS ?=
NNUNET ?= 2.8.0

BIN := $(VENV)/bin
UV ?= $(BIN)/uv
ROOT := $(CURDIR)
INSTALLED := $(ROOT)/build/site
NNUNET_SOURCE := $(if $(wildcard $(NNUNET)),$(NNUNET),nnunetv2==$(NNUNET))

# A foreign PYTHONPATH would shadow the locked packages.
unexport PYTHONPATH
.DELETE_ON_ERROR:
.PHONY: help venv dev demo bench docs test test-long test-nnunet lint lock clean distclean python-version

help:
	@echo "make demo       train MaskSAM and nnU-Net on a CPU in about 12 minutes, write demo_out/report.html"
	@echo "make dev        create the virtual environment with the package in editable mode"
	@echo "make test       run lint, type check, import contracts and the tests"
	@echo "make test-long  run the tests that take minutes each and are not part of make test"
	@echo "make test-nnunet NNUNET=2.8.0  run the contract tests on another nnU-Net: a version, or the folder of a checkout"
	@echo "make lint       run ruff, mypy and import-linter only"
	@echo "make docs       build the documentation site in site/"
	@echo "make bench      measure time and memory, write docs/performance.md (half an hour on two cores)"
	@echo "make lock       update requirements.lock for pyproject.toml (LOCK_ARGS=--upgrade for newer versions)"
	@echo "make clean      delete build outputs and caches; make distclean deletes the virtual environment too"

# The two files mark that the locked packages and this package are installed.
venv: $(VENV)/.package

python-version:
ifneq ($(origin PYTHON),file)
	@test ! -x $(BIN)/python || test "$$($(PYTHON) -V)" = "$$($(BIN)/python -V)" || \
		{ echo "$(VENV) has $$($(BIN)/python -V), not $$($(PYTHON) -V): run make distclean first, or add VENV=DIR" >&2; exit 1; }
endif

# --no-deps: the lock is complete. Its hashes select the same files however pip is configured.
$(VENV)/.deps: requirements.lock | python-version
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "$(PYTHON) is Python %d.%d, but 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@touch $@

# Editable: the folders of the checkout would shadow parts of an installed copy.
$(VENV)/.package: $(VENV)/.deps pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

dev: venv
	@echo "run: . $(BIN)/activate"

demo: venv
	$(BIN)/masksam demo --out demo_out $(DEMO_ARGS)

bench: venv
	$(BIN)/python benchmarks/performance/bench.py $(BENCH_ARGS)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html, or run: $(BIN)/mkdocs serve"

# mypy and import-linter run on an installed wheel, because they do not follow the checkout's mapped folders.
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-index --target $(INSTALLED) build/wheel/*.whl
	cd $(INSTALLED) && MYPYPATH=$(INSTALLED) $(abspath $(BIN))/mypy --config-file $(ROOT)/pyproject.toml --cache-dir $(ROOT)/.mypy_cache -p masksam_nnunet
	cd $(INSTALLED) && $(abspath $(BIN))/lint-imports --config $(ROOT)/pyproject.toml --no-cache

# pytest runs last, so that its summary is at the end of the output. tests/docs builds the site.
test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-long: venv
	$(PYTEST) -m long $(PYTEST_ARGS)

# Its files come before the installed ones; other packages stay those of the lock.
test-nnunet: venv
	rm -rf build/nnunet
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/nnunet $(NNUNET_SOURCE)
	PYTHONPATH=$(ROOT)/build/nnunet $(PYTEST) tests/contract $(PYTEST_ARGS)

lock: $(filter $(BIN)/uv,$(UV))
	env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL $(UV) pip compile pyproject.toml --extra dev \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock $(LOCK_ARGS)

$(BIN)/uv: | $(VENV)/.deps
	@test -x $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find masksam_nnunet plans trainers inference benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) demo_out
