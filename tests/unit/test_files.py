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


def test_a_text_that_has_no_utf8_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(tmp_path / "x", "\ud800")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_a_finished_folder_takes_the_place_of_what_is_there(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "bundle"
    if old == "file":
        path.write_text("old")
    elif old == "folder":
        path.mkdir()
        (path / "old").touch()
    with files.folder_beside(path) as folder:
        (folder / "new").touch()
        files.put(folder, path)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def make() -> None:
        with files.folder_beside(tmp_path / "bundle") as folder:
            (folder / "half").touch()
            raise ValueError

    with pytest.raises(ValueError):
        make()
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_put_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_text("old")
    with pytest.raises(OSError):
        files.put(tmp_path / "missing", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path: Path) -> None:
    """A run that is under way holds its folder locked, and keeps it."""
    place = tmp_path / "bundle"
    with files.folder_beside(place) as under_way:
        left = tmp_path / f"{under_way.name[:-3]}xyz"
        left.mkdir()
        (left / "weights").write_bytes(b"half")
        (tmp_path / f"{under_way.name[:-3]}abc").write_bytes(b"old.zip")
        with files.folder_beside(place) as second:
            assert sorted(tmp_path.iterdir()) == sorted([under_way, second])
    assert list(tmp_path.iterdir()) == []
