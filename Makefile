# For newcomers and CI: `make quickstart`, `make test`, `make check`.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart study arena reference fashion test lint format check soak docker-check lock clean

# Reinstalls only when the lock or the project file changes. Python compiles a module at its first import: compiling all 7 GB now would take
# a minute longer than any command needs.
$(INSTALLED): requirements-dev.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing into $(VENV): about 7 GB, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --require-hashes -r requirements-dev.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

install: $(INSTALLED)

# Train a small encoder on photographs that ship with the locked packages: minutes on two CPU cores.
quickstart: $(INSTALLED)
	$(RUN) tools/make_shards.py sample --out shards/sample
	$(RUN) -m train.run configs/quickstart.yaml

# Compare crops, strategies, levels and loss terms: tables and plots in results/, about an hour on one CPU core. A stopped study
# continues, and a finished one only rewrites its tables; move its files away to start over.
# The four files of Fashion-MNIST come from Debian's package dataset-fashion-mnist, or from FASHION=FOLDER.
FASHION ?= /usr/share/datasets/fashion-mnist
BUDGET ?= 40
study: fashion
	test -d shards/sample/val || $(RUN) tools/make_shards.py sample --out shards/sample
	OMP_NUM_THREADS=1 nice $(RUN) tools/study.py configs/study_fashion_mnist.yaml --budget $(BUDGET)
	OMP_NUM_THREADS=1 nice $(RUN) tools/study.py configs/quickstart.yaml --budget $(BUDGET)

# Compare this method with LeJEPA, I-JEPA, DINO and supervised training at equal CPU time: over an hour on one core. Continues like the study.
ARENA_BUDGET ?= 150
ARENA := lejepa,2+0,one level,ijepa,dino,supervised
arena: fashion
	$(RUN) -c 'import lightly' 2>/dev/null || $(VENV)/bin/pip install --quiet --no-compile --no-build-isolation -e '.[arena]'
	OMP_NUM_THREADS=1 nice $(RUN) tools/study.py configs/study_fashion_mnist.yaml --variants '$(ARENA)' --budget $(ARENA_BUDGET) --points 3 --equal time

# Train on Fashion-MNIST, evaluate on all images, and export the encoder for timm: 57 minutes on two cores.
REFERENCE := reference_fashion_mnist
reference: fashion
	$(RUN) -m train.run configs/$(REFERENCE).yaml
	$(RUN) -m train.evaluate runs/$(REFERENCE) --probe knn linear --max-samples 60000 --json runs/$(REFERENCE)/evaluation.json
	$(RUN) tools/export.py runs/$(REFERENCE) --out runs/$(REFERENCE)/exported --license apache-2.0 --figures runs/$(REFERENCE)/evaluation.json
	cp runs/$(REFERENCE)/exported/README.md results/$(REFERENCE)/

fashion: $(INSTALLED)
	@test -d shards/fashion_mnist/val -o -d $(FASHION) || { echo "make: no $(FASHION): apt-get install dataset-fashion-mnist, or name a folder: FASHION=FOLDER" >&2; exit 1; }
	test -d shards/fashion_mnist/train || $(RUN) tools/make_shards.py convert $(FASHION) --out shards/fashion_mnist --split train
	test -d shards/fashion_mnist/val || $(RUN) tools/make_shards.py convert $(FASHION) --out shards/fashion_mnist --split val

# One process per core, up to four: most tests use one thread, and each process takes about 2 GB. A worker that dies ends the run, because
# pytest-xdist would start another and then, with `loadfile`, wait forever. Files run in the order that tests/conftest.py sets: longest first.
# Bytecode is written even where the environment forbids it: the tests start many processes, and each would compile torch and timm again.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --max-worker-restart 0 \
		--dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: lint test

# The long tests, minutes each, and the image.
soak: $(INSTALLED) docker-check
	$(RUN) -m pytest -m slow -o faulthandler_timeout=7200

# Build the image on a base made for it, and test it as its user: needs root, buildah, mmdebstrap and 15 GB under TMPDIR.
docker-check:
	docker/check

# Two locks with the same versions: the packages of the image, and those plus the development tools. Needs uv.
LOCK := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --extra cuda120 --extra sample --extra s3
lock:
	$(LOCK) pyproject.toml -o requirements.lock
	$(LOCK) --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
