"""`optimize`: capture -> annotate shapes -> plan -> rewrite -> validate -> bundle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

import armopt
from armopt import capture, cost_policy, costs, environment, inputs, passes, pipeline, plan, sites, sources, targets
from armopt import graph as g
from armopt.accuracy import MIN_COSINE, Validation, gates, nodes
from armopt.accuracy import report as report_module
from armopt.bundle import codec, manifest, source, writer
from armopt.checks import Checked, Checks
from armopt.errors import AccuracyError, InputError
from armopt.ir import Bucket, Captured, Plan, Skip, Target
from armopt.onnx_export import session
from armopt.onnx_export.options import Options
from armopt.repair import Repair
from armopt.tuning import TunedCosts
from armopt.tuning import read as read_tuning

if TYPE_CHECKING:
    from armopt.onnx_export.export import Prepared

_RELEASE = r"(\d+\.\d+(\.\d+)?)?"
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
        return tuple(dict.fromkeys([*passed_over(self.records), *(s for each in self.plans for s in each.refused)]))


def make_plan(
    captured: Captured,
    target: Target,
    policy: plan.Policy,
    buckets: Sequence[Bucket],
) -> Planned:
    """Prepares a captured model and plans each bucket."""
    prepared, records = prepare(captured.graph_module)
    plans = tuple(plan_at(prepared, target, policy, bucket, captured.values(bucket)) for bucket in buckets)
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


def prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[pipeline.Record, ...]]:
    """What is true of a graph whatever the shapes; the graph itself stays as it was."""
    return pipeline.run(g.copy(graph_module), passes.PREPARE)


def passed_over(records: Sequence[pipeline.Record]) -> tuple[Skip, ...]:
    """The products and convolutions that are no Linear or convolution with constant weights."""
    names = ("CanonicaliseLinear", "CanonicaliseConv")
    return tuple(skip for record in records if record.name in names for skip in record.skipped)


def plan_at(prepared: fx.GraphModule, target: Target, policy: plan.Policy, bucket: Bucket, values: Bucket) -> Plan:
    """The plan of a prepared graph at a bucket (`values`: the same by the graph's own symbols)."""
    return plan.make(sites.find(prepared, values), target, policy, bucket)


def lower_at(prepared: fx.GraphModule, chosen: Plan, values: Bucket, rounded: dict[str, torch.Tensor]) -> codec.Program:
    """Carries out one plan on a copy of the graph; plans of one graph share `rounded`."""
    module, _ = pipeline.run(g.copy(prepared), passes.lower(chosen, rounded))
    return codec.program(module, chosen.bucket, values)


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | sources.Whole | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    kind: Literal["graph", "module"] = "graph",
    output: str | Path,
    target: str | Target = "graviton3",
    batch: Sequence[int] = (),
    policy: plan.Policy | str | None = None,
    min_cosine: float = MIN_COSINE,
    checks: Checks = Checks(),
    force: bool = False,
    onnx: Options | None = None,
    progress: Progress = _silent,
) -> manifest.Manifest:
    """Optimizes a model for a target and writes a bundle.

    Args:
        model: A module, an exported program, or the path of a model file.
        example_inputs: Positional inputs as a sequence, or named ones as a mapping; a file may have its own. Of kind
            "module": a sequence of calls, each a tuple of positional inputs; sizes that differ between them may vary.
        kind: "graph" for the whole model in one graph. "module" for a module that can't be captured whole: its parts
            become graphs, and the Python between them stays in the model's own code (see docs/compile.md).
        output: Where the bundle goes; a folder, or one file where it ends in .zip.
        target: A product's name (see ``armopt targets``), or ``host``.
        batch: Sizes of the first dimension to plan for; several make it dynamic.
        policy: How kernels are chosen, also as ``--policy`` has it; by cost where there is a table for the core.
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
    if kind == "module":
        if not isinstance(model, torch.nn.Module):
            raise InputError('kind "module" needs an nn.Module', where=type(model).__name__, hint="Pass the module")
        model = sources.Whole(model, tuple((tuple(args), {}) for args in example_inputs or ()))
    if isinstance(model, sources.Whole):
        from armopt import module_bundle  # which is made of the functions of this module

        return module_bundle.optimize(
            model,
            Path(output),
            find_target(target),
            policy,
            min_cosine=min_cosine,
            checks=checks,
            force=force,
            onnx=onnx,
            progress=progress,
        )
    output = Path(output)
    writer.check_place(output, force=force)
    if checks.report is not None:
        report_module.check_place(checks.report)
    bounds = gates.standard(checks.gates, min_cosine)
    chosen = find_target(target)
    policy = find_policy(policy, chosen)
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
    planned, programs, validation, repaired = check(planned, programs, rounded, checked, checks.repair, progress)
    signed = signature(captured)
    prepared = None
    if onnx:
        step("onnx")
        prepared = _translate(programs, signed, onnx)
    step("write")
    accuracy = validation.to_json() | {"repair": None if repaired is None else repaired.to_json()}
    variables = environment.variables(chosen)
    described = _describe(planned, programs, accuracy, variables, session.describe(programs, onnx, inside=True))
    reference = None
    if checks.keep_reference:
        reference = codec.program(planned.prepared, buckets[0], captured.values(buckets[0]))
    written = writer.write(
        output,
        described,
        programs,
        texts(accuracy, [planned], variables),
        signed,
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
    gate(accuracy, output)
    return written


def check(
    planned: Planned,
    programs: tuple[codec.Program, ...],
    rounded: dict[str, torch.Tensor],
    checked: Checked,
    may_repair: bool,
    progress: Progress,
) -> tuple[Planned, tuple[codec.Program, ...], Validation, Repair | None]:
    """Measures programs and, where a gate breaks and it helps, takes layers out of BF16.

    Args:
        planned: The plans.
        programs: Those carried out.
        rounded: Weights in BF16 by name, as `programs` share them.
        checked: Measures.
        may_repair: Whether plans may change.
        progress: Told of each measurement of repair.

    Returns:
        Plans and programs as they are to be written, their figures, and what repair did; None where nothing broke.
    """
    validation = checked.validate(programs)
    if validation.passed or not may_repair:
        return planned, programs, validation, None
    repaired = checked.repair(
        planned.prepared,
        planned.plans,
        programs,
        lambda each: lower_at(planned.prepared, each, planned.captured.values(each.bucket), rounded),
        lambda done, most: progress("repair", done, most),
    )
    if not repaired.passed:
        return planned, programs, validation, repaired
    better = replace(planned, plans=repaired.plans)
    programs = lower(better, rounded)
    return better, programs, checked.validate(programs), repaired


def _translate(programs: Sequence[codec.Program], signature: Mapping[str, Any], onnx: Options) -> Prepared:
    from armopt.onnx_export import export  # onnx and onnxscript take a second to import

    return export.prepare(programs, signature, onnx)


def find_target(target: str | Target) -> Target:
    """A target by name; ``host`` is this machine."""
    if isinstance(target, Target):
        return target
    return targets.host() if target == "host" else targets.load(target)


def find_policy(
    policy: plan.Policy | str | None, target: Target, tuning: Path | None = None, where: str = "policy"
) -> plan.Policy:
    """A policy for a target, also from ``cost``, ``cost=2.13`` (a torch release), ``threshold`` or ``threshold=64``.

    Args:
        policy: A policy or its text; None is the default.
        target: What it is for.
        tuning: Times of this host, which count instead of the cost table.
        where: What to call the option in an error.

    Raises:
        InputError: There is no such policy.
    """
    if policy is not None and not isinstance(policy, str):
        return policy
    name, _, value = (policy or "cost").partition("=")
    release = value if name == "cost" else ""
    if name not in ("cost", "threshold") or not re.fullmatch(_RELEASE if name == "cost" else r"\d*", value):
        hint = "Write cost, cost=2.10 (the server's torch), threshold or threshold=ROWS"
        raise InputError(f"unknown policy {policy!r}", where=where, hint=hint)
    if tuning is not None:
        return cost_policy.CostPolicy(TunedCosts(read_tuning(tuning), costs.find(target, release)))
    if name == "cost":
        return cost_policy.default(target, release)
    return plan.ThresholdPolicy(int(value)) if value else plan.ThresholdPolicy()


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
    captured = planned.captured
    model = {"source": captured.source, "digest": captured.digest, **inputs_of(captured)}
    sizes = {
        "bytes": size(writer.collect_weights(programs).values()),
        "fp32_bytes": size(captured.graph_module.buffers()),
    }
    return describe({"": planned}, model, sizes, accuracy, variables, onnxruntime)


def inputs_of(captured: Captured) -> dict[str, Any]:
    """The inputs and symbols of a graph as the manifest has them."""
    return {
        "inputs": [asdict(spec) | {"shape": list(spec.shape)} for spec in captured.input_specs],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }


def describe(
    planned: Mapping[str, Planned],
    model: Mapping[str, Any],
    weights: Mapping[str, int],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
    onnxruntime: Mapping[str, Any],
    left: Sequence[Skip] = (),
) -> manifest.Manifest:
    """A manifest without files.

    Args:
        planned: By path of the part; the whole model's is empty.
        model: What it says of the model.
        weights: Bytes in the bundle and in FP32.
        accuracy: The report.
        variables: Wanted of the environment.
        onnxruntime: The manifest's section of that name.
        left: What is left to Python.
    """
    target = next(iter(planned.values())).target
    plans = [(path, each) for path, whole in planned.items() for each in whole.plans]
    half = any(entry.precision.startswith("bf16") for _, each in plans for entry in each.decisions)
    return manifest.Manifest(
        schema_version=manifest.SCHEMA_VERSION if model.get("kind") == "module" else 1,
        armopt_version=armopt.__version__,
        target=target.name,
        machine=targets.machine(target),
        required_features=("bf16",) if half and target.bf16 else (),
        environment={name: asdict(variable) for name, variable in variables.items()},
        versions=environment.record(),
        files={},
        model=model,
        plan=tuple(
            {
                **({"part": path} if path else {}),
                "bucket": dict(each.bucket),
                "policy": each.policy,
                "nodes": [asdict(entry) | {"shape": list(entry.shape)} for entry in each.decisions],
            }
            for path, each in plans
        ),
        accuracy={name: accuracy[name] for name in _RECORDED},
        onnxruntime=onnxruntime,
        weights=weights,
        refused=tuple(
            asdict(replace(skip, node=f"{path}: {skip.node}") if path else skip)
            for path, whole in planned.items()
            for skip in whole.refused
        )
        + tuple(asdict(skip) for skip in left),
    )


#: What the manifest says of accuracy; report.json has the rest.
_RECORDED = (
    *("cosine", "max_abs", "finite", "min_cosine", "passed", "reference"),
    *("gates", "inputs", "inputs_given", "task", "repair"),
)


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def signature(captured: Captured) -> dict[str, Any]:
    """What a bundle holds of a graph beside its programs."""
    return {
        "inputs": captured.inputs,
        "outputs": captured.outputs,
        "specs": [
            asdict(spec) | {"statistics": inputs.statistics(tensor)}
            for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
        ],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }


def texts(
    accuracy: Mapping[str, Any], planned: Iterable[Planned], variables: Mapping[str, environment.Variable]
) -> dict[str, str]:
    """The files of a bundle that are for people and shells."""
    passed = [_record(record) for each in planned for record in each.records]
    return {
        source.REPORT: writer.to_json({**accuracy, "passes": passed}),
        source.ENV: environment.render(variables, "shell"),
        source.REQUIREMENTS: _requirements(),
    }


def gate(accuracy: Mapping[str, Any], output: Path) -> None:
    """Refuses a bundle that is written but not accurate enough.

    Raises:
        AccuracyError: It is not.
    """
    if not accuracy["passed"]:
        no_repair = f". There is {accuracy['repair']['said']}" if accuracy["repair"] is not None else ""
        raise AccuracyError(
            f"{accuracy['failed']}{no_repair}",
            where=str(output),
            hint="The bundle is marked as not deployable; see its report.json",
        )


def _record(record: pipeline.Record) -> dict[str, Any]:
    skipped = [asdict(skip) for skip in record.skipped]
    return {"name": record.name, "rewritten": list(record.rewritten), "skipped": skipped}


def _requirements() -> str:
    """Versions to install on the server: this armopt, and a torch that armopt knows."""
    return f"armopt=={armopt.__version__}\ntorch>=2.10,<2.14\nsafetensors\nnumpy\n"
