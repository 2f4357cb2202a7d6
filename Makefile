# make demo | test | test-all | check | clean.  Each makes its own virtual environment first, when that is missing or out of date.
# Variables: PYTHON (3.11 or newer) makes the environment, VENV is where it lies, WORKERS is how many processes run the tests.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

python := $(VENV)/bin/python
# mypy resolves `retract.*` by folder names, and `retract` has no folder: links give it one (see CONTRIBUTING.md).
typing := build/typing/retract
pytest := $(python) -m pytest -q -n $(WORKERS) --dist loadscope

.PHONY: demo test test-all check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.bench
	@$(VENV)/bin/retract demo

test: $(VENV)/.dev
	@$(pytest) -m "not slow and not data"

test-all: $(VENV)/.dev
	@$(pytest)

check: $(VENV)/.dev $(typing)
	@$(python) -m ruff check --quiet .
	@$(python) -m ruff format --check --quiet . || { echo "ruff: some files are not formatted: run 'make format'"; exit 1; }
	@$(python) -m mypy
	@$(python) -m pytest -q tests/test_docs.py

format: $(VENV)/.dev
	@$(python) -m ruff check --fix --quiet .
	@$(python) -m ruff format --quiet .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# .venv/.bench holds what `retract` needs to run its experiments, .venv/.dev also the tools that test and check it.
$(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit(f"retract needs Python 3.11 or newer, $(PYTHON) is {v}: name another by make PYTHON=...")'
	@$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing retract[$*] into $(VENV) (torch is large: minutes at first, seconds later)"
	@$(python) -m pip install --quiet --disable-pip-version-check --editable '.[$*]' --constraint constraints.txt
	@touch $@

$(typing): Makefile
	@rm -rf $@ && mkdir -p $@
	@for package in manifolds optim nets benchmarks; do ln -s "$(CURDIR)/$$package" "$@/$$package"; done
