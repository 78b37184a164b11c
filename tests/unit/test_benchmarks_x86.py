"""The benchmark on x86: contenders in processes of their own take turns; the tables say who is behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.x86 import __main__ as x86
from benchmarks.x86.contenders import ARMOPT, CONTENDERS


def test_contenders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "CACHE", tmp_path)
    monkeypatch.setattr(x86, "CONTENDERS", {name: CONTENDERS[name] for name in (ARMOPT, "eager, FP32")})
    monkeypatch.setattr(x86, "ROUNDS", 2)
    times = x86.compare("empty", 1)
    assert list(times) == ["eager, FP32"]
    assert times["eager, FP32"] > 0


def test_who_does_not_run_a_model_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(x86, "CACHE", tmp_path)
    monkeypatch.setattr(x86, "CONTENDERS", {"nobody": CONTENDERS[ARMOPT]})  # the process knows no such contender
    assert x86.compare("empty", 1) == {}
    assert "empty: nobody does not run it: KeyError: 'nobody'" in capfd.readouterr().err


def test_what_is_behind_is_bold() -> None:
    found = x86.table(1, {"empty": {"1": {"eager, FP32": 0.94, "ONNX Runtime": 2.0}}})
    assert found.splitlines()[-1].startswith("| empty | **0.94** | – |")
    assert "| 2.00 |" in found
