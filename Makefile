# Every target makes what it needs in .venv first; only Python 3.11 or newer and make must be there.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
UV := .venv/lock/bin/uv
PYTEST := $(BIN)/python -m pytest --numprocesses=4 --dist=loadfile --no-loadscope-reorder
TIMES := 20
CODE := bulwark_pytest.py db jobs worker tests alembic

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test chaos fuzz test-containers smoke bench check format lock clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Show a job survive crashes, on an own PostgreSQL and Valkey.
	@$(BIN)/bulwark demo

test: $(STAMP) ## Run every test, four files at a time, each on an own PostgreSQL and Valkey.
	@$(PYTEST)

chaos: $(STAMP) ## Provoke every fault and print what it has cost; CHAOS_SEED=... repeats a storm.
	@$(PYTEST) --numprocesses=2 -m "" --faults $(OPTIONS) tests/chaos

test-containers: $(STAMP) ## Run the tests that need servers on containers.
	@BULWARK_TEST_SERVERS=containers $(PYTEST) $(OPTIONS) tests/acceptance tests/chaos tests/integration

fuzz: $(STAMP) ## Try TIMES=20 times as many made-up inputs as make test does, from a random SEED that is printed.
	@seed=$${SEED:-$$($(BIN)/python -c 'import secrets; print(secrets.randbits(32))')}; \
	echo "seed: make fuzz SEED=$$seed TIMES=$(TIMES)"; \
	FUZZ_TIMES=$(TIMES) $(PYTEST) --hypothesis-seed=$$seed tests/fuzz

smoke: $(STAMP) ## Build the image, run the compose stack, and let its containers crash.
	@$(BIN)/python -m pytest tests/compose

bench: $(STAMP) ## Measure side by side with psql and stock arq; ONLY="insert" for one measure.
	@$(BIN)/python -m tests.benchmarks $(ONLY) $(OPTIONS)

check: $(STAMP) ## Check style, types and the direction of imports.
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## Bring the code into the style that check wants.
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

lock: $(STAMP) ## Choose the dependencies' versions anew and write requirements.txt.
	@test -x $(UV) || { $(PYTHON) -m venv .venv/lock \
		&& .venv/lock/bin/python -m pip --quiet --quiet --disable-pip-version-check install uv; }
	@$(UV) pip compile pyproject.toml --upgrade --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-config --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file requirements.txt
	@$(UV) pip compile pyproject.toml --constraint requirements.txt --universal --python-version 3.11 --generate-hashes \
		--no-config --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file requirements-image.txt

clean: ## Remove everything that the other targets have made.
	@rm -rf .bench .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so that an interrupted installation starts from nothing.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Bulwark needs Python 3.11 or newer: name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing dependencies (once)"
	@test -f $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@$(PIP) install --require-hashes -r requirements.txt
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@
