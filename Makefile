# `make demo`, `make test` and `make test-all`: each sets itself up in .venv first.
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= recipes/data/wordnet-hypernyms
OUT    ?= runs/demo
EXAMPLES ?= 20000
# A file of tests stays in one process, and its fixtures with it. PARALLEL= runs all in this process, for a debugger.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo synthetic test test-slow test-browser test-all soak fuzz lint docs package
demo: $(INSTALLED)  ## train, evaluate, index and predict on real data, then write $(OUT)/report.html
	$(BIN)/python recipes/demo.py --data $(DATA) --output_dir $(OUT)

synthetic: $(INSTALLED)  ## softmax and decoupled softmax on random texts with one easy positive; runs/synthetic
	$(BIN)/python recipes/synthetic.py easy --output_dir runs/synthetic

test: $(INSTALLED)  ## the tests that take seconds each
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not soak and not browser"

test-slow: $(INSTALLED)  ## the ones that take minutes
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-browser: $(INSTALLED)  ## the page of `hf-xmc serve` and the report, in Chromium
	@command -v chromium > /dev/null || { echo "make test-browser needs Chromium: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest -m browser tests/test_browser.py

soak: $(INSTALLED)  ## 100,000 predictions, a million lines, 1.3 million labels
	$(BIN)/python -m pytest -m soak --timeout 3600

test-all: test test-slow test-browser soak  ## all of them; runs/faults.json then counts what was survived

fuzz: $(INSTALLED)  ## the property tests on fresh random input, EXAMPLES of it for each
	HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/guarantees/test_fuzz.py -m ""

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_xmc

docs: $(VENV)/.docs  ## the documentation, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(INSTALLED)  ## wheel and source archive in dist/; a fresh environment installs the wheel, and trains
	rm -rf dist && $(BIN)/pip install --quiet build twine
	$(BIN)/python -m build --quiet && $(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/fresh
	build/fresh/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && ./fresh/bin/hf-xmc train ../docs/data/books.csv --text title,abstract --labels subjects --separator ';' \
		--output_dir fresh/books && ./fresh/bin/hf-xmc predict fresh/books/model "A handbook of baking" --top_k 1

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
