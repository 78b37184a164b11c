"""What has to hold of programs before they may be deployed, and what is done where it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from armopt import progress
from armopt.accuracy import MIN_COSINE, Checker, NodeError, Validation, bucket_name, gates, nodes, runs, samples
from armopt.accuracy.checker import Evidence, Run, flat_run
from armopt.accuracy.fidelity import Fidelity
from armopt.accuracy.gates import Figures, Gate
from armopt.accuracy.samples import Given
from armopt.accuracy.tasks import Outputs
from armopt.bundle.program import Program
from armopt.capture import dimensions
from armopt.capture.eager import Eager
from armopt.compiler import repair
from armopt.compiler.recipe import Planned, Recipe
from armopt.compiler.repair import EVALUATIONS, Repair
from armopt.errors import InputError
from armopt.ir import buckets
from armopt.ir.records import Bucket, Captured, Plan

#: From flat inputs to flat outputs.
FlatRun = Callable[[Sequence[torch.Tensor]], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Checks:
    """What has to hold before a bundle may be deployed, and what is done where it does not.

    Attributes:
        gates: Bounds besides the cosine: ``top1>=0.995``.
        task: Whose metrics to measure; found from the outputs where empty.
        inputs: What to measure on: a file or folder, or tensors; the example inputs where None.
        min_cosine: The least cosine similarity to FP32 of any output.
        repair: Whether layers that break a gate go back to FP32.
        evaluations: How many plans repair may measure.
        batch_invariant: Whether results may not depend on the rows that came with a row, to the bit: then one size of
            the batch is planned for, the largest, and every call runs in pieces of so many rows.
        keep_fp32: Patterns on names of layers that stay in FP32: ``("head", "encoder.layers.0.*")``.
        against: What FP32 is: ``model``, the module as its user calls it, from which a capture that differs fails;
            or ``capture``, the graph that torch.export made of it.
        first_call: Of :func:`armopt.compile` without example inputs: whether the first call is checked.
        examples: What the example inputs are, in words.
    """

    gates: tuple[str, ...] = ()
    task: str = ""
    inputs: Given | None = None
    min_cosine: float = MIN_COSINE
    repair: bool = True
    evaluations: int = EVALUATIONS
    against: str = "model"
    first_call: bool = False
    batch_invariant: bool = False
    keep_fp32: tuple[str, ...] = ()
    examples: str = "the example inputs, as given"

    def __post_init__(self) -> None:
        if isinstance(self.keep_fp32, str) or not all(isinstance(each, str) for each in self.keep_fp32):
            hint = 'Give patterns as a tuple of text: keep_fp32=("head", "layers.0.*")'
            raise InputError(f"is {self.keep_fp32!r}, no sequence of patterns", where="keep_fp32", hint=hint)
        if self.against not in ("model", "capture"):
            raise InputError(f"can't compare with {self.against!r}", where="against", hint='Write "model" or "capture"')

    def bounds(self) -> tuple[Gate, ...]:
        """All gates.

        Raises:
            InputError: One can't be read.
        """
        return tuple(gates.standard(self.gates, self.min_cosine))


@dataclass(frozen=True, slots=True)
class Judged:
    """A part of a model as it is to be written.

    Attributes:
        planned: Its plans, repaired where that was needed.
        programs: Those carried out.
        validation: What was measured of them.
        repair: What repair did; None where nothing broke.
        judge: Who measured.
    """

    planned: Planned
    programs: tuple[Program, ...]
    validation: Validation
    repair: Repair | None
    judge: Judge = field(repr=False)


class Judge:
    """Measures programs of one captured graph, on the user's inputs or on the example's, batch by batch."""

    def __init__(self, captured: Captured, bounds: Sequence[Gate], checks: Checks) -> None:
        self._captured, self._checks = captured, checks
        self._order = [spec.name for spec in captured.input_specs]
        graph_module = captured.graph_module
        eager = captured.eager if checks.against == "model" and isinstance(captured.eager, Eager) else None
        captured_run = functools.partial(runs.run, graph_module)
        self._said = "the captured graph in FP32" if eager is None else "the model in FP32"
        self._checker = Checker(
            reference=self._named(captured_run if eager is None else functools.partial(runs.run_eager, eager)),
            anchor=self._named(lambda tensors: runs.run(graph_module, tensors, runs.InFp64)),
            gates=tuple(bounds),
            task=checks.task,
            source=captured.source,
            keep=checks.repair,
            fidelity=None if eager is None else Fidelity(eager, captured),
        )
        self.samples = None
        if checks.inputs is not None:
            self.samples = samples.read(checks.inputs, captured.input_specs, captured.source)

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a row may depend on no other row."""
        return self._checks.batch_invariant

    def judge(self, recipe: Recipe, planned: Planned, programs: tuple[Program, ...]) -> Judged:
        """Measures programs and, where a gate breaks and the checks allow it, takes layers out of BF16."""
        validation = self.validate(programs)
        if validation.passed or validation.difference or not self._checks.repair:
            return Judged(planned, programs, validation, None, self)
        repaired = self.repair(recipe, planned, programs)
        if not repaired.passed:
            return Judged(planned, programs, validation, repaired, self)
        better = replace(planned, plans=repaired.plans)
        programs = recipe.lower_part(better)
        return Judged(better, programs, self.validate(programs), repaired, self)

    def validate(self, programs: Sequence[Program]) -> Validation:
        """Figures of every bucket, and the verdicts."""
        figures = {bucket_name(program.bucket): self._figures(program) for program in programs}
        given = self.samples
        return Validation(
            reference=self._said,
            inputs=self._checks.examples if given is None else given.said,
            given=given is not None,
            samples=1 if given is None else len(given),
            ran="portable twins on this host",
            figures=figures,
            verdicts=self._checker.verdicts(figures),
            task=self._checker.task_name,
            task_why=self._checker.task_why,
            no_anchor=self._checker.no_anchor,
            difference="" if self._checker.difference is None else str(self._checker.difference),
        )

    def repair(self, recipe: Recipe, planned: Planned, programs: Sequence[Program]) -> Repair:
        """Takes out of BF16 what breaks a gate."""
        prepared = planned.prepared.graph_module
        by_bucket = {bucket_name(program.bucket): program for program in programs}

        def evaluate(plan: Plan) -> Figures:
            return self._figures(recipe.lower_part(planned, [plan])[0])

        def alone(plan: Plan, node: str) -> Figures:
            name = bucket_name(plan.bucket)
            only = nodes.OnlyThese(prepared, by_bucket[name], {node})
            found = self._named(lambda tensors: runs.run_with(only, tensors))
            return self._checker.figures(name, self._inputs(plan.bucket), found)

        return repair.search(
            planned.plans,
            [program.sites for program in programs],
            self._checker.gates,
            evaluate,
            alone,
            evaluations=self._checks.evaluations,
            progress=lambda done, most: progress.report("repair", done, most),
        )

    def nodes(self, judged: Judged) -> tuple[list[NodeError], Evidence]:
        """The errors of every layer in the worst bucket, and a call of both sides."""
        worst = judged.validation.worst_bucket
        program = next(program for program in judged.programs if bucket_name(program.bucket) == worst)
        evidence = self._checker.evidence[worst]
        inputs = [evidence.inputs[name] for name in self._order]
        return nodes.errors(program, judged.planned.prepared.graph_module, inputs), evidence

    def _figures(self, program: Program) -> Figures:
        found = self._named(lambda tensors: runs.run(program.graph_module, tensors))
        return self._checker.figures(bucket_name(program.bucket), self._inputs(program.bucket), found)

    def _inputs(self, bucket: Bucket) -> Iterable[Outputs]:
        if self.samples is not None:
            return self.samples
        return [dict(zip(self._order, example_at(self._captured, bucket), strict=True))]

    def _named(self, run: FlatRun) -> Run:
        return flat_run(run, self._order, self._captured.outputs)


