"""``armopt plan``: decides and explains, writes nothing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import comparison, layers, options, remainder
from armopt.cli.output import Output
from armopt.errors import InputError

if TYPE_CHECKING:
    from armopt.capture.submodules import CapturedPart
    from armopt.compiler.recipe import Planned, Recipe


def plan(
    model: options.ModelPath = None,
    target: options.TargetName = "graviton3",
    reference: options.Reference = "",
    described: options.Inputs = None,
    samples: options.Samples = None,
    batch: options.Batch = "",
    ranges: options.Dims = None,
    at: options.At = None,
    policy: options.PolicyName = "cost",
    threads: Annotated[
        str,
        typer.Option(
            "--threads",
            metavar="N",
            help="Threads of a call, for --policy cost; by default those of the target's usual instance. With --compare"
            " several: 1,4,16.",
            show_default=False,
        ),
    ] = "",
    compare: Annotated[
        str,
        typer.Option(
            "--compare",
            metavar="TARGETS",
            help="Estimate time, throughput and weights on these targets instead: graviton3,yitian710.",
            show_default=False,
        ),
    ] = "",
    tuning: options.TuningFile = None,
    keep_fp32: options.KeepFp32 = None,
    trust_pickle: options.TrustPickle = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Draw the graph, coloured by kernel.")
    ] = None,
    until: Annotated[
        str, typer.Option("--until", metavar="PASS", help="Stop after this pass; with --text.", show_default=False)
    ] = "",
    text: Annotated[bool, typer.Option("--text", help="Print the graph after the passes, one line a node.")] = False,
    every: options.EveryLayer = False,
    as_json: options.Json = False,
) -> None:
    """Show which kernel each layer would get, and why. Writes nothing but what --html asks for."""
    from armopt.compiler import captured_model

    counts = comparison.read_threads(threads)
    _refuse(("--until", "stops between passes, where there is no plan", "Add --text"), when=bool(until) and not text)
    drawn = as_json or html is not None
    _refuse(("--text", "prints the graph and nothing else", "Leave out --json and --html"), when=text and drawn)
    other = text or html is not None or tuning is not None or bool(keep_fp32)
    hint = "Leave out --text, --html, --tuning and --keep-fp32"
    _refuse(("--compare", "estimates, and shows no plan", hint), when=bool(compare) and other)
    one = ("--threads", "a plan is for one number of threads", "Add --compare TARGETS")
    _refuse(one, when=len(counts) > 1 and not compare)
    out = Output(as_json)
    count = counts[0] if counts and not compare else 0
    recipe, sizes = options.recipe_for(target, policy, tuning, keep_fp32, count), options.parse_batch(batch)
    dims = options.parse_dims(ranges, at)
    if until:
        recipe = replace(recipe, pipeline=recipe.pipeline.until(until))
    with out.progress() as progress:
        progress("capture", 0, 2)
        captured = options.open_model(model, reference, described, samples, sizes, dims, trust_pickle)
        progress("plan", 1, 2)
        (part,) = captured_model.capture_model(captured, batch=sizes, dims=dims).parts
        if text:
            out.text(_graphs(recipe, part))
            return
        if compare:
            comparison.show(part, compare, counts, policy, out)
            return
        prepared = recipe.prepare(part.captured.graph_module)
        recipe.check_names({part.path: prepared})
        planned = recipe.plan_part(part, prepared)
    if html is not None:
        from armopt import files
        from armopt.compiler import plan_page

        files.write(html, plan_page.render(planned), "--html")
    out.result(to_json(planned), lambda: as_text(planned, every=every))


def _refuse(message: tuple[str, str, str], *, when: bool) -> None:
    where, what, hint = message
    if when:
        raise InputError(what, where=where, hint=hint)


def _graphs(recipe: Recipe, part: CapturedPart) -> str:
    """The graph after the passes; once for each bucket where they go on to lower plans."""
    from armopt.compiler.graph_text import graph_text

    if not recipe.pipeline.lowers:
        return graph_text(recipe.prepare(part.captured.graph_module).graph_module) + "\n"
    programs = recipe.lower_part(recipe.plan_part(part))
    said = [
        f"at {', '.join(f'{name}={size}' for name, size in p.bucket.items())}:\n" if p.bucket else "" for p in programs
    ]
    return "\n".join(f"{where}{graph_text(p.graph_module)}\n" for where, p in zip(said, programs, strict=True))


def to_json(planned: Planned) -> dict[str, Any]:
    """The plan as one object."""
    from armopt.plan.remainder import find

    return {
        "target": planned.target.name,
        "buckets": [
            {"bucket": dict(each.bucket), "policy": each.policy, "nodes": [asdict(entry) for entry in each.decisions]}
            for each in planned.plans
        ],
        "refused": [{"name": skip.node, "reason": skip.reason} for skip in planned.refused],
        "not_in_bf16": [remainder.to_json(find(each)) for each in planned.plans],
    }


def as_text(planned: Planned, *, every: bool) -> str:
    """The plan for people; with `every` a line for each layer, however many there are."""
    from armopt.plan.remainder import find

    parts = []
    for each in planned.plans:
        where = ", ".join(f"{name}={value}" for name, value in each.bucket.items())
        parts.append(f"{planned.target.name}, {each.policy}" + (f", {where}" if where else "") + ":")
        rows = [layers.Row(d.node, d.op, d.shape, d.kernel, d.precision, d.reason) for d in each.decisions]
        parts.append(layers.table(rows, every=every) + "\n")
        if left := remainder.text(find(each)):
            parts.append(left + "\n")
    return "\n".join(parts)
