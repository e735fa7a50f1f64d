# Two commands: `make demo` and `make test`. Each sets itself up in .venv first.
PYTHON ?= python3
VENV   ?= .venv
DATA   ?= recipes/data/wordnet-hypernyms
OUT    ?= runs/demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint
demo: $(INSTALLED)  ## train, evaluate, index and predict on real data, then write $(OUT)/report.html
	$(BIN)/python recipes/demo.py --data $(DATA) --output_dir $(OUT)

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hf_xmc

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
