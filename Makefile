# make run    the whole pipeline once: environment, install, compile, run, compare with NumPy
# make test   the same environment, then the tests
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
RUN    ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: run test slow lint format generate check-generated clean
.DEFAULT_GOAL := run

run: $(STAMP)
	$(BIN)/pa-compiler run $(RUN)

test: $(STAMP)
	$(PYTEST) -n $(JOBS) $(TESTS)

# The seed's three big cases: 1 GB of cache and several minutes.
slow: $(STAMP)
	$(PYTEST) -m slow $(TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(STAMP)
	$(BIN)/pa-compiler generate

check-generated: $(STAMP)
	$(BIN)/pa-compiler generate --check

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	  echo 'pa_compiler needs Python 3.10, 3.11 or 3.12; "$(PYTHON)" is:' "$$($(PYTHON) --version 2>&1)." \
	       'Name another one: make PYTHON=python3.11' >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null || { \
	  echo "pa_compiler needs a C++ compiler and \"$${CXX:-g++}\" is not there." \
	       'Install one: apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)' >&2; exit 1; }
	@echo 'Installing into $(VENV): about 150 MB the first time.'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@
