# make demo   encode and decode a speech clip with the bundled codec
# make check  lint, types and the fast tests, without NeMo: while you work
# make test   lint, types and the whole test suite: before you push
# make setup  create .venv for both; another Python: make setup PYTHON=python3.11
# make docs   build the documentation site in site/
# make lock   update locks/ to the newest versions; needs uv

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup demo check fast test lint docs lock clean
.DELETE_ON_ERROR:

setup: $(VENV)/.full

# Environment of the demo. Its lock files pin the version and hashes of every package except torch. constraints.txt
# limits the version of torch.
# Packages without a wheel are built with the pinned build tools of locks/build.txt, without build isolation.
$(VENV)/.light: pyproject.toml constraints.txt locks/build.txt locks/demo.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r locks/build.txt
	$(PIP) install --require-hashes --use-pep517 --no-build-isolation -r locks/demo.txt
	$(PIP) install -c constraints.txt torch
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.full: $(VENV)/.light locks/test.txt
	$(PIP) install -c constraints.txt -c locks/test.txt -e ".[nemo,demo,train,test]"
	touch $@

demo: $(VENV)/.light
	$(VENV)/bin/nemo-lfr demo --out demo_output

lint: $(VENV)/.full
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m codespell_lib
	$(VENV)/bin/python -m mypy nemo_lfr

# Tests start many processes. If Python did not write bytecode, each of them would compile all modules.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.full
	$(MAKE) --no-print-directory -j 2 lint fast

fast: $(VENV)/.full
	$(PYTEST) --hypothesis-profile=dev -m "not slow and not nemo"

test: lint
	$(PYTEST)

docs: $(VENV)/.light
	$(PIP) install -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Newest versions that pyproject.toml and constraints.txt allow.
COMPILE := uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-emit-package torch \
	--custom-compile-command "make lock" -c constraints.txt
lock:
	$(COMPILE) --upgrade pyproject.toml --extra nemo --extra demo --extra train --extra test -o locks/test.txt
	$(COMPILE) --upgrade --generate-hashes -c locks/test.txt pyproject.toml locks/build.in --extra demo -o locks/demo.txt
	$(COMPILE) --upgrade --generate-hashes -c locks/demo.txt locks/build.in -o locks/build.txt

clean:
	rm -rf $(VENV) build dist site demo_output .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
