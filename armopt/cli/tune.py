"""``armopt tune``: measures kernels on this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table

if TYPE_CHECKING:
    from armopt.kernels.timings import Timings


def tune(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Its shapes; common Linear shapes without one.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE")] = Path("tuning.json"),
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
    if bundle is None:
        sites = tune.default_sites()
    else:
        sites = tuple(site for program in reader.read(bundle).programs for site in program.sites.values())
    with out.progress() as progress:
        found = tune.measure(sites, rounds=rounds, fast_math=environment.fast_math(os.environ), progress=progress)
    timings.write(found, output)
    out.result({"tuning": str(output), **_to_json(found)}, lambda: _text(found, output))


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
