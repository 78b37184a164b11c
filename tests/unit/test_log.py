"""The log: one line a step, a pass, a probe and a fallback; nothing on stdout."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import armopt


def test_an_optimization_and_a_load_are_logged(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path / "cache"))  # nothing was probed here before
    with caplog.at_level(logging.DEBUG, "armopt"):
        armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), output=tmp_path / "b", target="host")
        armopt.load(tmp_path / "b")
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    said = [message for name, level, message in lines if level == "INFO"]
    steps = ["capture", "prepare", "plan", "lower", "validate", "write"]
    assert [message for message in said if message in steps] == steps
    passes = [message for name, _, message in lines if name == "armopt.passes.pipeline"]
    assert any(message.startswith("CanonicaliseLinear: 1 rewritten, 0 skipped") for message in passes)
    assert any(message.endswith("for linear_1: proven") for _, _, message in lines)
    assert any(message.startswith("loaded ") for message in said)
    assert capsys.readouterr().out == ""


def test_nothing_is_logged_to_stderr_unless_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), output=tmp_path / "b")
    assert capfd.readouterr() == ("", "")
