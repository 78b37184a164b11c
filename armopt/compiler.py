"""`optimize`: capture -> annotate shapes -> plan -> rewrite -> validate -> bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

import armopt
from armopt import capture, cost_policy, environment, inputs, passes, pipeline, plan, sites, sources, targets
from armopt import graph as g
from armopt.accuracy import MIN_COSINE, gates, nodes
from armopt.accuracy import report as report_module
from armopt.bundle import codec, manifest, source, writer
from armopt.checks import Checked, Checks
from armopt.errors import AccuracyError, InputError
from armopt.ir import Bucket, Captured, Plan, Skip, Target
from armopt.onnx_export import session
from armopt.onnx_export.options import Options

if TYPE_CHECKING:
    from armopt.onnx_export.export import Prepared

#: Told the name of each step and how many there are.
Progress = Callable[[str, int, int], None]


def _silent(step: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Planned:
    """A captured model, prepared, with one plan for each bucket."""

    captured: Captured
    prepared: fx.GraphModule
    target: Target
    plans: tuple[Plan, ...]
    records: tuple[pipeline.Record, ...]

    @property
    def refused(self) -> tuple[Skip, ...]:
        """What runs as plain ATen: products that are no Linear, and what the plans refuse."""
        passed = [
            skip
            for record in self.records
            if record.name in ("CanonicaliseLinear", "CanonicaliseConv")
            for skip in record.skipped
        ]
        return tuple(dict.fromkeys([*passed, *(skip for each in self.plans for skip in each.refused)]))


def make_plan(
    captured: Captured,
    target: Target,
    policy: plan.Policy,
    buckets: Sequence[Bucket],
) -> Planned:
    """Prepares a captured model and plans each bucket."""
    prepared, records = pipeline.run(g.copy(captured.graph_module), passes.PREPARE)
    plans = tuple(
        plan.make(sites.find(prepared, captured.values(bucket)), target, policy, bucket) for bucket in buckets
    )
    return Planned(captured, prepared, target, plans, records)


def lower(planned: Planned, rounded: dict[str, torch.Tensor] | None = None) -> tuple[codec.Program, ...]:
    """Carries out each plan on a copy of the graph; the programs share their weights.

    Args:
        planned: What to carry out.
        rounded: Weights in BF16 by name, to share with other plans of the model.
    """
    rounded = {} if rounded is None else rounded
    return tuple(
        lower_at(planned.prepared, each, planned.captured.values(each.bucket), rounded) for each in planned.plans
    )


def lower_at(prepared: fx.GraphModule, chosen: Plan, values: Bucket, rounded: dict[str, torch.Tensor]) -> codec.Program:
    """Carries out one plan on a copy of the graph; plans of one graph share `rounded`."""
    module, _ = pipeline.run(g.copy(prepared), passes.lower(chosen, rounded))
    return codec.program(module, chosen.bucket, values)


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    target: str | Target = "graviton3",
    batch: Sequence[int] = (),
    policy: plan.Policy | None = None,
    min_cosine: float = MIN_COSINE,
    checks: Checks = Checks(),
    force: bool = False,
    onnx: Options | None = None,
    progress: Progress = _silent,
) -> manifest.Manifest:
    """Optimizes a model for a target and writes a bundle.

    Args:
        model: A module, an exported program, or the path of a model file.
        example_inputs: Positional inputs as a sequence, or named ones as a mapping; a file may have its own.
        output: Where the bundle goes; a folder, or one file where it ends in .zip.
        target: A product's name (see ``armopt targets``), or ``host``.
        batch: Sizes of the first dimension to plan for; several make it dynamic.
        policy: How kernels are chosen; by cost where there is a table for the target's core.
        min_cosine: The least cosine similarity to FP32 of any output.
        checks: More gates, what to measure them on, and whether to repair what breaks them.
        force: Replace a bundle that is there.
        onnx: Put an ONNX model into the bundle as well, as ``model.onnx``.
        progress: Told of each step.

    Returns:
        The manifest, as in the bundle.

    Raises:
        InputError: The model, an input or the place is unusable; or ONNX has no form of an operation.
        CaptureError: torch.export can't take the model whole.
        AccuracyError: The gate failed; the bundle is written and marked as not deployable.
    """
    output = Path(output)
    writer.check_place(output, force=force)
    if checks.report is not None:
        report_module.check_place(checks.report)
    bounds = gates.standard(checks.gates, min_cosine)
    chosen = find_target(target)
    policy = policy or cost_policy.default(chosen)
    steps = ("capture", "plan", "rewrite", "validate", *(("onnx",) if onnx else ()), "write")

    def step(name: str) -> None:
        progress(name, steps.index(name), len(steps))

    step("capture")
    captured = _capture(model, example_inputs, batch)
    buckets = find_buckets(captured, batch)
    step("plan")
    planned = make_plan(captured, chosen, policy, buckets)
    step("rewrite")
    rounded: dict[str, torch.Tensor] = {}
    programs = lower(planned, rounded)
    step("validate")
    checked = Checked(captured, bounds, checks)
    validation = checked.validate(programs)
    repaired = None
    if not validation.passed and checks.repair:
        repaired = checked.repair(
            planned.prepared,
            planned.plans,
            programs,
            lambda each: lower_at(planned.prepared, each, captured.values(each.bucket), rounded),
            lambda done, most: progress("repair", done, most),
        )
        if repaired.passed:
            planned = replace(planned, plans=repaired.plans)
            programs = lower(planned, rounded)
            validation = checked.validate(programs)
    signature: dict[str, Any] = {
        "inputs": captured.inputs,
        "outputs": captured.outputs,
        "specs": [
            asdict(spec) | {"statistics": inputs.statistics(tensor)}
            for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
        ],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }
    prepared = None
    if onnx:
        step("onnx")
        prepared = _translate(programs, signature, onnx)
    step("write")
    accuracy = validation.to_json() | {"repair": None if repaired is None else repaired.to_json()}
    variables = environment.variables(chosen)
    described = _describe(planned, programs, accuracy, variables, session.describe(programs, onnx, inside=True))
    texts = {
        source.REPORT: writer.to_json(accuracy | {"passes": [_record(record) for record in planned.records]}),
        source.ENV: environment.render(variables, "shell"),
        source.REQUIREMENTS: _requirements(),
    }
    reference = None
    if checks.keep_reference:
        reference = codec.program(planned.prepared, buckets[0], captured.values(buckets[0]))
    written = writer.write(
        output,
        described,
        programs,
        texts,
        signature,
        reference=reference,
        force=force,
        attach=partial(prepared.attach, described) if prepared else None,
    )
    if checks.report is not None:
        errors, evidence = checked.nodes(planned.prepared, programs, validation)
        about = report_module.About.of(written, str(output))
        pictures = checked.samples.pictures[:1] if checked.samples is not None else ()
        outcome = accuracy | {"nodes": nodes.entries(errors), "node_bucket": validation.worst_bucket}
        report_module.save(checks.report, outcome, about, validation, errors, evidence, pictures, repaired)
    progress("done", len(steps), len(steps))
    if not validation.passed:
        no_repair = f". There is {repaired.said}" if repaired is not None else ""
        raise AccuracyError(
            f"{validation.failures()}{no_repair}",
            where=str(output),
            hint="The bundle is marked as not deployable; see its report.json",
        )
    return written


def _translate(programs: Sequence[codec.Program], signature: Mapping[str, Any], onnx: Options) -> Prepared:
    from armopt.onnx_export import export  # onnx and onnxscript take a second to import

    return export.prepare(programs, signature, onnx)


def find_target(target: str | Target) -> Target:
    """A target by name; ``host`` is this machine."""
    if isinstance(target, Target):
        return target
    return targets.host() if target == "host" else targets.load(target)


def _capture(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    batch: Sequence[int],
) -> Captured:
    if isinstance(model, Captured):
        return model
    if isinstance(model, (str, Path)):
        samples = dict(example_inputs) if isinstance(example_inputs, Mapping) else None
        return sources.open_model(Path(model), sources.Options(samples=samples, batch=tuple(batch)))
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = None if example_inputs is None else () if kwargs else tuple(example_inputs)
    if isinstance(model, torch.export.ExportedProgram):
        return capture.exported(model, args, kwargs, source="exported program")
    if args is None:
        raise InputError("the model needs example inputs", where=type(model).__name__, hint="Pass example_inputs=(x,)")
    return capture.module(model, args, kwargs, batch=batch, source=type(model).__name__)


def find_buckets(captured: Captured, batch: Sequence[int]) -> tuple[Bucket, ...]:
    """The points to plan for: `batch` along the first dimension, the example's sizes along all others."""
    if not captured.symbols:
        return ({},)
    sizes: dict[str, int] = {}
    for spec, tensor in zip(captured.input_specs, captured.example, strict=True):
        sizes |= {size: tensor.shape[d] for d, size in enumerate(spec.shape) if isinstance(size, str)}
    example = {symbol.name: sizes[symbol.name] for symbol in captured.symbols}
    if not batch or "batch" not in example:
        return (example,)
    return tuple(example | {"batch": size} for size in sorted(set(batch)))


