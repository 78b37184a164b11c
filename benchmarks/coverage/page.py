"""docs/coverage.md from the rows."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import armopt
from benchmarks.coverage import huggingface, timm, torchvision
from benchmarks.coverage.measure import CLASSES, MIN_COSINE, TARGET, passed

COLUMNS = (
    *("model", "input", "params (M)", "form", *CLASSES, "in BF16", "activations"),
    *("cosine", "max rel error", "s", "MB", "notes"),
)
ABOUT = {
    torchvision.SECTION: """\
All of `torchvision.models.list_models()`. Images have 224 pixels on a side at most, 128 where a model has more than 50
million parameters; clips and pairs of images are smaller. Detectors are narrow: four classes, images of 128 pixels,
heads scaled so that there is something to detect; random weights rank boxes by next to nothing, so that now and then
one is not found again. The quantizable ones are taken as they are before quantization, in FP32.""",
    timm.SECTION: """\
The smallest model of each architecture, on an image of its own size. An architecture is what is in one of timm's files;
its models for tests don't count.""",
    huggingface.SECTION: """\
Small random configurations: two layers, a width of 128, texts of 128 tokens. The rows with `.generate` are whole
generate loops with their cache, which `armopt.compile` runs; their layers are those of all graphs, the prompt's and a
step's. Where experts are chosen, rounding may choose another for a token: weights are random, and scores close to each
other. PyTorch's own BF16 autocast differs in about as many tokens.""",
}
Row = Mapping[str, Any]
#: Of a model that was not measured on this machine.
NOT_YET = "not measured yet: --resume goes on"


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    versions = ", ".join(sorted({row["torch"] for row in rows if "torch" in row}))
    return f"""# Coverage

Made by `python -m benchmarks.coverage --write` with armopt {armopt.__version__} and torch {versions}; do not edit.

Each model is optimized for {TARGET} at batch 1, written, loaded, run, and compared with the model itself as its user
calls it, in FP32. This was run on a host that is not the target, so the portable twins gave the target's rounding.
Weights are random; what initialisation leaves at one value gets noise (`benchmarks.random_weights`), else heads of
zero and layer scales of 1e-6 would hide errors. Nothing is left out: what can't be optimized is a row that says why.

{_summary(rows)}

- form: a bundle of one "graph"; a bundle of so many "parts" with the model's own Python between them; "compiled" by
  `armopt.compile` ([what each needs](compile.md)). The notes say why a model is no single graph.
- BF16, FP32, BLAS, ATen: how many layers (Linear and convolution) are packed once with products in BF16; packed in
  FP32; given to BLAS, in FP32 on weights stored in BF16, where a layer has few rows; left to plain ATen.
- in BF16: of all multiplications of the model, those in BF16; activations: those of two activations, as in attention,
  which have no weights and stay in FP32. What remains has its reason in the notes, from 2% on.
- cosine: similarity to FP32 of the worst output; max rel error: largest error over the largest value of an output. Of
  detectors they are those of the worst part, as lists of detections have none; the notes say how many are found again.
- s: seconds of CPU that optimizing took, with one thread, on the x86 host; MB: the most memory that the process held by
  then, which is with Python's libraries and the model itself.

{"".join(_sections(rows))}"""


def _summary(rows: Sequence[Row]) -> str:
    good = [row for row in rows if passed(row)]
    worst = min(good, key=lambda row: row["cosine"])
    forms = Counter("parts" if "part" in row["form"] else row["form"] for row in good)
    shares = sorted(row["share"] for row in good)
    counted = (
        f"{forms['graph']} as one graph, {forms['parts']} in parts, {forms['compiled']} compiled, "
        f"{forms['generate']} as generate loops"
    )
    said = (
        f"{len(good)} of {len(rows)} pass the gate of cosine >= {MIN_COSINE}: {counted}. The lowest cosine is "
        f"{worst['cosine']:.6f} ({worst['model']}). Half of the models have {statistics.median(shares):.0%} of their "
        f"multiplications in BF16 or more, nine of ten at least {shares[len(shares) // 10]:.0%}."
    )
    if pending := sum(row.get("error") == NOT_YET for row in rows):
        said += f" {pending} are not measured yet."
    return textwrap.fill(said, 120, break_on_hyphens=False)


def _sections(rows: Sequence[Row]) -> Iterator[str]:
    """A heading and a table for each section; one for each family where they are few."""
    for section, found in groupby(rows, key=lambda row: row["section"]):
        models = list(found)
        yield f"## {section}\n\n{ABOUT[section]}\n\n"
        if section == timm.SECTION:
            yield f"{table(models)}\n\n"
            continue
        for family, members in groupby(models, key=lambda row: row["family"]):
            yield f"### {family.replace('_', ' ')}\n\n{table(list(members))}\n\n"


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row) -> list[str]:
    """One model as cells."""
    if "error" in row:
        said = NOT_YET if row["error"] == NOT_YET else f"FAILS: {_cell(row['error'])}"
        return [row["model"], *["-"] * (len(COLUMNS) - 2), said]
    return [
        row["model"],
        row["input"],
        f"{row['parameters'] / 1e6:.2f}",
        row["form"],
        *(str(row[kind]) for kind in CLASSES),
        f"{row['share']:.1%}",
        f"{row['activations']:.1%}",
        f"{row['cosine']:.6f}",
        f"{row['max_rel']:.1e}",
        f"{row['seconds']:.1f}",
        str(row["megabytes"]),
        _cell("; ".join(row["notes"])),
    ]


def _cell(text: str) -> str:
    for surplus in ("torch.export can't take the model whole: ", "torch says: "):
        text = text.replace(surplus, "")
    text = re.sub(r" \(unhinted: [^;]*", "", text)
    return text.replace("|", "\\|").replace("\n", " ")
