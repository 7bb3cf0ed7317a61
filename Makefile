# Everything runs in the virtual environment .venv, which the first target that needs it makes.
# `make` alone lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHES := engine quality serving kernels lora prefix constrained exactness restart embeddings soak routing failover detection hedging scheduler stack fairness overload ledger
# Two processes for two cores. What imports torch, which takes longer than all of them, runs with the slow ones, and so do
# those that try hundreds of random runs.
UNIT_TORCH := tests/unit/engine tests/unit/bench
UNIT_LONG := $(addprefix tests/unit/scheduler/test_, suspects.py ledger_sequences.py health.py deadlines.py timing.py replicas.py) \
	tests/unit/gateway_http/test_event_encoder.py
UNIT_ONE := $(addprefix tests/unit/, scheduler etcd kernel worker)
UNIT_TWO := $(filter-out $(UNIT_TORCH) $(UNIT_ONE) %__pycache__, $(patsubst %/,%,$(wildcard tests/unit/*/)))
# Side by side: what computes in its own process, and, three files at a time, what mostly waits for others; the slowest of
# these first. Threads that wait must not spin then.
COMPUTING := $(addprefix tests/integration/, engine engine_fast kernels store) $(UNIT_TORCH) \
	tests/e2e/test_default_model.py tests/e2e/test_quality.py tests/faults/test_soak.py
WAITING := tests/e2e/test_torch_streams.py tests/e2e tests/faults tests/integration tests/sim $(UNIT_LONG) tests/architecture
TOGETHER := -n 3 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(COMPUTING))
SEEDS ?= 2000

# The tests start hundreds of processes: none should compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Handed over in the environment, so that quotes in a prompt stay what they are.
export PROMPT

.PHONY: help install run test long unit fairness faults sim sim-mutants lint format protos peers bench

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmos needs Python 3.11 or newer: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). The first time this takes some minutes: torch alone is hundreds of megabytes."
	@$(BIN)/python -m worker.kernels.build & \
	$(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[all,dev]'; \
	status=$$?; wait; exit $$status
	@touch $@

install: $(INSTALLED) ## make the virtual environment

run: $(INSTALLED) ## start a fleet and serve until Ctrl-C; PROMPT="..." asks it, ONCE=1 then stops it
	@$(BIN)/llmos up $(if $(ONCE),--once) $(if $(PROMPT),--prompt "$$PROMPT") $(UP)

test: $(INSTALLED) ## every check and the tests, but for the long ones
	@$(BIN)/python -m tests.e2e.default_model & $(MAKE) --no-print-directory lint unit || exit $$?; wait
	@export OMP_WAIT_POLICY=PASSIVE; $(BIN)/python -m pytest -q -m "not long" $(COMPUTING) & other=$$!; status=0; \
	$(BIN)/python -m pytest -q -m "not long" $(TOGETHER) $(WAITING) || status=$$?; wait $$other || status=$$?; exit $$status

long: $(INSTALLED) ## tests of what rarely breaks and takes minutes
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -m long tests

unit: $(INSTALLED) ## the tests that take milliseconds
	@$(BIN)/python -m pytest -q $(UNIT_ONE) $(addprefix --ignore=,$(UNIT_LONG)) & other=$$!; status=0; \
	$(BIN)/python -m pytest -q $(UNIT_TWO) $(addprefix --ignore=,$(UNIT_LONG)) || status=$$?; wait $$other || status=$$?; exit $$status

fairness: $(INSTALLED) ## the bounds of fair service in 10,000 random runs
	LLMOS_TEST_FAIR_RUNS=10000 $(BIN)/python -m pytest -q tests/unit/scheduler/test_fairness.py -k bounds_hold

FAULTS ?= --write-docs
faults: $(INSTALLED) ## kill, freeze, cut off real processes under load: every scenario, into docs/faults.md; FAULTS="--seeds 150 --json", ...
	$(BIN)/python -m tests.faults $(FAULTS)

sim: $(INSTALLED) ## simulated schedules of faults on virtual time; SEEDS=2000 says how many; SIM=--dense for more faults in each
	$(BIN)/python -m tests.sim --seeds $(SEEDS) $(SIM)

sim-mutants: $(INSTALLED) ## bugs planted on purpose: the simulation must find every one
	$(BIN)/python -m tests.sim --mutants --seeds 300 $(SIM)

lint: $(INSTALLED) ## style, types, import contracts, protocol definitions
	@$(BIN)/mypy & types=$$!; status=0; \
	for check in "ruff check ." "ruff format --check ." lint-imports; do echo "$$check"; $(BIN)/$$check || status=$$?; done; \
	(cd protos && ../$(BIN)/buf lint) || status=$$?; wait $$types || status=$$?; exit $$status

format: $(INSTALLED) ## bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(INSTALLED) ## generate the stubs from protos/
	$(BIN)/python protos/generate.py

peers: $(INSTALLED) ## build what we are compared with: llama.cpp, vLLM (some minutes)
	$(BIN)/python -m bench.peers.make

bench: $(INSTALLED) ## every benchmark, peers included; SAVE=1 appends to bench/results
	@status=0; for name in $(BENCHES); do \
		echo "== bench.$$name"; $(BIN)/python -m bench.$$name $(if $(SAVE),--save) || status=$$?; \
	done; exit $$status
