# `make demo` and `make test` do all their own set-up in .venv (tools/setup.sh); a second run starts at once.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo check test static format clean

PY := .venv/bin/python
# Side by side; tests of one xdist_group one after the other.
PYTEST := $(PY) -m pytest --numprocesses auto --dist loadgroup

help:
	@echo 'make demo     set up .venv, then tune, promote, export and use a model on real data'
	@echo 'make check    set up .venv, then check format, lint, types and layers, and run tests/unit: within a minute'
	@echo 'make test     the same checks, and all tests: 20 to 45 minutes on two cores'
	@echo 'make format   rewrite the code as the format check wants it'
	@echo 'make clean    remove .venv and what builds and tools left'
	@echo 'Options: PYTHON=/path/to/python3.12, HPO_TORCH=cpu|cuda, TESTS="tests/unit/test_data.py -k csv"'

demo:
	@sh tools/setup.sh
	$(PY) -P -m hpo demo

check: static
	$(PYTEST) tests/unit

test: static
	$(PYTEST) $(TESTS)

static:
	@sh tools/setup.sh dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo

format:
	@sh tools/setup.sh dev
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:
	rm -rf .venv build dist hpo.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
