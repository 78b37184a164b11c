"""`optimize`: capture -> annotate shapes -> plan -> rewrite -> validate -> bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

import armopt
from armopt import capture, cost_policy, environment, inputs, passes, pipeline, plan, repair, sites, sources, targets
from armopt import graph as g
from armopt.accuracy import MIN_COSINE, Checker, NodeError, Validation, bucket_name, gates, nodes, runs, samples
from armopt.accuracy import report as report_module
from armopt.accuracy.checker import Evidence, Run, flat_run
from armopt.accuracy.samples import Given
from armopt.accuracy.tasks import Outputs
from armopt.accuracy.validation import check_report_place
from armopt.bundle import codec, manifest, source, writer
from armopt.errors import AccuracyError, InputError
from armopt.ir import Bucket, Captured, Plan, Skip, Target
from armopt.repair import EVALUATIONS

#: Told the name of each step and how many there are.
Progress = Callable[[str, int, int], None]


def _silent(step: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Checks:
    """What has to hold before a bundle may be deployed, and what is done where it does not.

    Attributes:
        gates: Bounds besides the cosine: ``top1>=0.995``.
        task: Whose metrics to measure; found from the outputs where empty.
        inputs: What to measure on: a file or folder, or tensors; the example inputs where None.
        repair: Whether layers that break a gate go back to FP32.
        evaluations: How many plans repair may measure.
        keep_reference: Whether the bundle keeps the FP32 original, so that `validate` needs nothing else.
        report: Where to write an HTML report.
    """

    gates: tuple[str, ...] = ()
    task: str = ""
    inputs: Given | None = None
    repair: bool = True
    evaluations: int = EVALUATIONS
    keep_reference: bool = False
    report: Path | None = None


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
    return tuple(_lower_one(planned, each, rounded) for each in planned.plans)


def _lower_one(planned: Planned, each: Plan, rounded: dict[str, torch.Tensor]) -> codec.Program:
    module, _ = pipeline.run(g.copy(planned.prepared), passes.lower(each, rounded))
    return codec.program(module, each.bucket, planned.captured.values(each.bucket))


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
        progress: Told of each step.

    Returns:
        The manifest, as in the bundle.

    Raises:
        InputError: The model, an input or the place is unusable.
        CaptureError: torch.export can't take the model whole.
        AccuracyError: The gate failed; the bundle is written and marked as not deployable.
    """
    output = Path(output)
    writer.check_place(output, force=force)
    if checks.report is not None:
        check_report_place(checks.report)
    bounds = gates.standard(checks.gates, min_cosine)
    chosen = find_target(target)
    policy = policy or cost_policy.default(chosen)
    steps = ("capture", "plan", "rewrite", "validate", "write")

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
    checked = _Checked(captured, buckets, bounds, checks)
    validation = checked.validate(programs)
    repaired = None
    if not validation.passed and checks.repair:
        repaired = checked.repair(planned, programs, rounded, progress)
        if repaired.passed:
            planned = replace(planned, plans=repaired.plans)
            programs = lower(planned, rounded)
            validation = checked.validate(programs)
    step("write")
    accuracy = validation.to_json() | {"repair": None if repaired is None else repaired.to_json()}
    variables = environment.variables(chosen)
    described = _describe(planned, programs, accuracy, variables)
    texts = {
        source.REPORT: writer.to_json(accuracy | {"passes": [_record(record) for record in planned.records]}),
        source.ENV: environment.render(variables, "shell"),
        source.REQUIREMENTS: _requirements(),
    }
    signature: dict[str, Any] = {
        "inputs": captured.inputs,
        "outputs": captured.outputs,
        "specs": [
            asdict(spec) | {"statistics": inputs.statistics(tensor)}
            for spec, tensor in zip(captured.input_specs, captured.example, strict=True)
        ],
        "symbols": [asdict(symbol) for symbol in captured.symbols],
    }
    reference = None
    if checks.keep_reference:
        reference = codec.program(planned.prepared, buckets[0], captured.values(buckets[0]))
    written = writer.write(output, described, programs, texts, signature, reference=reference, force=force)
    if checks.report is not None:
        errors, evidence = checked.nodes(planned.prepared, programs, validation)
        about = report_module.About.of(written, str(output))
        pictures = checked.samples.pictures[:1] if checked.samples is not None else ()
        report_module.write(
            checks.report, report_module.render(about, validation, errors, evidence, pictures, repaired)
        )
    progress("done", len(steps), len(steps))
    if not validation.passed:
        no_repair = f". There is {repaired.said}" if repaired is not None else ""
        raise AccuracyError(
            f"{validation.failures()}{no_repair}",
            where=str(output),
            hint="The bundle is marked as not deployable; see its report.json",
        )
    return written


