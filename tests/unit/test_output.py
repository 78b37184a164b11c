"""The one place that prints: a bar on a terminal alone, and never beside JSON."""

from __future__ import annotations

import io
import sys

import pytest

from armopt.cli.output import Output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "as_json", "drawn"),
    [(Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)],
    ids=["terminal", "terminal with --json", "pipe"],
)
def test_progress(stream: io.StringIO, as_json: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Output(as_json).progress() as progress:
        progress("layers", 3, 10)
    assert bool(stream.getvalue()) is drawn
    if drawn:
        assert "layers" in stream.getvalue()
