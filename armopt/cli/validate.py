"""``armopt validate``: FP32 against what the bundle computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from armopt.cli import options, sink


def validate(
    bundle: options.BundlePath,
    against: Annotated[Path | None, typer.Option("--against", metavar="MODEL", help="The original model file.")] = None,
    reference: options.Reference = "",
    samples: options.Samples = None,
    min_cosine: Annotated[float, typer.Option("--min-cosine", help="Least cosine similarity to FP32.")] = 0.99,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Compare a bundle with FP32: cosine similarity, SQNR, largest error. Exit code 4 if the gate fails."""
    from armopt import accuracy, inputs
    from armopt.errors import AccuracyError

    out = sink.Sink(as_json)
    report = accuracy.validate(
        bundle,
        against=against,
        model=reference,
        inputs=inputs.read(samples) if samples else None,
        min_cosine=min_cosine,
        trust_pickle=trust_pickle,
    )
    out.result(report, lambda: _text(report))
    if not report["passed"]:
        raise AccuracyError(
            f"cosine similarity is {report['cosine']:.6f}, the gate is {min_cosine}",
            where=str(bundle),
            hint="Lower --min-cosine if that is good enough for your task",
        )


def _text(report: dict[str, Any]) -> str:
    rows = [
        (
            bucket,
            entry["output"],
            f"{entry['cosine']:.6f}",
            "-" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f} dB",
            f"{entry['max_abs']:.3g}",
            f"{entry['max_rel']:.2g}",
            "yes" if entry["finite"] else "NO",
        )
        for bucket, entries in report["outputs"].items()
        for entry in entries
    ]
    verdict = "passed" if report["passed"] else "FAILED"
    return (
        f"Against {report['reference']}; inputs: {report['inputs']}; ran {report['ran']}.\n\n"
        + sink.table(("bucket", "output", "cosine", "SQNR", "max error", "relative", "finite"), rows)
        + f"\n\n{verdict}: cosine {report['cosine']:.6f}, gate {report['min_cosine']}"
    )
