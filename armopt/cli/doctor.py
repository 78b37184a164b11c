"""``armopt doctor``: is this host, and this process, what bundles need?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from armopt.deploy.doctor import Report
    from armopt.environment import Difference


def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="What is to run here: a folder, or a zip of it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A soft difference counts as a hard one.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show CPU, torch and which backends really answer; what is wrong and what mends it. Exit code 3 if unhealthy."""
    from armopt.deploy import doctor

    report = doctor.examine(bundle, strict=strict)
    Output(as_json).result(report.to_json(), lambda: _text(report))
    if not report.healthy:
        raise typer.Exit(3)


def _text(report: Report) -> str:
    host, facts = report.host, report.facts
    threads = f"{facts.get('threads', '?')} of torch, {facts.get('threads_for_host', '?')} CPUs for this process"
    lines = [
        f"CPU       {host['core']}{f' ({products})' if (products := host['products']) else ''}, {host['cpus']} CPUs",
        f"features  {' '.join(host['features']) or host['machine']}; {host['vector_bits']}-bit vectors",
        f"build     {', '.join(_build(facts))}",
        f"threads   {threads}",
        f"THP       {facts.get('thp', 'unknown')}; decided for tensors by {facts.get('thp_switch', 'unknown')}",
        "",
        text_table(("backend", "", "what answers"), [(c.name, c.status, c.found) for c in report.checks]),
        "",
    ]
    if report.verdicts:
        rows = [
            (v.planned, "x".join(map(str, v.shape)), v.layers, v.kernel, v.reason or "as planned")
            for v in report.verdicts
        ]
        lines += [text_table(("planned", "input", "layers", "runs", "why"), rows), ""]
    for finding in report.findings:
        lines += _finding(finding)
    verdict = "healthy" if report.healthy else "NOT healthy"
    what = f"this {report.bundle} bundle" if report.bundle else "bundles made for it"
    lines += [*([""] if report.findings else []), f"This host is {verdict} for {what}."]
    if "asimd" not in host["features"]:
        lines[-1] += " It is no Arm server: portable twins run, with the target's rounding but not its speed."
    return "\n".join(lines)


def _build(facts: Mapping[str, str]) -> list[str]:
    """The libraries of this process, in words."""
    labels = {"onednn": "oneDNN ", "acl": "ACL ", "blas": "", "openmp": "OpenMP ", "blas_core": "kernels for "}
    labels |= {"allocator": "memory from ", "malloc": "malloc of "}
    torch = f"torch {facts.get('torch', 'none')} ({facts.get('torch_build', '?')})"
    return [torch, *(f"{label}{facts[name]}" for name, label in labels.items() if name in facts)]


def _finding(found: Difference) -> list[str]:
    """One difference: what it is, what it costs, and what mends it."""
    lines = [
        f"{found.severity.upper():5} {found.what}: {found.found} (wanted: {found.expected})",
        f"      {found.cost}",
    ]
    return [*lines, f"      -> {found.remedy}"] if found.remedy else lines
