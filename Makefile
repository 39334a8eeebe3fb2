# Every target makes the environment it needs in .venv and reuses it; `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(VENV)/.installed-torch
STAMP  := $(VENV)/.installed
SERVE  := $(VENV)/.installed-serve
DEV    := $(VENV)/.installed-dev
RUN    ?= runs/$(RECIPE)/latest
RECIPE ?= sentiment

.DEFAULT_GOAL := help
.PHONY: help train tune check resume evaluate predict merge export pipeline serve test test-fast faults lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'make train RECIPE=sentiment SET="training.num_train_epochs=2 base.model=Qwen/Qwen3-0.6B"'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first: where its index has a CPU build of the pinned version that is taken, and nothing later replaces it.
$(TORCH): constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@touch $@

$(STAMP): pyproject.toml constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(SERVE): pyproject.toml constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve]'
	@touch $(STAMP) $@

$(DEV): pyproject.toml constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP) $(SERVE) $@

train: $(STAMP)  ## train RECIPE (default sentiment) with overrides SET, measured before and after
	$(BIN)/ift train $(RECIPE) $(SET)

tune: $(STAMP)  ## search the settings of RECIPE, e.g. SET="evaluation.target.accuracy=0.7 --minutes 60"
	$(BIN)/ift tune $(RECIPE) $(SET)

check: $(STAMP)  ## look for faults in the rows of RECIPE, without training
	$(BIN)/ift check $(RECIPE) $(SET)

resume: $(STAMP)  ## go on with an interrupted RUN
	$(BIN)/ift train --resume $(RUN)

evaluate: $(STAMP)  ## measure RUN again
	$(BIN)/ift evaluate $(RUN)

predict: $(STAMP)  ## answer TEXT with RUN
	$(BIN)/ift predict $(RUN) $(if $(TEXT),"$(TEXT)")

merge: $(STAMP)  ## merge RUN's adapter into its base
	$(BIN)/ift merge $(RUN)

export: $(STAMP)  ## write RUN for other software: TO=peft|merged|gguf|gguf-adapter|ollama|vllm
	$(BIN)/ift export $(RUN) --to $(or $(TO),peft)

pipeline: $(STAMP)  ## take TEXT through the stages of RUN, e.g. RECIPE=article
	$(BIN)/ift pipeline $(RUN) $(if $(TEXT),"$(TEXT)")

serve: $(SERVE)  ## the OpenAI API and a dashboard on this machine, e.g. SET="--port 8000 --data-dir service"
	$(BIN)/ift serve $(SET)

test: $(DEV)  ## run all tests
	$(BIN)/python -m pytest -n 2

test-fast: $(DEV)  ## run the tests that take a minute in all
	$(BIN)/python -m pytest -n 2 -m "not slow"

faults: $(DEV)  ## everything that can go wrong: kills, full disks, broken and hostile files; writes docs/faults.md
	$(BIN)/python -m pytest -n 2 tests/faults --all-faults --fault-table docs/faults.md

lint: $(DEV)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
