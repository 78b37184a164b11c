from __future__ import annotations

import os
from pathlib import Path

import pytest

from armopt import files
from armopt.errors import InputError


def test_it_replaces_a_file_and_anyone_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    path.write_text("old")
    files.write(path, "naïve ✓", "--html")
    assert path.read_text(encoding="utf-8") == "naïve ✓"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    path.write_text("old")

    def full(source: str, destination: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="can't be written: No space left on device") as raised:
        files.write(path, "new", "-o")
    assert "-o" in str(raised.value.hint)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be written"):
        files.write(tmp_path / "missing" / "x", "", "-o")
