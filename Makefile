# Every target works inside the checkout alone; `make verify` and `make test` set up first.
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup verify test test-all notebooks check clean help

help:
	@echo "make setup    prepare .venv"
	@echo "make verify   derive and verify the catalogue, then recall real data with its filters"
	@echo "make test     run the test suite"
	@echo "make test-all the suite and the tests that repeat a claim on more of the catalogue"
	@echo "make notebooks  build the notebooks, run them, and render them"
	@echo "make check    lint, formatting, types, import directions"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@python=$$(bash find-python.sh) && \
	echo "using $$python" && \
	{ [ -x $(BIN)/python ] && $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	  || "$$python" -m venv --clear .venv; } && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[test]' && \
	touch $@

verify: setup
	@$(BIN)/mbd verify
	@$(BIN)/mbd recall

test: setup
	@$(BIN)/python -m pytest -n auto --dist loadgroup --quiet

test-all: setup
	@$(BIN)/python -m pytest -n auto --dist loadgroup --quiet -m ""

notebooks: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[notebooks]'
	@$(BIN)/python -m notebooks.build

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info notebooks/*.ipynb .pytest_cache .ruff_cache .hypothesis
