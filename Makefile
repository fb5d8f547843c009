# One concern a target; every target works on a machine that has only python3 (3.11 or newer) and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# The order of a file's tests is kept as far as the workers stay busy, so that a file's trained models serve all its tests.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --dist worksteal

.PHONY: install install-test quickstart test test-slow test-all lint bench release-check audit site clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: re-installed when the metadata or the pins change, not on every call.
$(VENV)/.installed: $(BIN)/python pyproject.toml setup.py constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[quickstart]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

install-test: $(VENV)/.installed-dev

quickstart: install
	$(BIN)/onerec-hf quickstart --output_dir runs/quickstart --overwrite

# Every behaviour, in less than ten minutes on two cores.
test: install-test
	$(PYTEST) -m "not slow"

# What `test` leaves out: the same behaviours at full size, on several ranks, in processes and in every document.
test-slow: install-test
	$(PYTEST) -m slow

test-all: install-test
	$(PYTEST)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install-test
	for script in $$(grep -l 'parser(__doc__)' benchmarks/*/*.py); do $(BIN)/python $$script --quick || exit 1; done

# What a release does, up to the upload (RELEASE.md).
release-check:
	$(PYTHON) .ci/release.py

# Known vulnerabilities of the installed packages; queries PyPI, so it needs a network.
audit: install-test
	$(PIP) install -q pip-audit
	$(BIN)/pip-audit

site: install-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info runs
