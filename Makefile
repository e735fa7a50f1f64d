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

.PHONY: demo synthetic test test-slow test-all soak fuzz lint
demo: $(INSTALLED)  ## train, evaluate, index and predict on real data, then write $(OUT)/report.html
	$(BIN)/python recipes/demo.py --data $(DATA) --output_dir $(OUT)

synthetic: $(INSTALLED)  ## softmax and decoupled softmax on random texts with one easy positive; runs/synthetic
	$(BIN)/python recipes/synthetic.py easy --output_dir runs/synthetic

test: $(INSTALLED)  ## the tests that take seconds each
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not soak"

test-slow: $(INSTALLED)  ## the ones that take minutes
	$(BIN)/python -m pytest $(PARALLEL) -m slow

soak: $(INSTALLED)  ## 100,000 predictions, a million lines, 1.3 million labels
	$(BIN)/python -m pytest -m soak --timeout 3600

test-all: test test-slow soak  ## all of them; runs/faults.json then counts what was survived

fuzz: $(INSTALLED)  ## the property tests on fresh random input, EXAMPLES of it for each
	HYPOTHESIS_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py -m ""

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_xmc

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
