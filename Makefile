# make demo: set-up and the main job on the embedded sample. make check: while working, within a minute. make test: what
# CI runs, all checks. make test-long: what takes minutes too, before a release. make docs: the documentation as HTML in
# docs/_build/html; make docs-links asks every external link (needs the network).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# Tests of functions: seconds in all, and no import that takes long but torch's.
FAST := $(foreach test,core/drawing core/files data/augment data/decoding data/labels data/labels_masks data/sources evaluation/intervals \
  evaluation/feature_pyramid methods/dino methods/geometry methods/gtsa methods/heads methods/ibot methods/losses methods/mae \
  methods/masking methods/teacher training/checkpoint training/optim training/schedules,tests/$(dir $(test))test_$(notdir $(test)).py)

.PHONY: setup demo check test test-long lint format docs docs-links benchmark lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gtsa needs Python 3.11 or later; say which one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing into $(VENV): some 5.6 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(READY)
	@echo "ready. Next: $(BIN)/gtsa --help, make demo, or make test"

demo: setup
	$(BIN)/gtsa pretrain --out runs/demo --overwrite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)

test: lint
	$(PYTEST)

test-long: lint
	$(PYTEST) -m 'long or not long'

docs: setup
	$(BIN)/python -m sphinx -b html -n -W --keep-going docs docs/_build/html

docs-links: setup
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/links

benchmark: setup
	$(BIN)/python benchmarks/step.py --json runs/step.json

lock: setup
	$(BIN)/python tools/lock.py > requirements.lock

clean:
	rm -rf $(VENV) build dist docs/_build src/*.egg-info
