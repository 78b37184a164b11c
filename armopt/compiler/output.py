"""Where a bundle goes, and what is written with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from armopt.accuracy.report import page
from armopt.bundle import writer
from armopt.onnx_export.options import OnnxOptions


@dataclass(frozen=True, slots=True)
class Output:
    """Where a bundle goes, and what is written with it.

    Attributes:
        path: A folder; one file where it ends in .zip.
        force: Whether to replace a bundle that is there.
        keep_reference: Whether the bundle keeps the FP32 original, so that `validate` needs nothing else.
        onnx: Puts an ONNX model into the bundle as well, as ``model.onnx``.
        report: Where to write a report: HTML, or JSON where the name ends in .json.
    """

    path: str | Path
    force: bool = False
    keep_reference: bool = False
    onnx: OnnxOptions | None = None
    report: str | Path | None = None

    @property
    def place(self) -> Path:
        """`path` as a path."""
        return Path(self.path)

    @property
    def report_place(self) -> Path | None:
        """`report` as a path."""
        return None if self.report is None else Path(self.report)

    def check_places(self) -> None:
        """Refuses places that can't be written, before any work is done.

        Raises:
            InputError: Naming the place.
        """
        writer.check_place(self.place, force=self.force)
        if self.report_place is not None:
            page.check_place(self.report_place)
