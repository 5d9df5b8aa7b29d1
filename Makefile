# make demo      prune a real model and look at the result
# make test      the default tests
# make test-all  the default tests, then the slow ones
# make check     lint, types, import rules, house rules, and the site of the documentation
# make audit     list all packages (SBOM), fail if one has a known fault; needs a network
# make numbers   list the results that are older than the code that they measure
# make docs      build the documentation as a site in build/site
# Each sets up .venv by itself. PYTHON names the interpreter to set it up with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PYTEST_OPTIONS ?=
# One process for each processor, with one thread each; the tests of a file stay in one process.
WORKERS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check audit numbers docs setup clean

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard src/secateur/runtime/kernels/csrc/*)
	@echo "Installing into $(VENV): pip takes torch, transformers and others. This takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	touch $(READY)

demo: $(READY)
	$(BIN)/secateur demo

test: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_OPTIONS)

test-all: test
	$(PYTEST) -m slow $(PYTEST_OPTIONS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/house_rules.py
	$(BIN)/python tools/measured_tables.py --check
	$(BIN)/python tools/computed_tables.py --check
	$(BIN)/python tools/part_pages.py --check
	$(BIN)/python tools/choosing_page.py --check
	$(BIN)/python tools/families_page.py --check
	$(BIN)/python tools/bibliography.py --check
	$(BIN)/python tools/explaining_pictures.py --check
	$(BIN)/python tools/build_site.py
	$(BIN)/python tools/audit.py

audit: $(READY)
	$(BIN)/python tools/audit.py --strict

numbers: $(READY)
	$(BIN)/python tools/old_results.py

docs: $(READY)
	$(BIN)/python tools/build_site.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
