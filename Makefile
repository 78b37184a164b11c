PYTHON ?= python3
BIN := .venv/bin
MODEL ?= torchvision:resnet50
TARGET ?= graviton3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-x86 test-arm64 bench-arm64 arm64 lint coverage clean

help:  ## what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(BIN)/.ready-dev: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(BIN)/.ready  ## install into .venv and optimize ResNet-50 for Graviton3
	rm -rf build/demo && mkdir -p build/demo
	$(BIN)/armopt optimize --model $(MODEL) --target $(TARGET) --batch 1,8 --keep-reference -o build/demo/model
	$(BIN)/armopt validate build/demo/model --report build/demo/report.html

test: $(BIN)/.ready-dev  ## install what tests need and run them all, on this machine and the emulated one side by side
	$(MAKE) --no-print-directory --jobs=2 --output-sync test-x86 test-arm64

test-x86: export OMP_WAIT_POLICY = passive  # threads that wait leave the cores to the emulator
test-x86: $(BIN)/.ready-dev  ## the tests that need no Arm core
	$(BIN)/python -m pytest --ignore=tests/arm64

arm64: $(BIN)/.ready  ## prepare the emulated Arm core in ~/.cache/armopt/arm64
	$(BIN)/python -m armopt.emulation.prepare

test-arm64: $(BIN)/.ready-dev  ## the tests on the emulated Arm core, with the real TensorFlow too
	$(BIN)/python -m armopt.emulation.prepare --tensorflow
	ARMOPT_REQUIRE_ARM64=1 ARMOPT_REQUIRE_TENSORFLOW=1 $(BIN)/python -m pytest tests/arm64

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
	$(BIN)/python benchmarks/coverage.py --write

clean:  ## remove what make built
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
