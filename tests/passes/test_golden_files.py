"""The golden files and the pass files fit together."""

from __future__ import annotations

import importlib
from pathlib import Path

from harness import GOLDEN, Contract

import armopt.passes

TESTS = Path(__file__).parent
PASSES = sorted(p.stem for p in Path(armopt.passes.__file__).parent.glob("[a-z]*.py"))
PASSES.remove("pipeline")  # what runs them: tests/unit/test_pipeline.py


def test_every_pass_has_its_tests() -> None:
    assert [name for name in PASSES if not (TESTS / f"test_{name}.py").exists()] == []


def test_no_golden_file_is_left_over() -> None:
    expected = set()
    for name in PASSES:
        module = importlib.import_module(f"test_{name}")
        for contract in vars(module).values():
            if isinstance(contract, type) and issubclass(contract, Contract) and contract is not Contract:
                assert contract.folder == name
                names = [case.name for case in contract.cases]
                assert len(names) == len(set(names))
                expected |= {f"{name}/{case}.txt" for case in names}
    assert {str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.txt")} == expected
