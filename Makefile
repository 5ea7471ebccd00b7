# On a fresh machine with Python 3.11 and pip, `make demo` or `make test` sets up everything. `make help` lists all targets.
PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
DEMO    ?= demo
WORKERS ?= 2
BIN      = $(VENV)/bin
READY    = $(VENV)/.hubert-eff-ready

# the pins also apply to builds of source distributions (the first variable for pip up to 25.2, the second from 25.3 on)
export PIP_CONSTRAINT       = $(CURDIR)/requirements-lock.txt
export PIP_BUILD_CONSTRAINT = $(CURDIR)/requirements-lock.txt

# fairseq's extensions are compiled as quickly as possible: this package uses only those that set their own flags (-O3)
export CFLAGS              ?= -O0 -fwrapv -DNDEBUG

# keep compiled modules: every process of a test or of a step of the demo imports thousands of them
unexport PYTHONDONTWRITEBYTECODE

# the tests' small models gain nothing from threads, which spin when other work shares the cores
test test-long test-core kill-test coverage: export OMP_NUM_THREADS ?= 1

# `make test-core PYTHON=python3.13 TORCH=2.15.0` tests the core alone with other versions, in its own environment (up to 6 GB)
CORE      ?= .venv-core
CORE_TESTS = checkpoints edge encoders exporting layers models optim profiling quant streaming

.PHONY: help env demo test test-long test-core kill-test coverage bench-compare lint format docs clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

env: $(READY)  ## set up .venv with the tested versions

# fairseq-fixed and s3prl are source distributions that would install the newest torch to build themselves, so they are built
# without isolation, with the pinned torch. fairseq's extensions take minutes, and the rest is installed at the same time
$(READY): pyproject.toml requirements-lock.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 needed; this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile setuptools wheel Cython numpy torch
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheels fairseq-fixed & building=$$!; \
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable '.[superb,plot,onnx,dev]'; wait $$building
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --find-links $(VENV)/wheels --editable '.[all,dev,docs]'
	touch $@

# corpus, labels, pre-training, second labels, keyword spotting, profile; finished steps are kept, so that it resumes
demo: $(READY)  ## run every step on generated speech, into demo/
	$(BIN)/hubert-eff demo --out $(DEMO)

test: $(READY)  ## run the everyday tests
	$(BIN)/python -m pytest -m "not long" -q -n $(WORKERS) --dist loadfile

test-long: $(READY)  ## run the tests of whole runs (minutes each)
	$(BIN)/python -m pytest -m long -q -n $(WORKERS) --dist worksteal

coverage: $(READY)  ## run the everyday tests and report the share of lines that they run, by file
	$(BIN)/python -m pytest -m "not long" -q -n $(WORKERS) --dist loadfile --cov --cov-report=term:skip-covered

# builds the sdist and the wheel, then runs the tests that need nothing else, outside the checkout and without the pins
test-core:  ## test the core alone with other versions: PYTHON=python3.13 TORCH=2.15.0
	rm -rf $(CORE)
	$(PYTHON) -m venv $(CORE)
	cd $(CORE) && unset PIP_CONSTRAINT PIP_BUILD_CONSTRAINT && \
	bin/python -m pip install --quiet --no-compile build pytest torch$(if $(TORCH),==$(TORCH)) && \
	bin/python -m build --outdir dist $(CURDIR) > build.log && \
	bin/python -m pip install --quiet --no-compile dist/*.whl && \
	mkdir outside && cp -r $(CURDIR)/tests $(CURDIR)/benchmarks outside && cd outside && \
	printf '[pytest]\nmarkers = long: minutes\n' > pytest.ini && \
	../bin/python -c 'import hubert_eff, sys, torch; print(sys.version.split()[0], "torch", torch.__version__, hubert_eff.__file__)' && \
	../bin/python -m pytest -m "not long" -q $(CORE_TESTS:%=tests/%)

# nothing that was saved may be lost
kill-test: $(READY)  ## kill training and label making at random moments
	$(BIN)/python benchmarks/reliability/kill_training.py --kills 30
	$(BIN)/python benchmarks/reliability/kill_labels.py --kills 30

bench-compare: $(READY)  ## compare two kept results: OLD=one_bit (its last two), or OLD=FILE.jsonl NEW=FILE.jsonl
	$(BIN)/python benchmarks/records.py compare $(OLD) $(NEW)

lint: $(READY)  ## run ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(READY)  ## format the code with ruff
	$(BIN)/ruff format .

docs: export NO_MKDOCS_2_WARNING ?= 1
docs: $(READY)  ## build the documentation into site/, strictly
	$(BIN)/python -m mkdocs build --strict --quiet

clean:  ## remove .venv, demo/, site/ and build folders
	rm -rf $(VENV) $(CORE) $(DEMO) site build .coverage* *.egg-info
