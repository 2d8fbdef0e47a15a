# make demo: set-up and the main job on the embedded sample. make check: while working, within a minute. make test: what
# CI runs, all checks. make test-long: what takes minutes too, before a release. make docs: the documentation as HTML in
# docs/_build/html; make docs-links asks every external link (needs the network). make bench: the benchmarks, small.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# Tests of functions: seconds in all, and no import that takes long but torch's.
FAST := $(foreach test,core/drawing core/files data/augment data/decoding data/labels data/labels_masks data/sources data/tar_index evaluation/intervals \
  evaluation/feature_pyramid methods/dino methods/geometry methods/gtsa methods/heads methods/ibot methods/losses methods/mae \
  methods/masking methods/sinkhorn methods/teacher training/checkpoint training/optim training/schedules,tests/$(dir $(test))test_$(notdir $(test)).py)

.PHONY: setup demo check test test-long lint format docs docs-links bench lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gtsa needs Python 3.11 or later; say which one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing into $(VENV): some 7 GB on disk, a few minutes"
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

# All benchmarks at small sizes, within ten minutes on two cores; results in runs/bench. benchmarks/ has the full sizes.
BENCH := step end_to_end scaling loader scan start evaluate
BENCH_step := --model vit_tiny_patch16_224 --batch 2 --repeats 3 --precision 32 --reference
BENCH_end_to_end := --batch 2 --steps 6 --repeats 2
BENCH_scaling := --repeats 2 --steps 8
BENCH_start := --repeats 1
BENCH_evaluate := --images 32 --sizes 10000 100000
BENCH_loader := --images 12 --repeats 3
BENCH_scan := --images 1000 10000

bench: setup
	@mkdir -p runs/bench
	@$(foreach name,$(BENCH),if [ -f benchmarks/$(name).py ]; then echo "== $(name)"; \
	  $(BIN)/python benchmarks/$(name).py $(BENCH_$(name)) --json runs/bench/$(name).json || exit 1; fi;)

lock: setup
	$(BIN)/python tools/lock.py > requirements.lock

clean:
	rm -rf $(VENV) build dist docs/_build src/*.egg-info