def example_at(captured: Captured, bucket: Bucket) -> tuple[torch.Tensor, ...]:
    """The example inputs, repeated or cut along the dimensions that vary to a bucket's sizes."""
    tensors = []
    for spec, tensor in zip(captured.input_specs, captured.example, strict=True):
        wanted = {d: buckets.evaluate(size, bucket) for d, size in enumerate(spec.shape) if isinstance(size, str)}
        sizes = {d: size for d, size in wanted.items() if size is not None}
        tensors.append(dimensions.at_sizes(tensor, sizes).contiguous())
    return tuple(tensors)


def merge_validations(judged: Mapping[str, Judged], bounds: Sequence[Gate]) -> Validation:
    """The figures of all parts, by path, as one outcome."""
    each = {path: part.validation for path, part in judged.items()}
    first = next(iter(each.values()))
    figures = {_in_part(path, name): found for path, part in each.items() for name, found in part.figures.items()}
    return replace(
        first,
        reference=first.reference if set(each) == {""} else "each part of the model in FP32",
        figures=figures,
        verdicts=gates.judge(bounds, figures, first.task),
        no_anchor=next((part.no_anchor for part in each.values() if part.no_anchor), ""),
        difference="; ".join(
            f"{path}: {part.difference}" if path else part.difference for path, part in each.items() if part.difference
        ),
    )


def merge_repairs(judged: Mapping[str, Judged]) -> dict[str, Any] | None:
    """What repair did in all parts; where it failed, only that is said; None where nothing broke."""
    repairs = {path: part.repair for path, part in judged.items() if part.repair is not None}
    if not repairs:
        return None
    failed = {path: each for path, each in repairs.items() if not each.passed}
    return {
        "passed": not failed,
        "evaluations": sum(each.evaluations for each in repairs.values()),
        "said": "; ".join(f"{each.said} ({path})" if path else each.said for path, each in (failed or repairs).items()),
        "changes": [
            change | {"node": f"{path}: {change['node']}" if path else change["node"]}
            for path, each in repairs.items()
            for change in each.to_json()["changes"]
        ],
    }


def _in_part(path: str, bucket: str) -> str:
    return f"{path} {bucket}" if path else bucket
