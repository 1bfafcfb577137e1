# On a fresh machine (Debian, Python 3.10 or later with venv and headers, a C++20 compiler):
#
#   make test              install, build, run the tests         (ISA=avx2 forces one instruction set)
#   make bench             install, build, a short benchmark with table and plot, a short real training
#   make test-isa          the tests in every instruction set of this CPU, or in ISA="generic avx2"
#   make results           the full benchmark: bench/results, the README's tables and plot
#   make cuda-check        compile the CUDA kernels for sm_80, sm_90 and sm_120; registers, spills (needs no GPU)
#   make gpu               on a machine with a GPU: build for it, tests, sanitizer, comparison with cuDNN, with PYTHON's
#                          own torch and no network;  ARGS="--only step|grid --quick" for a short call
#   make format | check    ruff and clang-format over the sources
#   make clean             what was built; make distclean: the environment too
#
# PYTHON   the interpreter of the environment          default: python3
# TORCH    what pip installs as torch                  default: 2.13.0, its CPU build where no GPU is found
# VENV     the environment                             default: .venv
# JOBS     processes that run tests                    default: 2; a good part of the time is compiling, on one core
# ARGS     passed on to pytest, or to bench/run.py
#
# Where pip's own index has only CUDA builds of torch, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels first.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help test test-isa bench results cuda-check gpu format check clean distclean FORCE

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
ISA ?=
JOBS ?= 2
ARGS ?=

TORCH_VERSION := 2.13.0
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
FORCED := $(if $(ISA),SEQKERN_CPU_ISA=$(ISA))
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder  # a file's tests in order, by one process
ALL_ISAS = $$($(PY) -c 'import seqkern, torch; print(torch.ops.seqkern._cpu_isas())')

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, "") } 1' Makefile

# ---- environment and build; a second call finds the stamps and does nothing

# Changes only when another torch is asked for.
$(VENV)/torch.spec: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/installed.stamp: $(VENV)/torch.spec
	@command -v $(PYTHON) > /dev/null || { echo "seqkern: $(PYTHON) was not found; install Python 3.10 or later, or set PYTHON"; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { echo "seqkern: building needs a C++20 compiler, and $${CXX:-c++} was not found; install g++ or set CXX"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "seqkern: building needs Python's headers; install python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet 'setuptools>=70' wheel ninja numpy
	@if [ -n '$(TORCH)' ]; then $(PY) -m pip install '$(TORCH)'; \
	elif command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep -q GPU; then \
	  $(PY) -m pip install torch==$(TORCH_VERSION); \
	else \
	  echo "no GPU found: looking for the CPU build of torch"; \
	  $(PY) -m pip install --quiet torch==$(TORCH_VERSION)+cpu || $(PY) -m pip install torch==$(TORCH_VERSION); \
	fi
	@$(PY) -c 'import torch; print("installed torch", torch.__version__, "for CUDA " + torch.version.cuda if torch.version.cuda else "for the CPU")'
	@touch $@

# g2p-en, aeon, pmdarima: only files in their wheels are used, weights and data of examples; what they depend on is
# heavy, or would download data. Without the last two, tests of the examples are skipped.
$(VENV)/built.stamp: $(VENV)/installed.stamp $(SOURCES)
	$(PY) -m pip install --quiet --no-deps g2p-en
	$(PY) -m pip install --quiet --no-deps --only-binary :all: aeon pmdarima || echo "no data for two of the examples"
	@echo "building seqkern: a minute or more"
	$(PY) -m pip install --quiet --no-build-isolation -e '.[test,bench]'
	@touch $@

$(VENV)/linters.stamp: $(VENV)/installed.stamp .pre-commit-config.yaml
	$(PY) -m pip install --quiet $$(grep -oE '(ruff|clang-format)==[0-9.]+' .pre-commit-config.yaml | sort -u)
	@touch $@

# A toolkit from PyPI where the machine has none: what compiles, without the libraries.
TOOLKIT := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
$(VENV)/toolkit.stamp: $(VENV)/installed.stamp
	@if $(PY) -c 'import sys; sys.path.insert(0, "tests"); import cuda_compile; sys.exit(cuda_compile.find_nvcc() is None)'; \
	then echo "nvcc found"; else $(PY) -m pip install --quiet $(addsuffix ==13.0.*,$(TOOLKIT)); fi
	@touch $@

# ---- what one comes for

test: $(VENV)/built.stamp
	$(FORCED) $(PY) -m pytest tests -q $(SPREAD) $(ARGS)

test-isa: $(VENV)/built.stamp
	@for isa in $(or $(ISA),$(ALL_ISAS)); do \
	  echo "SEQKERN_CPU_ISA=$$isa"; SEQKERN_CPU_ISA=$$isa $(PY) -m pytest tests -q $(SPREAD) $(ARGS); \
	done

bench: $(VENV)/built.stamp
	@rm -f bench/out/quick.jsonl
	$(FORCED) $(PY) bench/run.py --device cpu --quick --json bench/out/quick.jsonl $(ARGS)
	$(PY) bench/report.py bench/out/quick.jsonl
	$(FORCED) $(PY) examples/g2p.py compare --steps 60 --plot bench/out/g2p.png

results: $(VENV)/built.stamp
	$(FORCED) $(PY) bench/run.py --device cpu --peak --memory --json bench/results/cpu.jsonl $(ARGS)
	$(PY) bench/report.py bench/results/cpu.jsonl --readme
	$(FORCED) $(PY) bench/attention.py --json bench/results/attention.jsonl
	$(FORCED) $(PY) bench/decoding.py --json bench/results/decoding.jsonl
	$(FORCED) $(PY) bench/options.py --json bench/results/options.jsonl
	$(FORCED) $(PY) bench/policy.py --json bench/results/policy.jsonl
	$(FORCED) $(PY) bench/neighbours.py --json bench/results/neighbours.jsonl
	$(PY) bench/report.py bench/results --readme

cuda-check: $(VENV)/toolkit.stamp
	$(PY) tests/cuda_compile.py $(ARGS)

gpu:
	$(PYTHON) bench/on_gpu.py $(ARGS)

format: $(VENV)/linters.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

check: $(VENV)/linters.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info seqkern/_C*.so bench/out $(VENV)/built.stamp

distclean: clean
	rm -rf $(VENV)
