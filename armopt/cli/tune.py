"""``armopt tune``: measures kernels on this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table
from armopt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from armopt.ir.records import Site
    from armopt.kernels.timings import Timings
    from armopt.plan.clocked_costs import ClockedCosts


def tune(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Its shapes; common Linear shapes without one.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE")] = Path("tuning.json"),
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE", help="Write the times beside armopt's estimates, to judge them (docs/clock.md)."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Rounds per shape; the median counts.")] = 15,
    as_json: options.Json = False,
) -> None:
    """Time every kernel on this host, on a bundle's shapes, and write tuning.json for optimize --tuning and load."""
    import os

    from armopt import environment
    from armopt.bundle import reader
    from armopt.deploy import tune
    from armopt.kernels import timings

    out = Output(as_json)
    costs = _clock() if report is not None else None
    if bundle is None:
        sites = tune.default_sites()
    else:
        sites = tuple(site for program in reader.read(bundle).programs for site in program.sites.values())
    with out.progress() as progress:
        found = tune.measure(sites, rounds=rounds, fast_math=environment.fast_math(os.environ), progress=progress)
    timings.write(found, output)
    if report is not None and costs is not None:
        _write_report(report, found, sites, costs)
    out.result({"tuning": str(output), **_to_json(found)}, lambda: _text(found, output))


def _clock() -> ClockedCosts:
    """The estimates for this host, at as many threads as PyTorch has.

    Raises:
        InputError: It has no clock.
    """
    import torch

    from armopt import targets
    from armopt.plan import cost_policy

    policy = cost_policy.default(targets.this_host(), threads=torch.get_num_threads())
    costs = cost_policy.clocked(policy)
    if costs is None:
        raise InputError(
            "armopt estimates no times for this host, so there is nothing to judge",
            where="--report",
            hint="Leave it out; docs/clock.md names the machines that have a clock",
        )
    return costs


def _write_report(path: Path, found: Timings, sites: Sequence[Site], costs: ClockedCosts) -> None:
    import json

    from armopt import files, targets
    from armopt.plan import clock_report

    product = targets.this_host().provenance.get("product", "")
    content = clock_report.make(found, sites, costs, product)
    files.write(path, json.dumps(content, indent=1) + "\n", "--report")


def _to_json(found: Timings) -> dict[str, Any]:
    return {"host": dict(found.host), "seconds": {key: dict(times) for key, times in found.times.items()}}


def _text(found: Timings, path: Path) -> str:
    import json

    rows = []
    for key, times in found.times.items():
        site = json.loads(key)
        shape = f"{'x'.join(map(str, site['shape']))} -> {'x'.join(map(str, site['weight']))}"
        ranked = sorted(times.items(), key=lambda item: item[1])
        best = ranked[0][1] if ranked else 0.0
        shown = ", ".join(f"{name} {seconds / best:.2f}x" for name, seconds in ranked)
        rows.append((site["op"], shape, site["post_op"], shown or "no kernel runs properly here"))
    headers = ("op", "input -> weight", "post-op", "kernels, by time relative to the best")
    next_step = f"Use it: armopt optimize --tuning {path}, or ARMOPT_TUNING={path} where the bundle is loaded."
    return f"{text_table(headers, rows)}\n\nWrote {path}. {next_step}"
