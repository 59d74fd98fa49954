# SPDX-License-Identifier: Apache-2.0
# Needs python3 (>= 3.11), pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?= -q -n auto --dist loadfile
# `make test-hf`: torch on a CPU is enough. TORCH_ARGS takes what pip needs to find such a build.
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
HF_PYTEST_ARGS ?= -q -n auto --dist loadgroup
PODS_PYTEST_ARGS ?= -q -n 2 --dist loadfile

# `make test-pods PODS=` compiles the programs of whole pods too.
PODS ?= not slow_pods
PODS_BIN := .venv-pods/bin
BEAM_BIN := .venv-beam/bin

.PHONY: setup demo test test-hf test-pods test-beam unit lint types format clean
.NOTPARALLEL:

setup: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The stamp makes a second call quick: pip runs again only when the metadata changed.
$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo,dev]'
	@touch $@

demo: setup
	$(BIN)/flexolmo demo --workdir runs/demo $(ARGS)

test: lint types unit

# The same tests whether torch is installed or not.
unit: setup
	@$(BIN)/python -m pytest --ignore=tests/hf --ignore=tests/pods $(PYTEST_ARGS) $(ARGS)

test-hf: $(VENV)/.installed-hf
	@$(BIN)/python -m pytest $(HF_PYTEST_ARGS) tests/hf $(ARGS)

$(VENV)/.installed-hf: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,hf,lm-eval]'
	@touch $@

# The TPU compiler (libtpu, some 700 MB) has an environment of its own: where it is installed,
# every import of jax looks for a TPU. A program is compiled by one thread; a process takes up to
# 5 GB, so there are two, however many cores there are.
test-pods: .venv-pods/.installed
	@$(PODS_BIN)/python -m pytest $(PODS_PYTEST_ARGS) --confcutdir=tests/pods -m '$(PODS)' \
		tests/pods $(ARGS)

.venv-pods/.installed: setup.cfg pyproject.toml
	test -x $(PODS_BIN)/python || $(PYTHON) -m venv .venv-pods
	$(PODS_BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,tpu]'
	@touch $@

# Apache Beam asks for older protobuf and pyarrow than the rest is tested with.
test-beam: .venv-beam/.installed
	@$(BEAM_BIN)/python -m pytest -q tests/test_beam_prepare.py tests/test_corpus_prepare.py \
		tests/test_data_filters.py $(ARGS)

.venv-beam/.installed: setup.cfg pyproject.toml
	test -x $(BEAM_BIN)/python || $(PYTHON) -m venv .venv-beam
	$(BEAM_BIN)/python -m pip install -q --disable-pip-version-check -e '.[beam,language,demo,dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .

format: setup
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .

# PYRIGHT_PYTHON_IGNORE_WARNINGS: a newer checker is no reason for a message.
types: setup
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
