"""The HTML report: one file, nothing fetched from elsewhere."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from armopt import files
from armopt.accuracy.checker import Evidence, Validation
from armopt.accuracy.nodes import NodeError
from armopt.accuracy.report import pictures, plots
from armopt.accuracy.tasks import TASKS, Outputs
from armopt.bundle import schema
from armopt.errors import InputError, for_page

if TYPE_CHECKING:
    import jinja2

    from armopt.bundle.manifest import Manifest
    from armopt.ir.records import Remainder

#: Values of one output that plots look at.
_MOST = 200_000
#: Rows of the table of layers that show at once.
_ROWS = 15


@dataclass(frozen=True, slots=True)
class About:
    """What the report is about: names and versions, in words."""

    bundle: str
    target: str
    model: str
    versions: str
    repaired: Mapping[str, Any] | None = None
    not_in_bf16: Sequence[Remainder] = ()

    @classmethod
    def of(cls, manifest: Manifest, bundle: str) -> About:
        """From a bundle's manifest."""
        versions = f"armopt {manifest.armopt_version}, torch {manifest.versions.get('torch', 'unknown')}"
        repaired = schema.builtins(manifest.accuracy.repair)
        return cls(bundle, manifest.target, manifest.model.source, versions, repaired, manifest.not_in_bf16)


@dataclass(frozen=True, slots=True)
class _Output:
    """One output's plots."""

    name: str
    shape: str
    scatter: plots.Plot | None
    values: plots.Plot | None
    errors: plots.Plot | None


def render(
    about: About,
    validation: Validation,
    errors: Sequence[NodeError],
    evidence: Evidence,
    images: Sequence[Path] = (),
    repair: Mapping[str, Any] | None = None,
) -> str:
    """The report as HTML.

    Args:
        about: What it is about.
        validation: The figures and verdicts.
        errors: Of every layer, in the graph's order.
        evidence: One call of both sides, for plots and pictures.
        images: The image that call was made on, if it was one.
        repair: What was repaired; by default what the bundle's manifest says of it.
    """
    repaired = repair if repair is not None else about.repaired
    changed = frozenset(change["node"] for change in repaired["changes"]) if repaired else frozenset()
    reference, found = evidence.reference, evidence.found
    if validation.task:
        reference, found = TASKS[validation.task].align(reference, found)
    place = {error.node: number for number, error in enumerate(errors, start=1)}
    template = _environment().get_template("report.html.jinja")
    return template.render(
        about=about,
        validation=validation,
        repaired=repaired,
        layers=plots.layers(errors, changed),
        ranked=sorted(errors, key=lambda error: -error.isolated),
        changed=changed,
        place=place,
        rows=_ROWS,
        bucket=validation.worst_bucket,
        outputs=[_output(name, a, b) for name, a, b in _pairs(reference, found)],
        pairs=pictures.pairs(evidence, validation.task),
        winners=_winners(evidence, validation.task),
        picture=pictures.first_image(evidence) if validation.task == "classification" else "",
        file=images[0].name if images else "",
        task_metrics={m.name: m for m in TASKS[validation.task].metrics} if validation.task else {},
    )


def save(
    path: Path,
    outcome: Mapping[str, Any],
    about: About,
    validation: Validation,
    errors: Sequence[NodeError],
    evidence: Evidence,
    images: Sequence[Path] = (),
    repair: Mapping[str, Any] | None = None,
) -> None:
    """Writes a report: HTML as :func:`render` makes it, or `outcome` as JSON where the name ends in .json.

    Raises:
        InputError: The place can't be written.
    """
    if path.suffix == ".json":
        text = json.dumps(outcome, indent=1, sort_keys=True, allow_nan=False) + "\n"
    else:
        text = render(about, validation, errors, evidence, images, repair)
    files.write(path, text, "--report")


def check_place(path: Path) -> None:
    """Refuses a place that can't take a report, before any work is done.

    Raises:
        InputError: Its folder is missing, or it is a folder.
    """
    if path.is_dir():
        raise InputError("is a folder", where=f"--report {path}", hint=f"Name a file: {path / 'report.html'}")
    if not path.absolute().parent.is_dir():
        folder = path.absolute().parent
        raise InputError("the folder to write into does not exist", where=str(folder), hint=f"mkdir -p {folder}")


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("armopt.accuracy.report", ""),
        autoescape=True,
        finalize=for_page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    return environment


def figure(value: float | None) -> str:
    """A number for people."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return f"{value:.3g}"


def _pairs(reference: Outputs, found: Outputs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Outputs that can be drawn against each other: numbers, with the same sizes on both sides."""
    drawn = {name: y for name, y in reference.items() if y.is_floating_point() and y.numel()}
    return [(name, y, found[name]) for name, y in drawn.items() if y.shape == found[name].shape]


def _output(name: str, reference: torch.Tensor, found: torch.Tensor) -> _Output:
    shape = "x".join(map(str, reference.shape)) or "scalar"
    stride = max(1, reference.numel() // _MOST)
    a, b = (side.detach().flatten()[::stride] for side in (reference, found))
    return _Output(name, shape, plots.scatter(a, b), plots.values(a, b), plots.histogram(a, b))


def _winners(evidence: Evidence, task: str) -> list[tuple[int, float, int, float]]:
    """The five highest classes of the first row on both sides: class and score, class and score."""
    if task != "classification":
        return []
    from armopt.accuracy.tasks.classification import Classification

    name = Classification.scores(evidence.reference)
    if name is None:
        return []
    sides = [side[name] for side in (evidence.reference, evidence.found)]
    if sides[0].shape != sides[1].shape or not len(sides[0]):
        return []
    both = [side[0].double().topk(min(5, side.shape[1])) for side in sides]
    columns = [column.tolist() for top in both for column in (top.indices, top.values)]
    return list(zip(*columns, strict=True))
