# Everything a newcomer and CI need: `make quickstart`, `make test`, `make check`.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint format check soak clean

# Re-installs only when the lock or the project file changes. Modules are compiled as they are first imported.
$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV): about 7 GB, minutes on a fast line."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --require-hashes -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# A small encoder learns from photographs that come with the locked packages, in minutes on two CPU cores.
quickstart: $(INSTALLED)
	$(RUN) tools/make_shards.py sample --out shards/sample
	$(RUN) -m train.run configs/quickstart.yaml

test: $(INSTALLED)
	$(RUN) -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: lint test

# The long tests, minutes each.
soak: $(INSTALLED)
	$(RUN) -m pytest -m slow

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
