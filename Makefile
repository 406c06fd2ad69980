# Every target builds .venv first when it is missing; a fresh clone needs python3, make and a package index.
#   make test ARGS="-k rollout"      ARGS is passed on by demo, test and bench
#   make venv PYTHON=python3.12      another interpreter

PYTHON ?= python3
ARGS ?=
COVERAGE ?=
COVERED := --cov=engine --cov=kernels --cov-report=term --cov-fail-under=85

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist loadscope --durations=15
CHROMIUM := chromium
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help venv demo picture test slow lint types docs fix bench tables clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

# The stamp is written last, so that an installation that broke off is started again.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[dev,bench,distributed,huggingface]'
	@touch $@

venv: $(STAMP) ## build .venv with everything that the tests use

demo: $(STAMP) ## train, unlearn, retrain and compare on the embedded digits
	$(BIN)/lethe demo $(ARGS)

picture: ## docs/assets/report.png: the top of the report of LetheViT by `make demo`, by Chromium (as root: ARGS=--no-sandbox)
	$(CHROMIUM) --headless --disable-gpu --hide-scrollbars --window-size=1100,1370 \
	    --screenshot=docs/assets/report.png $(ARGS) file://$(CURDIR)/runs/demo/lethe/report.html

test: $(STAMP) ## run the tests that are not slow; COVERAGE=1 measures coverage too, in twice the time
	$(PYTEST) $(if $(COVERAGE),$(COVERED)) $(ARGS)

slow: $(STAMP) ## run the slow tests, except those that take minutes
	$(PYTEST) -m "slow and not minutes" $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting; the wording of docstrings, comments and documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/support/prose.py

types: $(STAMP) ## mypy
	$(BIN)/mypy engine kernels bench

docs: $(STAMP) ## the documentation site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

fix: $(STAMP) ## let ruff repair what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the benchmarks; ARGS goes to `python -m bench`
	$(BIN)/python -m bench $(ARGS)

tables: $(STAMP) ## README.md and docs/ from docs/templates/ and bench/results/; ARGS=--check compares
	$(BIN)/python -m bench tables $(ARGS)

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist htmlcov site *.egg-info .coverage .coverage.* .benchmarks
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
