# Everything here needs only python3 (3.10 or newer, with venv) and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
# Tests run in this many processes; `make test WORKERS=0` runs them in one, for a debugger.
WORKERS ?= auto
# Extra arguments for pytest, e.g. `make test ARGS="tests/test_config.py -k bits"`.
ARGS ?=
# What `make lock` pins torch to.
LOCK_TORCH ?= torch==2.13.0

# Where the environment forbids it, every process would compile torch, diffusers and Lightning anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK_VENV := build/lock-venv
# Python compiles what is imported when it is; to compile all packages takes a third of the installation.
PIP_INSTALL := -m pip install --disable-pip-version-check --no-input --no-compile $(if $(CI),--quiet)
# Each pytest process computes on one thread: two thread pools on the same cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist=worksteal

# $(call make_venv,DIR): an empty virtual environment, or one clear line that says what is missing.
define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "error: $(PYTHON) must be Python 3.10 or newer; choose one with 'make PYTHON=python3.12 ...'" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "error: $(PYTHON) cannot create virtual environments (no ensurepip or venv module);" \
		"on Debian and Ubuntu: apt-get install python3-venv, or choose another with 'make PYTHON=...'" >&2; exit 1; }
$(PYTHON) -m venv $(1)
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv quickstart test test-all lint docs format lock clean

help: ## Show this list
	@echo "Usage: make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; do \
		printf '%-14s %s\n' "$$target" "$$text"; done

venv: $(STAMP) ## Create the virtual environment with the locked dependencies and this project (editable)

# The lock is for Python 3.11 and newer; on 3.10 pip chooses from the ranges in pyproject.toml.
$(STAMP): requirements.lock pyproject.toml
	$(call make_venv,$(VENV))
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	@set -e; if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(BIN)/python $(PIP_INSTALL) -r requirements.lock; \
		$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .; \
	else \
		echo "Python 3.10: installing from the ranges in pyproject.toml, not from requirements.lock."; \
		$(BIN)/python $(PIP_INSTALL) -e '.[dev]'; \
	fi
	@touch $@

quickstart: $(STAMP) ## Quantize the shipped model on this machine (configs/quickstart.yaml)
	$(BIN)/python train.py --config configs/quickstart.yaml

test: $(STAMP) ## Run the fast tests in parallel (WORKERS=auto, ARGS="...")
	$(PYTEST) $(ARGS)

test-all: $(STAMP) ## Run all tests, the slow ones too
	$(PYTEST) -m "" $(ARGS)

lint: $(STAMP) ## Check style, formatting and types; change nothing
	@failed=""; \
	echo "ruff check"; $(BIN)/ruff check . || failed="$$failed ruff-check"; \
	echo "ruff format --check"; $(BIN)/ruff format --check . || failed="$$failed ruff-format"; \
	echo "mypy"; $(BIN)/mypy || failed="$$failed mypy"; \
	if [ -n "$$failed" ]; then echo "lint failed:$$failed" >&2; exit 1; fi

docs: $(STAMP) ## Build the site into build/site; a broken link or a warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(if $(CI),--quiet)
	@echo "built build/site/index.html"

format: $(STAMP) ## Fix what ruff can fix, and reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made with the oldest Python the lock is for, so that every version in it exists for the newer ones too. Local version
# suffixes (+cpu) and the packages that only a CUDA build of torch pulls in are left out: pip adds the latter by itself.
lock: ## Write requirements.lock anew from pyproject.toml (needs PYTHON to be 3.11)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "error: the lock is made with Python 3.11; choose it with 'make lock PYTHON=python3.11'" >&2; exit 1; }
	rm -rf $(LOCK_VENV)
	$(call make_venv,$(LOCK_VENV))
	$(LOCK_VENV)/bin/python $(PIP_INSTALL) '$(LOCK_TORCH)'
	$(LOCK_VENV)/bin/python $(PIP_INSTALL) -e '.[dev]'
	@set -e; \
	$(LOCK_VENV)/bin/python -m pip freeze --disable-pip-version-check --all --exclude-editable --exclude pip \
		> build/freeze.txt; \
	if grep ' @ ' build/freeze.txt; then echo "error: the lines above have no version to lock" >&2; exit 1; fi; \
	{ echo "# Exact versions for Python 3.11 and newer on Linux. Written by 'make lock'; do not edit."; \
	  sed 's/+[^ ]*$$//' build/freeze.txt | grep -viE '^(nvidia|cuda)-|^triton=='; } > build/requirements.lock; \
	mv build/requirements.lock requirements.lock
	rm -rf $(LOCK_VENV) build/freeze.txt

clean: ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
