# What most people need; `make help` lists it. Each target builds .venv first if it is missing or out of date.
#
#   make pretrain ARGS="train.steps=50"      arguments for the recipe
#   make pretrain NPROC=2                    processes, one a GPU or a share of the cores
#   make test PYTHON=python3.12              the interpreter that .venv is built with

PYTHON ?= python3
NPROC  ?= 1
ARGS   ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALLED := $(VENV)/.ready
READY  := $(VENV)/.native
NATIVE := kernels/native

# GOMP_SPINCOUNT: idle OpenMP threads go to sleep, instead of fighting whatever else runs on the machine.
# UV_FIND_LINKS: uv does not read pip's settings.
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)
export PYTHONUNBUFFERED ?= 1
export GOMP_SPINCOUNT ?= 5000
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

# Several processes share the cores; torchrun prints a warning unless it is told how.
ifneq ($(NPROC),1)
ifndef OMP_NUM_THREADS
export OMP_NUM_THREADS := $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); \
    t=$$(expr $$n / "$(NPROC)" 2>/dev/null); [ "$${t:-0}" -ge 1 ] && echo $$t || echo 1)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup native pretrain sft grpo generate ablate test test-all sanitize nightly lint types clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo 'Variables: ARGS="key=value ..."  NPROC=processes  PYTHON=interpreter  VENV=folder'

setup: $(READY) ## build .venv with the tested versions (constraints.txt)
	@$(BIN)/python -m moe.kernels.native

native: $(INSTALLED) ## compile the CPU kernels again, and say what goes wrong
	$(BIN)/python $(NATIVE)/build.py
	@touch $(READY)

pretrain: $(READY) ## train the tiny default here: minutes on two cores, no account, no further download
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) recipes/pretrain.py $(ARGS)

sft: $(READY) ## fine-tune: tiny-rl learns to sort digits from 300 demonstrations
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) recipes/sft.py $(ARGS)

grpo: $(READY) ## reinforcement learning: a gated cold start, then GRPO on sorting
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) recipes/grpo.py $(ARGS)

generate: $(READY) ## text out of a model: ARGS='run=runs/... prompt="..."'
	$(BIN)/python recipes/generate.py $(ARGS)

ablate: $(READY) ## a study with seeds, a table and pictures: ARGS="config=recipes/ablations/balance.yaml"
	$(BIN)/python recipes/ablate.py $(or $(ARGS),config=recipes/ablations/balance.yaml)

test: $(READY) ## the tests of a working day
	$(BIN)/python -m pytest -q $(ARGS)

test-all: $(READY) ## every test, slow ones too
	$(BIN)/python -m pytest -q -m "" $(ARGS)

# LD_PRELOAD: Python knows nothing of the sanitizer, whose runtime has to come before everything else.
SANITIZED := $(CURDIR)/build/sanitize/libmoe_native.so
sanitize: $(READY) ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Linux)
	CXX=g++ $(BIN)/python $(NATIVE)/build.py --sanitize --out $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	    MOE_NATIVE_LIBRARY=$(SANITIZED) $(BIN)/python -m pytest -q --capture=sys tests/kernels/native \
	    --ignore tests/kernels/native/test_build.py $(ARGS)

nightly: $(READY) ## the kernels again: compiled by the oldest Triton allowed, and broken one way at a time
	$(PYTHON) -m pip install -q --no-deps --upgrade --target $(VENV)/triton-3.6 triton==3.6.0
	PYTHONPATH=$(VENV)/triton-3.6:. $(BIN)/python tools/compile_kernels.py
	$(BIN)/python tools/mutate_kernels.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy moe

types: $(READY) ## mypy alone
	$(BIN)/mypy moe

clean: ## remove caches and build leftovers; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find moe kernels recipes tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An interrupted installation leaves no .ready and is taken up again. Distributions that split ensurepip from Python
# still have pip's --python. uv takes a third of pip's time; pip is the way out where uv cannot reach what pip can.
$(INSTALLED): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "$(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), this needs 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	    echo "$(PYTHON) has neither its venv module nor pip; on Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@echo "first run: installing into $(VENV), about 2.4 GB of disk with CPU torch (7 GB with CUDA), 2 GB of memory free,"
	@echo "1-3 minutes on a good line (3 GB to fetch with CUDA); quiet until done, and only once"
	$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) || { \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install -q uv && \
	    $(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -e '.[test]' -c constraints.txt || \
	    $(BIN)/python -m pip install -e '.[test]' -c constraints.txt
	@touch $@

# Installing compiles them as well, unseen. Without a compiler there is one line here, and PyTorch does their work.
$(READY): $(INSTALLED) $(wildcard $(NATIVE)/*.cpp $(NATIVE)/*.h) $(NATIVE)/build.py
	@$(BIN)/python $(NATIVE)/build.py --stale || true
	@touch $@
