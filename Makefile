# `make` or `make help` says what there is. Only a Python of 3.11 or later is needed; the rest goes into .venv.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell \
	$(p) -c 'import sys, venv, ensurepip; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
VENV := .venv
READY := $(VENV)/installed
RUN := $(VENV)/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint golden bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## train a small model on this machine's CPU
	$(RUN) -m dsv3c.demo $(ARGS)

test: $(READY) ## run every test that needs no GPU (ARGS='-k name' for some)
	$(RUN) -m pytest -q -n auto --dist loadfile -m 'not gpu' $(ARGS)

lint: $(READY) ## check the style (ruff) and the types (mypy)
	$(RUN) -m ruff check .
	$(RUN) -m mypy dsv3c tests

golden: $(READY) ## rewrite what the golden tests expect; read the diff afterwards
	$(RUN) -m pytest -q -m 'not gpu' -k golden --update-golden $(ARGS)

bench: $(READY) ## measure against named peers; appends to benchmarks/results.jsonl
	$(RUN) -m benchmarks $(ARGS)

clean: ## remove the virtual environment and the tools' caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "dsv3c needs Python 3.11 or later with its venv module, and none was found." \
		"Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@
