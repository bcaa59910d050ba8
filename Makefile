# make demo | test | test-fast | test-nightly | lint | docs | clean.
# Each makes the environment it needs in .venv, once per change of pyproject.toml.
PYTHON ?= python3
PYTEST_FLAGS ?=
WORKERS ?= 2
DEMO_FLAGS ?=
BIN := .venv/bin
SOURCES := nnssl nnssl_trainers tests benchmarks docs

# nothing of the caller's nnU-Net is read or written; one thread per process
ISOLATED := env $(patsubst %,-u %,$(filter nnUNet_%,$(.VARIABLES))) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

PYTEST = $(ISOLATED) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
COVERAGE := --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

.PHONY: demo test test-fast test-nightly lint docs clean

demo: .venv/.installed
	$(BIN)/python -m nnssl.demo $(DEMO_FLAGS)

# everything but what takes minutes, with the coverage of nnssl
test: lint
	$(PYTEST) -m "not nightly" $(COVERAGE) $(PYTEST_FLAGS)

# without what starts commands or trains
test-fast: .venv/.installed-dev
	$(PYTEST) -m "not slow and not nightly" $(PYTEST_FLAGS)

test-nightly: .venv/.installed-dev
	$(PYTEST) $(COVERAGE) $(PYTEST_FLAGS)

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

# the site, into site/; links, anchors and generated pages are checked
docs: .venv/.installed-docs
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python docs/generate_compatibility.py
	$(ISOLATED) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@ .venv/.installed

clean:
	rm -rf .venv build dist demo site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