def _describe(
    planned: Planned,
    programs: Sequence[codec.Program],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: Mapping[str, Any],
) -> manifest.Manifest:
    captured, target = planned.captured, planned.target
    weights = writer.collect_weights(programs)
    half = any(entry.precision.startswith("bf16") for each in planned.plans for entry in each.decisions)
    host = target.name == "host"
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION,
        armopt_version=armopt.__version__,
        target=target.name,
        machine=platform.machine() if host else "aarch64",
        required_features=("bf16",) if half and target.bf16 else (),
        environment={name: asdict(variable) for name, variable in variables.items()},
        versions=environment.record(),
        files={},
        model={
            "source": captured.source,
            "digest": captured.digest,
            "inputs": [asdict(spec) | {"shape": list(spec.shape)} for spec in captured.input_specs],
            "symbols": [asdict(symbol) for symbol in captured.symbols],
        },
        plan=tuple(
            {
                "bucket": dict(each.bucket),
                "policy": each.policy,
                "nodes": [asdict(entry) | {"shape": list(entry.shape)} for entry in each.decisions],
            }
            for each in planned.plans
        ),
        accuracy={name: accuracy[name] for name in _RECORDED},
        onnxruntime=onnxruntime,
        weights={
            "bytes": sum(_size(tensor) for tensor in weights.values()),
            "fp32_bytes": sum(_size(tensor) for tensor in captured.graph_module.buffers()),
        },
        refused=tuple(asdict(skip) for skip in planned.refused),
    )


#: What the manifest says of accuracy; report.json has the rest.
_RECORDED = (
    *("cosine", "max_abs", "finite", "min_cosine", "passed", "reference"),
    *("gates", "inputs", "inputs_given", "task", "repair"),
)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _record(record: pipeline.Record) -> dict[str, Any]:
    skipped = [asdict(skip) for skip in record.skipped]
    return {"name": record.name, "rewritten": list(record.rewritten), "skipped": skipped}


def _requirements() -> str:
    """Versions to install on the server: this armopt, and a torch that armopt knows."""
    return f"armopt=={armopt.__version__}\ntorch>=2.10,<2.14\nsafetensors\nnumpy\n"
