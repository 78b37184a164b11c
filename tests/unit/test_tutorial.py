"""docs/tutorial.md as its reader follows it: each block of Python, and each command but those that serve."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from armopt.cli.app import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
#: The server's: other tests run them.
ELSEWHERE = ("serve", "run")


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
def test_it_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, *steps = re.findall(
        r"^```python\n(.*?)^```|^    armopt ([^\n]*)$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "shop.py").write_text(model[0])
    commands = []
    for code, command in steps:
        if code:
            exec(compile(code, str(PAGE), "exec"), {})
        elif command.split()[0] not in ELSEWHERE:
            commands.append(command.split()[0])
            done = CliRunner().invoke(app, shlex.split(command))
            if commands[-1] != "doctor":  # this machine is not the target
                assert done.exception is None, (command, done.output)
    assert commands == ["inspect", "plan", "validate", "doctor"]
    assert "reason" in (tmp_path / "plan.html").read_text()
    assert "The inputs were" not in (tmp_path / "report.html").read_text()
    sys.modules.pop("shop", None)
