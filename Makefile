# Two commands do the work: `make book` and `make test`. `make` alone lists all of them.

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/.ready
CLUSTER_READY := $(VENV)/cluster/.ready
BENCH_VENV := .venv-bench
BENCH_PY := $(BENCH_VENV)/bin/python
BENCH_READY := $(BENCH_VENV)/.ready
SMOKE_SITE := build/smoke/_build/html

COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help env book draft plan test lint unit notebooks smoke check-book cluster cluster-test bench gpu results \
  lock clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## make the environment .venv from the lock; PYTHON=python3.12 chooses a Python

# The stamp is written last: whatever interrupts the recipe, the next call starts it again.
$(READY): requirements.lock pyproject.toml
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  version=`$(PYTHON) --version 2>/dev/null` || { \
	    echo "make env: $(PYTHON) does not run; name one that does: make env PYTHON=/path/to/python" >&2; \
	    exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "make env: $(PYTHON) is $$version; Python 3.11, 3.12 or 3.13 is needed" >&2; \
	    exit 1; }; \
	  echo "Making $(VENV) with $$version"; \
	  $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "Installing the locked packages (several GB and a few minutes the first time)"
	@awk '/^[^ #]/ { own = /^uv==/ } own' requirements.lock > $(VENV)/uv.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
	  -r $(VENV)/uv.txt
	@$(UV) pip sync $(if $(MAKE_TERMERR),,--quiet) --compile-bytecode --python $(PY) \
	  --require-hashes requirements.lock
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $(READY)
	@echo "The environment is ready: $(VENV)"

book: $(READY) ## run the book's notebooks and render it
	@$(PY) workflow/build.py book

draft: $(READY) ## after `make book`: render in seconds, to build/draft, the pages that changed since
	@$(PY) workflow/render.py book --draft

plan: $(READY) ## estimate hours and disk of a grid before it runs: make plan GRID=paper
	@$(PY) workflow/plan.py $(GRID)

test: $(READY) ## lint, unit tests, notebooks as they are, smoke grid, checks of the rendered book
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory notebooks
	@$(MAKE) --no-print-directory smoke
	@$(MAKE) --no-print-directory check-book
	@echo "make test: all passed"

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

unit: $(READY) ## unit tests
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=2 --dist=loadgroup tests --ignore=tests/notebooks --ignore=tests/book --ignore=tests/cluster

notebooks: $(READY) ## run the notebooks at small sizes under nbval, and check their form
	@mkdir -p build
	@cksum notebooks/*.ipynb > build/notebooks.cksum
	OMP_NUM_THREADS=1 PAI_CACHE="$(CURDIR)/build/cache" $(PY) -m pytest --numprocesses=2 --dist=loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 tests/notebooks notebooks
	@cksum notebooks/*.ipynb | cmp -s build/notebooks.cksum - || { \
	  echo "make notebooks: running the notebooks changed them" >&2; exit 1; }
	@echo "The notebooks ran: 0 modified"

smoke: $(READY) ## run the smoke grid and render it to build/smoke
	$(PY) workflow/build.py smoke

check-book: $(READY) ## check the book that `make smoke` rendered, in a browser too if there is one
	PAI_REQUIRE_SITE=1 PAI_SITE=$(SMOKE_SITE) $(PY) -m pytest --confcutdir=tests/book --numprocesses=2 --dist=loadgroup tests/book

bench: $(BENCH_READY) ## measure costs beside other packages; BENCH="--only diagonal" measures less
	$(BENCH_PY) -m pytest --quiet tests/benchmarks
	$(BENCH_PY) -m benchmarks.run $(BENCH)
	$(BENCH_PY) -m benchmarks.throughput
	$(BENCH_PY) -m benchmarks.repairs
	$(BENCH_PY) -m benchmarks.landscape
	$(PY) -m benchmarks.engine

gpu: $(BENCH_READY) ## check and time everything on a GPU; GPU="--device cpu" runs it small without one
	$(BENCH_PY) -m benchmarks.gpu $(GPU)

# An environment of its own: the other packages are for comparison, and nothing else needs them.
$(BENCH_READY): $(READY) requirements-bench.lock
	@$(UV) venv --quiet --clear --python $(PY) $(BENCH_VENV)
	@$(UV) pip sync $(if $(MAKE_TERMERR),,--quiet) --python $(BENCH_PY) --require-hashes requirements-bench.lock
	@$(UV) pip install --quiet --python $(BENCH_PY) --no-deps --no-build-isolation --editable .
	@touch $(BENCH_READY)

# One recipe line a grid, so that a failure stops there and the next call goes on from it.
RUN_GRID = set -x; $(PY) workflow/plan.py $(1) && $(PY) workflow/build.py $(1) --target executed && \
  $(PY) workflow/store.py $(1)
RUN_REAL = if [ -z "$$PAI_DATA_ROOT" ]; then echo "PAI_DATA_ROOT is not set: $(1) is left out"; else $(RUN_GRID); fi

results: $(READY) ## run the larger grids and store their tables in results/; PAI_DATA_ROOT adds real data
	@$(call RUN_GRID,rounds)
	@$(call RUN_GRID,atlas)
	@$(call RUN_GRID,landscape)
	@$(call RUN_REAL,transfer)
	@$(call RUN_REAL,factorial)
	@$(call RUN_REAL,sources)
	@$(call RUN_REAL,adaptation)
	$(PY) workflow/summarise.py

# In a folder of their own: Snakemake imports every engine it finds, which takes seconds a start.
cluster: $(CLUSTER_READY) ## install the engines of clusters, for the profiles slurm and kubernetes

$(CLUSTER_READY): $(READY) requirements-cluster.lock
	@$(UV) pip install --quiet --python $(PY) --target $(VENV)/cluster --no-deps --require-hashes \
	  -r requirements-cluster.lock
	@touch $(CLUSTER_READY)

# What SLURM executes here, `make smoke` finds done: the rules are the same.
cluster-test: $(CLUSTER_READY) ## run the smoke grid on a SLURM of this computer; it takes root, slurm-wlm and munge
	$(PY) -m pytest tests/cluster
	$(PY) workflow/build.py smoke --target executed --profile kubernetes --dry-run --quiet \
	  --container-image example/pai-utils --kubernetes-persistent-volumes checkout:"$(CURDIR)" \
	  --default-storage-prefix "$(CURDIR)"
	PYTHONPATH=workflow $(PY) tests/cluster/slurm_here.py $(PY) workflow/build.py smoke --target executed --profile slurm \
	  --config gpu=0 gpus=0 tflops=0.1 --slurm-no-account --slurm-status-command squeue \
	  --slurm-init-seconds-before-status-checks 5 --seconds-between-status-checks 2 --latency-wait 10

lock: $(READY) ## write the locks again; UPGRADE=--upgrade takes the newest versions
	$(COMPILE) --extra book --extra clip --extra export --extra test $(UPGRADE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra test --extra bench $(UPGRADE) --constraint requirements.lock \
	  --output-file requirements-bench.lock pyproject.toml
	$(COMPILE) --extra book --extra cluster $(UPGRADE) --constraint requirements.lock \
	  `sed -n '/pypy/!s/^\([A-Za-z0-9_.-]*\)==.*/--no-emit-package \1/p' requirements.lock` \
	  --output-file requirements-cluster.lock pyproject.toml

clean: ## remove what the commands made, except environments and results
	rm -rf build _build out notebooks/out book/executed .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
