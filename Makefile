# Each target is enough on a machine that has Python 3.11 or newer, pip and make; .venv is built when it is missing or stale.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: venv demo test check docs clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	@touch $@

demo: venv
	$(BIN)/lightning-lora demo

test: venv
	$(BIN)/python -m pytest -q

check: venv docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf .venv docs/_build