class _Checked:
    """Measures programs of one captured model, on the user's inputs or on the example's, batch by batch."""

    def __init__(
        self, captured: Captured, buckets: Sequence[Bucket], bounds: Sequence[gates.Gate], checks: Checks
    ) -> None:
        self._captured, self._checks = captured, checks
        self._order = [spec.name for spec in captured.input_specs]
        graph_module = captured.graph_module
        self._checker = Checker(
            reference=self._named(lambda tensors: runs.run(graph_module, tensors)),
            anchor=self._named(lambda tensors: runs.run(graph_module, tensors, runs.InFp64)),
            gates=tuple(bounds),
            task=checks.task,
            source=captured.source,
            keep=checks.repair,
        )
        self.samples = None
        if checks.inputs is not None:
            specs = [asdict(spec) for spec in captured.input_specs]
            self.samples = samples.read(checks.inputs, specs, captured.source)
        self._buckets = tuple(buckets)

    def validate(self, programs: Sequence[codec.Program]) -> Validation:
        """Figures of every bucket, and the verdicts."""
        figures = {bucket_name(program.bucket): self._figures(program) for program in programs}
        given = self.samples
        return Validation(
            reference="the model in FP32",
            inputs="the model's example inputs" if given is None else given.said,
            given=given is not None,
            samples=1 if given is None else len(given),
            ran="portable twins on this host",
            figures=figures,
            verdicts=self._checker.verdicts(figures),
            task=self._checker.task_name,
            task_why=self._checker.task_why,
            no_anchor=self._checker.no_anchor,
        )

    def repair(
        self,
        planned: Planned,
        programs: Sequence[codec.Program],
        rounded: dict[str, torch.Tensor],
        progress: Progress,
    ) -> repair.Repair:
        """Takes out of BF16 what breaks a gate."""
        by_bucket = {bucket_name(program.bucket): program for program in programs}

        def alone(each: Plan, node: str) -> gates.Figures:
            program = by_bucket[bucket_name(each.bucket)]
            only = nodes.OnlyThese(planned.prepared, program, {node})

            def run(tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
                with runs.true_fp32(), runs.unchanged_buffers(planned.prepared):
                    outputs: Sequence[Any] = only.run(*tensors)
                    return outputs

            return self._checker.figures(bucket_name(each.bucket), self._inputs(each.bucket), self._named(run))

        return repair.search(
            planned.plans,
            [program.sites for program in programs],
            self._checker.gates,
            lambda each: self._figures(_lower_one(planned, each, rounded)),
            alone,
            evaluations=self._checks.evaluations,
            progress=lambda done, most: progress("repair", done, most),
        )

    def nodes(
        self, prepared: fx.GraphModule, programs: Sequence[codec.Program], validation: Validation
    ) -> tuple[list[NodeError], Evidence]:
        """The errors of every layer in the worst bucket, and a call of both sides."""
        worst = validation.worst_bucket
        program = next(program for program in programs if bucket_name(program.bucket) == worst)
        evidence = self._checker.evidence[worst]
        return nodes.errors(program, prepared, [evidence.inputs[name] for name in self._order]), evidence

    def _figures(self, program: codec.Program) -> gates.Figures:
        found = self._named(lambda tensors: runs.run(program.graph_module, tensors))
        return self._checker.figures(bucket_name(program.bucket), self._inputs(program.bucket), found)

    def _inputs(self, bucket: Bucket) -> Iterable[Outputs]:
        if self.samples is not None:
            return self.samples
        return [dict(zip(self._order, example_at(self._captured, bucket), strict=True))]

    def _named(self, run: Callable[[Sequence[torch.Tensor]], Sequence[Any]]) -> Run:
        return flat_run(run, self._order, self._captured.outputs)


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


def example_at(captured: Captured, bucket: Bucket) -> tuple[torch.Tensor, ...]:
    """The example inputs, repeated or cut along the batch to a bucket's size."""
    tensors = []
    for spec, tensor in zip(captured.input_specs, captured.example, strict=True):
        for dimension, size in enumerate(spec.shape):
            if size == "batch" and "batch" in bucket:
                repeats = [1] * tensor.dim()
                repeats[dimension] = -(-bucket["batch"] // tensor.shape[dimension])
                tensor = tensor.repeat(repeats).narrow(dimension, 0, bucket["batch"])
        tensors.append(tensor.contiguous())
    return tuple(tensors)


def _describe(
    planned: Planned,
    programs: Sequence[codec.Program],
    accuracy: Mapping[str, Any],
    variables: Mapping[str, environment.Variable],
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
