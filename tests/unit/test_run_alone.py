"""What is printed for a test that failed runs that test."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAILING = """
import pytest

def test_plain():
    assert False

@pytest.mark.full
@pytest.mark.parametrize("words", ["two words"])
def test_long(words):
    assert False
"""


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.full
def test_what_is_printed_for_a_failed_test_runs_it(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING)
    lines = run(tmp_path, "--full").splitlines()
    printed = [line for line in lines if line.startswith(".venv/bin/python -m pytest ")]
    assert len(printed) == 2
    again = [run(tmp_path, *shlex.split(line)[3:]) for line in printed]
    assert all("1 failed" in text for text in again)
