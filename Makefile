# Every target makes what it needs first; `make setup` is quick when all is there.
PYTHON ?= python3
BIN := .venv/bin
# Most tests wait more than they compute: twice as many workers as a small machine has processors. WORKERS=0: one after
# another.
WORKERS ?= 4
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Else each program that a test starts compiles all that it imports, and each worker all test files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: recordings models help setup setup-demo setup-system demo screenshots test test-fast test-system check lint types docs bench soak world kernels boards clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup:          ## the virtual environment, the Debian packages (as root only) and the MicroPython targets
	@sh tools/setup.sh test

setup-demo:
	@sh tools/setup.sh demo

setup-system:
	@sh tools/setup.sh system

demo: setup-demo  ## a real agent learns this machine, then catches real attacks on loopback
	@$(BIN)/stonechat demo

test: setup     ## all tests: the tools, the agent on CPython and on every MicroPython target
	@$(PYTEST) -m "not system"

test-fast: setup  ## the tests that take no more than some seconds each
	@$(PYTEST) -m "not system and not slow"

test-system: setup-system  ## wheels in clean environments, an installation in a booted Debian, Python 3.12 and 3.13
	@$(PYTEST) -m system tools/tests/test_system_*.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy
	@$(BIN)/pyright -p .pyright-device.json

check: lint types docs test  ## what must be green before a commit leaves

docs: setup     ## the documentation, build/docs/docs/index.html; warnings are errors
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . build/docs

bench: setup    ## the figures of the README, side by side
	@$(BIN)/stonechat bench all

soak: setup     ## the long jobs: fuzzing by the million, power cuts, packet ids across the wrap
	@$(BIN)/stonechat soak

world: setup    ## a fleet of real agents, brokers and collectors under seeded faults, two minutes (MINUTES=60 for an hour)
	@$(BIN)/python -m stonechat_tools.proofs.world --minutes $(or $(MINUTES),2) $(if $(SEED),--seed $(SEED))

kernels: setup  ## the BPF programs on Debian kernels 5.10 to 6.12, amd64, arm64 and armhf, in qemu (slow)
	@$(BIN)/python -m stonechat_tools.proofs.kernels

screenshots: setup  ## every page of the dashboard as a picture: build/screenshots (needs chromium)
	@$(BIN)/python -m stonechat_tools.proofs.screenshots build/screenshots

boards: setup   ## MicroPython built for six emulated boards, and the unit tests and golden vectors on each (slow)
	@$(BIN)/python -m stonechat_tools.proofs.boards.prove

recordings: setup  ## as root: what the reference models are made from, and the list of hashes (an hour and a half)
	@$(BIN)/python firmware_tests/life/record.py recordings/micropython-1
	@$(BIN)/python -m stonechat_tools.proofs.models --record

models: setup   ## the bytes of the reference models again, from the recordings that are here
	@$(BIN)/python -m stonechat_tools.proofs.models

clean:          ## removes what setup made
	rm -rf .venv .venv-cose .targets typings build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
