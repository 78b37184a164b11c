"""``armopt validate``: FP32 against what the bundle computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table


def validate(
    bundle: options.BundlePath,
    against: Annotated[Path | None, typer.Option("--against", metavar="MODEL", help="The original model file.")] = None,
    reference: options.Reference = "",
    samples: options.CheckInputs = None,
    min_cosine: options.MinCosine = 0.99,
    gates: options.Gates = None,
    task: options.TaskName = "",
    report: options.ReportPath = None,
    trust_pickle: options.TrustPickle = False,
    as_json: options.Json = False,
) -> None:
    """Compare a bundle with FP32, per output, per task and per layer. Exit code 4 if a gate fails."""
    from armopt import accuracy, progress
    from armopt.capture.files.format import TrustedFile
    from armopt.errors import AccuracyError

    out = Output(as_json)
    with out.progress() as watcher, progress.watched_by(watcher):
        found = accuracy.validate(
            bundle,
            against=TrustedFile(against) if against is not None and trust_pickle else against,
            model=reference,
            inputs=samples,
            min_cosine=min_cosine,
            gates=gates or (),
            task=task,
            report=report,
        )
    if report is not None:
        found["report"] = str(report)
    out.result(found, lambda: _text(found))
    if not found["passed"]:
        raise AccuracyError(
            found["failed"],
            where=str(bundle),
            hint="Lower --min-cosine or the gate if that is good enough for your task, "
            "or optimize again: it repairs what breaks a gate given there",
        )


def _text(found: dict[str, Any]) -> str:
    given = "yours: " if found["inputs_given"] else ""
    parts = [f"Against {found['reference']}.\nInputs: {given}{found['inputs']}. Ran {found['ran']}.", _outputs(found)]
    if measured := _task(found):
        parts.append(measured)
    if found["nodes"]:
        parts.append(_nodes(found))
    parts.append(gates_table(found))
    parts += [f"Note: {remark}." for remark in found["remarks"]]
    gate = f", gate {found['min_cosine']}" if found["min_cosine"] is not None else ""
    passed = f"passed: {similarity(found['cosine'], found['gates'][0]['value'])}{gate}"
    parts.append(passed if found["passed"] else f"FAILED: {found['failed']}")
    if "report" in found:
        parts[-1] += f"\nWrote {found['report']}."
    return "\n\n".join(parts)


def _outputs(found: dict[str, Any]) -> str:
    rows = [
        (
            bucket,
            entry["output"],
            f"{100 * entry['equal']:.4g} % equal" if entry["equal"] is not None else f"{entry['cosine']:.6f}",
            "-" if entry["column"] is None else f"{entry['column']:.6f} {entry['column_at']}".strip(),
            "-" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f} dB",
            f"{entry['max_abs']:.3g}",
            f"{entry['max_rel']:.2g}",
            "-" if entry["rmse_ratio"] is None else f"{entry['rmse_ratio']:.3g}",
            "yes" if entry["finite"] else f"NO: {entry['nan']} NaN, {entry['inf']} inf",
        )
        for bucket, entries in found["outputs"].items()
        for entry in entries
    ]
    headers = ("bucket", "output", "cosine", "worst column", "SQNR", "max error", "relative", "RMSE ratio", "finite")
    return text_table(headers, rows)


def _task(found: dict[str, Any]) -> str:
    measured = {bucket: figures for bucket, figures in found["task"]["metrics"].items() if figures}
    if not measured:
        return ""
    names = list(dict.fromkeys(name for figures in measured.values() for name in figures))
    rows = [
        (bucket, *(f"{figures[name]:.6g}" if name in figures else "-" for name in names))
        for bucket, figures in measured.items()
    ]
    return f"{found['task']['name']} ({found['task']['why']}):\n" + text_table(("bucket", *names), rows)


def _nodes(found: dict[str, Any], most: int = 5) -> str:
    def error(value: float | None) -> str:
        return "inf" if value is None else f"{value:.2e}"

    rows = [
        (n["node"], n["kernel"], error(n["isolated"]), error(n["cumulative"]), n["comes_from"])
        for n in found["nodes"][:most]
    ]
    table = text_table(("layer", "kernel", "alone", "carried", "comes from"), rows)
    return f"Layers that add most, of {len(found['nodes'])} ({found['node_bucket']}):\n{table}"


def similarity(worst: float, gate: float | None, called: str = "cosine") -> str:
    """How alike the outputs are: the worst cosine; where its gate has nothing to look at, the share of equal values."""
    return f"{called} {worst:.6f}" if gate is not None else f"{100 * worst:.4g} % of values equal"


def gates_table(found: dict[str, Any]) -> str:
    """The gates and what became of them."""
    rows = [
        (
            entry["gate"],
            "-" if entry["value"] is None else f"{entry['value']:.6g}",
            entry["where"] or "-",
            "holds" if entry["passed"] else "FAILED",
        )
        for entry in found["gates"]
    ]
    return text_table(("gate", "worst value", "where", "verdict"), rows)
