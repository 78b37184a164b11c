"""What has to hold of programs before they are written, and what is done where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from armopt.accuracy import Checker, NodeError, Validation, bucket_name, gates, nodes, runs, samples
from armopt.accuracy.checker import Evidence, Run, flat_run
from armopt.accuracy.samples import Given
from armopt.accuracy.tasks import Outputs
from armopt.bundle.program import Program
from armopt.compiler import repair
from armopt.compiler.repair import EVALUATIONS
from armopt.ir.records import Bucket, Captured, Plan


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
        report: Where to write a report: HTML, or JSON where the name ends in .json.
        examples: What the example inputs are, in words.
    """

    gates: tuple[str, ...] = ()
    task: str = ""
    inputs: Given | None = None
    repair: bool = True
    evaluations: int = EVALUATIONS
    keep_reference: bool = False
    report: Path | None = None
    examples: str = "the example inputs, as given"


class Checked:
    """Measures programs of one captured model, on the user's inputs or on the example's, batch by batch."""

    def __init__(self, captured: Captured, bounds: Sequence[gates.Gate], checks: Checks) -> None:
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
            self.samples = samples.read(checks.inputs, captured.input_specs, captured.source)

    def validate(self, programs: Sequence[Program]) -> Validation:
        """Figures of every bucket, and the verdicts."""
        figures = {bucket_name(program.bucket): self._figures(program) for program in programs}
        given = self.samples
        return Validation(
            reference="the model in FP32",
            inputs=self._checks.examples if given is None else given.said,
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
        prepared: fx.GraphModule,
        plans: Sequence[Plan],
        programs: Sequence[Program],
        lower: Callable[[Plan], Program],
        progress: repair.Progress,
    ) -> repair.Repair:
        """Takes out of BF16 what breaks a gate.

        Args:
            prepared: The FP32 graph that plans are carried out on.
            plans: One for each bucket.
            programs: Those plans carried out.
            lower: Carries out another plan.
            progress: Told of each measurement.
        """
        by_bucket = {bucket_name(program.bucket): program for program in programs}

        def alone(each: Plan, node: str) -> gates.Figures:
            name = bucket_name(each.bucket)
            only = nodes.OnlyThese(prepared, by_bucket[name], {node})
            found = self._named(lambda tensors: runs.run_with(only, tensors))
            return self._checker.figures(name, self._inputs(each.bucket), found)

        return repair.search(
            plans,
            [program.sites for program in programs],
            self._checker.gates,
            lambda each: self._figures(lower(each)),
            alone,
            evaluations=self._checks.evaluations,
            progress=progress,
        )

    def nodes(
        self, prepared: fx.GraphModule, programs: Sequence[Program], validation: Validation
    ) -> tuple[list[NodeError], Evidence]:
        """The errors of every layer in the worst bucket, and a call of both sides."""
        worst = validation.worst_bucket
        program = next(program for program in programs if bucket_name(program.bucket) == worst)
        evidence = self._checker.evidence[worst]
        return nodes.errors(program, prepared, [evidence.inputs[name] for name in self._order]), evidence

    def _figures(self, program: Program) -> gates.Figures:
        found = self._named(lambda tensors: runs.run(program.graph_module, tensors))
        return self._checker.figures(bucket_name(program.bucket), self._inputs(program.bucket), found)

    def _inputs(self, bucket: Bucket) -> Iterable[Outputs]:
        if self.samples is not None:
            return self.samples
        return [dict(zip(self._order, example_at(self._captured, bucket), strict=True))]

    def _named(self, run: Callable[[Sequence[torch.Tensor]], Sequence[Any]]) -> Run:
        return flat_run(run, self._order, self._captured.outputs)


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
