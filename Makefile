PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Whatever the environment says: each module is compiled once, and not by each of the many processes.
export PYTHONDONTWRITEBYTECODE =

QUICK = equations components units engine recipe norm public types versions cli door docs
QUICK_ONLY = not slow and not served and not thorough
ONE_FAMILY = not test_engine or gpt2

BESIDE = $(patsubst %,tests/test_%.py,selection power_cut endings overview outcomes nulls secrets resume executors families edits every_store store texts field fleet soak hub examples spread sandbox choosing sharing cli documented one_path readers edges)

SCRIPTS = $(patsubst %,selfrepair_nn/explorer/%.js,data parts heads tokens pane)

.PHONY: demo docs notebooks check test lint test-served test-alone test-beside thorough env server bench clean

demo: env            ## set up, then run the main job offline on an embedded model
	$(BIN)/selfrepair run heads --model tiny-neox
	$(BIN)/selfrepair plot outputs/heads-tiny-neox.zarr

docs: env            ## the site, in build/site: nothing in it needs a network; a warning is an error
	$(BIN)/python -m mkdocs build

notebooks: env server ## run the notebooks of examples/ and keep what they show
	$(BIN)/python examples/execute.py

check: env lint      ## in under two minutes: style, types, and the tests that are quick and telling
	$(BIN)/python -m pytest -x -m "$(QUICK_ONLY)" -k "$(ONE_FAMILY)" $(QUICK:%=tests/test_%.py)

lint: env            ## style, types of the package, and the explorer's scripts, which are one on the page
	$(BIN)/ruff check .
	mkdir -p build && cat $(SCRIPTS) > build/explorer.js && $(BIN)/oxlint --no-ignore -c .oxlintrc.json build/explorer.js
	$(BIN)/pyright --pythonpath $(BIN)/python

test: env            ## set up, then style, types and the tests, in three processes side by side
	$(MAKE) -j4 -k -O lint test-served test-alone test-beside

test-served: server  ## those that need a server: they wait more than they compute
	$(BIN)/python -m pytest -m "served and not thorough"

test-alone:          ## the others, in two parts that take about as long
	$(BIN)/python -m pytest -m "not served and not thorough" $(BESIDE:%=--ignore=%)

test-beside:
	$(BIN)/python -m pytest -m "not served and not thorough" $(BESIDE)

thorough: env server ## the further cases of sweeps: every fault, every family, every store, where `make test` has some
	$(BIN)/python -m pytest -m thorough

server: env          ## what a real NDIF server in the tests needs; without it they are skipped, and say so
	-$(BIN)/python -m tests.ndif_server install

bench: env           ## speed and memory against named baselines
	$(BIN)/python -m benchmarks

env: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt tests/requirements-sandbox.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python -r tests/requirements-sandbox.txt
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
