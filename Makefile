# Every target works as the first command after a clone; only Python >= 3.11 is needed.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# One test process per core, at most four, as each needs up to 1 GB and one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help demo test test-slow fuzz check audit bench clean

help:
	@echo "make demo       install into .venv and train the quickstart (minutes on a laptop CPU)"
	@echo "make test       install with the test tools; ruff, mypy, pytest"
	@echo "make test-slow  the slow tests"
	@echo "make fuzz       property tests with 20 times as many new examples, 5000 damaged files of each format"
	@echo "                (about two hours); SEED=N repeats them"
	@echo "make audit      known vulnerabilities of the pinned packages (pip-audit)"
	@echo "make bench      compare speed and memory with other projects (at most about 30 minutes; see docs/benchmarks.md)"
	@echo "make clean      remove .venv and the caches; keep runs/ and data/"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("restomod needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv

.venv/installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time) ..."
	@$(PIP) -e .
	@touch $@

.venv/installed-test: .venv/installed
	@$(PIP) -e '.[test,sweep,track]'
	@touch $@

.venv/installed-test-slow: .venv/installed-test
	@$(PIP) -e '.[test,ray,sweep,track,lm-eval,browser]'
	@touch $@

# A second demo gets another folder: quickstart, quickstart-2, ...
demo: .venv/installed
	@run=runs/quickstart; n=1; while [ -e $$run ]; do n=$$((n + 1)); run=runs/quickstart-$$n; done; \
	$(BIN)/restomod train quickstart --out $$run

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# RESTOMOD_SMOKE=cpu runs tests/cuda on the CPU if there is no GPU.
test: check
	RESTOMOD_SMOKE=cpu $(PYTEST)

test-slow: .venv/installed-test-slow
	$(PYTEST) -m slow

# pip-audit has its own environment, so that it does not check itself.
audit: $(BIN)/python
	@$(PYTHON) -m venv .venv/audit
	@-.venv/audit/bin/python -m pip install --disable-pip-version-check -q pip-audit==2.10.1
	@$(BIN)/python -m tests.audit .venv/audit/bin/pip-audit

# `make test` repeats the same examples. A failure of `make fuzz` prints the SEED that repeats it.
SEED ?= $(shell $(PYTHON) -c 'import random; print(random.randrange(10**9))')
fuzz: SEED := $(SEED)
fuzz: .venv/installed-test-slow
	@echo "examples drawn with SEED=$(SEED)"
	@$(PYTEST) -m hypothesis --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) --timeout 3600 $(ARGS) \
		|| { echo "the same examples again: make fuzz SEED=$(SEED); one test: add ARGS=tests/FILE::TEST"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed $(SEED) --mutations 5000

# make bench PEERS="--peer nanogpt=../nanoGPT" DATA=folder OUT=benchmarks/results, then python -m benchmarks.readme
OUT ?= benchmarks/results/mine
bench: .venv/installed-test
	$(BIN)/python -m benchmarks.run --out $(OUT) $(if $(DATA),--data $(DATA)) $(PEERS) $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
