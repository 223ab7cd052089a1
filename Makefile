# `make` lists the targets. Every target first builds .venv from requirements.lock, once.

PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PORT ?= 5000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
# Else the tests, and every process that they start, would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help repro test ui server bench lint docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.stamp: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("advml needs Python 3.11 or newer; say: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode -r requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
	@touch $@

repro: .venv/.stamp ## run the study: JOBS stages at a time, SEEDS=3 of each model, only what has changed
	@advml repro --jobs $(JOBS) $(if $(SEEDS),--seeds $(SEEDS))

# worksteal: every worker begins with one stretch of the files, so that what the tests of a module share is made once, not by each worker.
test: .venv/.stamp ## run the tests
	@OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not postgres and not servers and not slurm and not cluster"

ui: .venv/.stamp ## open the MLflow UI on this repository's runs
	@advml ui --port $(PORT)

server: .venv/.stamp ## run an MLflow server for a group, with users and passwords (docs/scaling.md)
	@advml server --port $(PORT)

# Not here, as they compare no speed or take hours: trainings, larger_than_memory, gpu (docs/results.md).
bench: .venv/.stamp ## compare speed with other libraries, side by side
	@for name in augmentation contrastive_step measures pgd similarity step tuning_overhead worst_case; do python benchmarks/$$name.py || exit 1; done

lint: .venv/.stamp ## check style and types
	@ruff check . && ruff format --check . && mypy

docs: .venv/.stamp ## build the site: guides, notebooks with their results, the API's reference
	@python -m sphinx -q -W -b html docs site && echo "open site/index.html"

lock: .venv/.stamp ## resolve requirements.lock anew
	@uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev pyproject.toml -o requirements.lock

clean: ## remove scratch files and caches; results and runs stay
	rm -rf .scratch .pytest_cache .ruff_cache site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
