"""The one place that prints: a bar on a terminal alone, and never beside JSON."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from armopt.bundle import manifest, reader
from armopt.cli.output import Output, show_warnings, text_table
from armopt.errors import ArmoptWarning, BundleError, InputError, first_line
from tests import pages
from tests.unit.test_manifest import hashed


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


#: What a terminal obeys, and how it is shown.
OBEYED = {
    "a": "a",
    "naïve ✓ 图": "naïve ✓ 图",
    "\x1b[2J\x1b]0;owned\x07": r"\x1b[2J\x1b]0;owned\x07",
    "\x9b31m": r"\x9b31m",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066x\u2069": r"\u2066x\u2069",
    "a\u200bb\ufeff": r"a\u200bb\ufeff",
    "a\u2028b\x85": r"a\u2028b\x85",
    "a\rb\x08\x7f\x00": r"a\rb\x08\x7f\x00",
    "\ud800": r"\ud800",
}


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_would_obey_is_written_out(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=False)
    out.result({}, lambda: f"first\n{text}")
    out.text(f"second\n{text}\n")
    out.note(text)
    shown = capsys.readouterr()
    assert shown.out == f"first\n{OBEYED[text]}\nsecond\n{OBEYED[text]}\n"
    assert shown.err == f"{OBEYED[text]}\n"
    assert str(InputError(text, where=text, hint=text)) == f"{OBEYED[text]}: {OBEYED[text]}. {OBEYED[text]}"


def test_a_cell_and_an_error_are_one_line() -> None:
    assert text_table(("a",), [("x\n  forged",)]).splitlines()[-1] == r"x\n  forged"
    assert str(InputError("x\narmopt: all is well")) == r"x\narmopt: all is well"
    assert first_line(ValueError("\x1b[2Jx\ny")) == r"\x1b[2Jx"
    assert first_line(ValueError("It is not supported.\nMore.")) == "It is not supported"


@pytest.mark.parametrize("text", [text for text in OBEYED if text != OBEYED[text]], ids=ascii)
def test_no_page_holds_it(text: str) -> None:
    source = f"<b>{text}</b>"
    for made in (pages.of_plan(source=source), pages.of_report(given=True, source=source)):
        assert f"&lt;b&gt;{OBEYED[text]}&lt;/b&gt;" in made
        assert text not in made


def test_no_bundle_holds_it(mlp_bundle: Path, tmp_path: Path) -> None:
    """One that says it is refused; one made of a file whose name has it says it written out."""
    bundle = Path(shutil.copytree(mlp_bundle, tmp_path / "bundle"))
    content = json.loads((bundle / "manifest.json").read_text())
    content["model"]["source"] = "\x1b[2J"
    (bundle / "manifest.json").write_bytes(hashed(content))
    with pytest.raises(BundleError, match=r"model\.source: expected one line without control characters"):
        reader.read(bundle)
    described = reader.read(mlp_bundle).manifest
    odd = replace(described, model=replace(described.model, source="a\x1b\n.pt2"))
    assert manifest.from_bytes(manifest.to_bytes(odd), "m").model.source == r"a\x1b\n.pt2"


def test_warnings_look_like_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No line of armopt's source, which says nothing to people."""
    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: others.append(str(message)))
    show_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("model.pt has a prefix\x1b", ArmoptWarning, stacklevel=1)
        warnings.warn("armopt: said", ArmoptWarning, stacklevel=1)
        warnings.warn("another's", UserWarning, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["armopt: model.pt has a prefix\\x1b", "armopt: said"]
    assert others == ["another's"]
