"""``armopt plan``: decides and explains, writes nothing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, text_table

if TYPE_CHECKING:
    from armopt.compiler.stages import Planned


def plan(
    model: options.ModelPath = None,
    target: options.TargetName = "graviton3",
    reference: options.Reference = "",
    described: options.Inputs = None,
    samples: options.Samples = None,
    batch: options.Batch = "",
    policy: options.PolicyName = "cost",
    tuning: options.TuningFile = None,
    trust_pickle: options.TrustPickle = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw the graph, coloured by kernel.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show which kernel each layer would get, and why. Writes nothing but what --html asks for."""
    from armopt.compiler import stages

    out = Output(as_json)
    chosen = stages.find_target(target)
    policy_chosen, sizes = options.parse_policy(policy, chosen, tuning), options.parse_batch(batch)
    with out.progress() as progress:
        progress("capture", 0, 2)
        captured = options.open_model(model, reference, described, samples, sizes, trust_pickle)
        progress("plan", 1, 2)
        planned = stages.make_plan(captured, chosen, policy_chosen, stages.find_buckets(captured, sizes))
    if html is not None:
        from armopt import files
        from armopt.compiler import plan_page

        files.write(html, plan_page.render(planned), "--html")
    out.result(_to_json(planned), lambda: _text(planned))


def _to_json(planned: Planned) -> dict[str, Any]:
    return {
        "target": planned.target.name,
        "buckets": [
            {"bucket": dict(each.bucket), "policy": each.policy, "nodes": [asdict(entry) for entry in each.decisions]}
            for each in planned.plans
        ],
        "refused": [{"name": skip.node, "reason": skip.reason} for skip in planned.refused],
    }


def _text(planned: Planned) -> str:
    parts = []
    for each in planned.plans:
        where = ", ".join(f"{name}={value}" for name, value in each.bucket.items())
        parts.append(f"{planned.target.name}, {each.policy}" + (f", {where}" if where else "") + ":")
        rows = [(d.node, d.op, "x".join(map(str, d.shape)), d.kernel, d.precision, d.reason) for d in each.decisions]
        parts.append(text_table(("node", "op", "input", "kernel", "precision", "reason"), rows) + "\n")
    if planned.refused:
        rows_refused = [(skip.node, skip.reason) for skip in planned.refused]
        parts.append("Plain ATen:\n" + text_table(("node", "reason"), rows_refused))
    return "\n".join(parts)
