# The commands of this project; `make` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-for-tests demo test lint soak bench clean distclean

BIN := .venv/bin

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: ## install what is missing: distribution packages, and .venv
	@tools/setup.sh

setup-for-tests:
	@tools/setup.sh --tests

demo: setup ## two tenants attest their guests and the host below them (ARGS="--tamper host-kernel")
	@$(BIN)/harness demo $(ARGS)

test: setup-for-tests ## lint, types, unit tests on every Python found, end-to-end tests, coverage (ARGS="-e py311")
	@$(BIN)/python tools/pythons.py tox $(ARGS)

lint: setup ## the quick checks: format, lint, types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

soak: setup-for-tests ## kill the processes of a running lab at random (FOR=600), and see it recover
	@HARNESS_SOAK_S=$(or $(FOR),600) $(BIN)/python tools/pythons.py tox -e soak $(ARGS)

bench: setup ## measure what is promised, beside yardsticks of the same run; about ten minutes (ARGS="--quick")
	@$(BIN)/python -c 'import pymerkle' 2>/dev/null && [ -x $(BIN)/py-spy ] || \
	    $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@tools/keylime.sh || echo "bench: appraisal goes without its yardstick" >&2
	@$(BIN)/harness bench all $(ARGS)

keylime: ## stock Keylime in .keylime: what `harness bench appraise` compares itself with
	@tools/keylime.sh

clean: ## remove what tests and builds left behind; .venv stays
	@rm -rf .tox build dist .coverage .coverage.* coverage.xml .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find harness tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv and .keylime too
	@rm -rf .venv .keylime *.egg-info
