"""``armopt optimize``: a model file -> a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output, human_size
from armopt.cli.validate import similarity

if TYPE_CHECKING:
    from armopt.bundle.manifest import Accuracy, Manifest, PartPlan


def optimize(
    model: options.ModelPath = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Where the bundle goes.")] = ...,  # type: ignore[assignment]
    target: options.TargetName = "graviton3",
    reference: options.Reference = "",
    described: options.Inputs = None,
    samples: options.Samples = None,
    batch: options.Batch = "",
    ranges: options.Dims = None,
    at: options.At = None,
    policy: options.PolicyName = "cost",
    threads: options.Threads = None,
    tuning: options.TuningFile = None,
    keep_fp32: options.KeepFp32 = None,
    kind: options.Kind = "auto",
    min_cosine: options.MinCosine = 0.99,
    batch_invariant: options.BatchInvariant = False,
    gates: options.Gates = None,
    task: options.TaskName = "",
    checked_on: Annotated[
        Path | None,
        typer.Option(
            "--check-inputs",
            metavar="FILE|DIR",
            help="What to compare with FP32 on, as validate --inputs; by default the example inputs.",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="model|capture",
            help="What FP32 is: the model as it is called, or the graph that torch.export makes of it.",
        ),
    ] = "model",
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Take layers that break a gate out of BF16.")
    ] = True,
    keep_reference: Annotated[
        bool, typer.Option("--keep-reference", help="Keep the FP32 original in the bundle, for validate.")
    ] = False,
    report: options.ReportPath = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Put an ONNX model into the bundle as well.")] = False,
    onnx_weights: options.OnnxWeights = "fp32",
    onnx_plain: options.OnnxPlain = False,
    trust_pickle: options.TrustPickle = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Optimize a model for an Arm server and write a bundle."""
    from functools import partial

    from armopt import progress
    from armopt.capture.dimensions import captured_batch
    from armopt.compiler import optimize
    from armopt.compiler.captured_model import capture_model
    from armopt.compiler.checks import Checks
    from armopt.compiler.output import Output as Place
    from armopt.onnx_export.options import OnnxOptions

    out = Output(as_json)
    exported = OnnxOptions(onnx_weights, fast_math=not onnx_plain)  # refuses an unknown dtype now
    place = Place(output, force, keep_reference, exported if onnx else None, report)
    place.check_places()
    recipe, sizes = options.recipe_for(target, policy, tuning, keep_fp32, threads or 0), options.parse_batch(batch)
    dims = options.parse_dims(ranges, at)
    checks = Checks(
        gates=tuple(gates or ()),
        task=task,
        inputs=checked_on,
        min_cosine=min_cosine,
        repair=repair,
        against=against,
        batch_invariant=batch_invariant,
        examples=_examples(model, described, samples),
    )
    captured = captured_batch(sizes, vary=batch_invariant)
    opened = partial(options.open_for, kind, model, reference, described, samples, captured, dims, trust_pickle)
    divided = options.is_divided(kind, reference)
    with out.progress() as watcher, progress.watched_by(watcher):
        result = optimize.carry_out(
            lambda: capture_model(opened(), batch=sizes, dims=dims), recipe, checks, place, divided=divided
        )
    out.result(to_json(result.manifest, output), lambda: summary(result.manifest, output))
    result.require()


def _examples(model: Path | None, described: list[str] | None, samples: Path | None) -> str:
    """What the example inputs are, in words."""
    if samples is not None:
        return f"the example inputs in {samples}"
    if described:
        return f"generated: seeded random numbers for --input {', '.join(described)}"
    if model is not None and model.suffix == ".pt2":
        return f"the example inputs in {model}"
    return "generated: seeded random numbers of the model's usual size"


def to_json(written: Manifest, path: Path) -> dict[str, Any]:
    """The result of `optimize --json`."""
    from armopt.bundle import schema

    onnx = written.onnxruntime.model if written.onnxruntime else None
    return {
        "bundle": str(path),
        "target": written.target,
        "kind": "module" if written.is_module else "graph",
        "buckets": [
            {**({"part": each.part} if each.part else {}), "bucket": dict(each.bucket), "kernels": kernels(each)}
            for each in written.plan
        ],
        "weights_bytes": written.weights.bytes,
        "fp32_weights_bytes": written.weights.fp32_bytes,
        "refused": schema.builtins(written.refused),
        "onnx": schema.builtins(onnx) if onnx else {},
        "accuracy": schema.builtins(written.accuracy),
    }


def kernels(plan: PartPlan) -> dict[str, int]:
    """How many nodes each kernel has."""
    return dict(Counter(node.kernel for node in plan.nodes).most_common())


def summary(written: Manifest, path: Path) -> str:
    """The result for people."""
    half, full = written.weights.bytes, written.weights.fp32_bytes
    lines = [f"Wrote {path} for {written.target}.", "", *map(_planned, written.plan)]
    ratio = f" ({half / full:.2f} of FP32's {human_size(full)})" if full else ""
    lines.append(f"  weights   {human_size(half)}{ratio}")
    lines += _measured(written.accuracy)
    if written.onnxruntime and (onnx := written.onnxruntime.model):
        lines.append(f"  onnx      {path / onnx.file}, weights in {onnx.weights}")
    if left := {(each.part, row.node) for each in written.not_in_bf16 for row in each.products}:
        lines.append(f"  in FP32   {len(left)} of the products with weights: armopt inspect {path} says why")
    lines += ["", f"Next, on the server:  armopt run {path} -- python serve.py"]
    given = ", model=factory" if written.is_module and not written.model.factory.startswith("torchvision:") else ""
    lines.append(f"In serve.py:          model = armopt.load({str(path)!r}{given})")
    return "\n".join(lines)


def _planned(plan: PartPlan) -> str:
    """How many layers each kernel has in one bucket."""
    sizes = ", ".join(f"{name} {value}" for name, value in plan.bucket.items())
    where = ": ".join(filter(None, (plan.part, sizes)))
    chosen = ", ".join(f"{count} {name}" for name, count in kernels(plan).items()) or "no layers"
    return f"  kernels   {f'at {where}: ' if where else ''}{chosen}"


def _measured(accuracy: Accuracy) -> list[str]:
    """How far the bundle is from FP32, on what, and what was repaired."""
    verdict = "passed" if accuracy.passed else "FAILED"
    lines = [
        f"  accuracy  {similarity(accuracy.cosine, accuracy.gates[0].value, 'cosine similarity to FP32')}, "
        f"largest error {accuracy.max_abs:.3g}: {verdict} ({', '.join(each.gate for each in accuracy.gates)})",
        f"  inputs    {'yours: ' if accuracy.inputs_given else ''}{accuracy.inputs}",
    ]
    if accuracy.difference:
        lines.append(f"  capture   {accuracy.difference}")
    lines += [f"  note      {remark}" for remark in accuracy.remarks]
    if accuracy.repair is not None:
        lines.append(f"  repair    {accuracy.repair.said}")
        lines += [f"            {each.node}: {each.before} -> {each.after}" for each in accuracy.repair.changes]
    return lines
