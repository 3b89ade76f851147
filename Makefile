# make demo   encode and decode a speech clip with the embedded codec
# make test   lint, types and the whole test suite
# make setup  the environment of both, in .venv; another Python: make setup PYTHON=python3.11

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup demo test lint clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

setup: $(VENV)/.full

# The light door, which is all that the demo needs. torch comes first and alone: see constraints.txt.
$(VENV)/.light: pyproject.toml constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.full: $(VENV)/.light
	$(PIP) install -c constraints.txt -e ".[nemo,demo,train,test]"
	touch $@

demo: $(VENV)/.light
	$(VENV)/bin/nemo-lfr demo --out demo_output

lint: $(VENV)/.full
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy nemo_lfr

test: lint
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
