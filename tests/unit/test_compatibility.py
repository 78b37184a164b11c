"""The page of releases and hosts is what its command makes of the runs that are kept."""

from __future__ import annotations

from benchmarks import compatibility
from benchmarks.compatibility import Run

LINES = [
    "....F.E [100%]\n",
    "FAILED tests/unit/test_a.py::test_b[1-x] - AssertionError: no\n",
    "ERROR tests/unit/test_a.py::test_c - OSError\n",
    "1 failed, 41 passed, 2 skipped, 7 deselected, 3 warnings, 1 error in 12.34s\n",
]


def test_pytests_last_lines_are_read() -> None:
    done = compatibility.read(LINES, "x86", "2.15.0", "tests/unit")
    assert (done.torch, done.host, done.what) == ("2.15.0", "x86", "tests/unit")
    assert (done.passed, done.failed, done.skipped) == (41, 2, 2)
    assert done.failures == ("tests/unit/test_a.py::test_b[1-x]", "tests/unit/test_a.py::test_c")
    assert compatibility.read(["=== 5 passed in 1.0s ===\n"], "x86", "2.15.0", "").failed == 0


def test_the_table_goes_by_release_then_host() -> None:
    runs = [Run(release, host, "-k x", 1, 0, 0, (), "2026-11-26") for release, host in ORDER[::-1]]
    rows = compatibility.table(runs).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [release for release, _ in ORDER]
    assert "Neoverse-N2, emulated" in rows[1]


ORDER = [("2.9.1", "x86"), ("2.10.0", "yitian710"), ("2.15.0", "x86"), ("2.15.0", "graviton3")]


def test_the_page_is_up_to_date() -> None:
    text = compatibility.PAGE.read_text()
    assert compatibility.BEGIN in text
    assert compatibility.page(text, compatibility.load()) == text
