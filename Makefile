# `make study` and `make test` are all there is to know; both make .venv by themselves.
#
#   make study                 the built-in simulated pilot, a few minutes, out/study/report.html
#   make study DATA=cells.h5mu the same on your own file
#   make test                  every check and test, as CI runs them
#   make install               .venv alone
#   make quick                 the fast tests alone
#   make eight                 all models on the real pilots, hours, docs/results/eight.md
#   make bench                 speed and memory beside scvi-tools, hours, docs/results/speed.md

PYTHON ?= python3
DATA   ?= sim-multiome
comma  := ,
# The demonstration takes three sizes, for minutes rather than a quarter of an hour.
ARGS   ?= $(if $(filter study,$(MAKECMDGOALS)),$(if $(filter sim-multiome,$(DATA)),--sizes 100$(comma)300$(comma)800))
OUT    ?= out/$(basename $(notdir $(DATA)))
# Tests at a time; each has one thread.
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
# Where pip finds PyTorch's CPU build, if not in its own configuration, for example
# TORCH_INDEX=<the address of PyTorch's CPU wheels>. The default of PyPI on Linux is a CUDA build.
TORCH_INDEX ?=

.PHONY: install study test quick eight bench lint clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coembed needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(shell grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -c 'import torch; torch.version.cuda and print("note: this PyTorch is a CUDA build; see TORCH_INDEX in the Makefile")'
	touch $@

study: install
	$(BIN)/coembed study $(DATA) -o $(OUT) $(ARGS)

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

quick: install
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

eight: install
	$(BIN)/python benchmarks/eight.py $(ARGS)

bench: install
	$(BIN)/python benchmarks/speed.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache
