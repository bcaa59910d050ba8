# make demo | test | lint | clean. Each makes the environment it needs in .venv, once per change of pyproject.toml.
PYTHON ?= python3
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BIN := .venv/bin
SOURCES := nnssl nnssl_trainers tests benchmarks docs

# nothing of the caller's nnU-Net is read or written; one thread per process
ISOLATED := env $(patsubst %,-u %,$(filter nnUNet_%,$(.VARIABLES))) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/python -m nnssl.demo $(DEMO_FLAGS)

test: lint
	$(ISOLATED) $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/bin/python:
	$(PYTHON) -m venv .venv

# everything in one pip command, so that torch and torchvision are resolved together
.venv/.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e .
	touch $@

.venv/.installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@ .venv/.installed

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
