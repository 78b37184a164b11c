"""``armopt doctor``: is this host, and this process, what bundles need?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table

if TYPE_CHECKING:
    from armopt.deploy.doctor import Report


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
    known = {"openmp": "OpenMP", "blas_core": "kernels for", "allocator": "memory from", "malloc": "malloc of"}
    build = [
        f"torch {facts.get('torch', 'none')} ({facts.get('torch_build', '?')})",
        *(f"{label} {facts[name]}" for name, label in (("onednn", "oneDNN"), ("acl", "ACL")) if name in facts),
        *(f"{facts[name]}" for name in ("blas",) if name in facts),
        *(f"{label} {facts[name]}" for name, label in known.items() if name in facts),
    ]
    threads = f"{facts.get('threads', '?')} of torch, {facts.get('threads_for_host', '?')} CPUs for this process"
    lines = [
        f"CPU       {host['core']}{f' ({products})' if (products := host['products']) else ''}, {host['cpus']} CPUs",
        f"features  {' '.join(host['features']) or host['machine']}; {host['vector_bits']}-bit vectors",
        f"build     {', '.join(build)}",
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
        lines.append(f"{finding.severity.upper():5} {finding.what}: {finding.found} (wanted: {finding.expected})")
        lines.append(f"      {finding.cost}")
        lines += [f"      -> {finding.remedy}"] if finding.remedy else []
    verdict = "healthy" if report.healthy else "NOT healthy"
    what = f"this {report.bundle} bundle" if report.bundle else "bundles made for it"
    lines += [*([""] if report.findings else []), f"This host is {verdict} for {what}."]
    if "asimd" not in host["features"]:
        lines[-1] += " It is no Arm server: portable twins run, with the target's rounding but not its speed."
    return "\n".join(lines)
