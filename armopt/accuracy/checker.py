"""Runs both sides on samples and collects figures: what `optimize`, `validate` and repair share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from armopt.accuracy import gates as gates_module
from armopt.accuracy import runs, tasks
from armopt.accuracy.fidelity import Difference, Fidelity
from armopt.accuracy.gates import Figures, Gate, Verdict
from armopt.accuracy.metrics import Accuracy, compare, of_other_sizes
from armopt.accuracy.tasks import Outputs, Sample, Task
from armopt.errors import InputError, first_line
from armopt.ir import nesting

#: Samples of which the original is run in FP64 too: enough for a ratio of errors, at twice the time.
ANCHORED = 4
#: A model as a function from named inputs to named outputs.
Run = Callable[[Outputs], Outputs]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One call of both sides, for plots and pictures."""

    inputs: Outputs
    reference: Outputs
    found: Outputs


@dataclass(slots=True)
class Checker:
    """Compares candidates with one reference.

    Attributes:
        reference: The original in FP32.
        anchor: The original in FP64; given up, with the reason in `no_anchor`, where it does not run.
        gates: What has to hold.
        task: Name of the task; found from the outputs where empty.
        source: What to call the original in messages.
        fidelity: Compares the original's capture with it; None where there is none to compare.
        difference: The first difference that was found so.
        keep: Whether to keep what the reference gives for each bucket: candidates are then compared without running it
            again.
    """

    reference: Run
    anchor: Run | None
    gates: tuple[Gate, ...]
    task: str = ""
    source: str = "the original"
    keep: bool = False
    fidelity: Fidelity | None = None
    difference: Difference | None = None
    no_anchor: str = ""
    task_why: str = ""
    evidence: dict[str, Evidence] = field(default_factory=dict)
    _task: type[Task] | None = None
    _memos: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _kept: dict[str, list[tuple[Outputs, Outputs, Outputs | None]]] = field(default_factory=dict)

    def figures(self, bucket: str, samples: Iterable[Outputs], found: Run) -> Figures:
        """Runs a candidate on the samples of a bucket.

        Raises:
            InputError: The original gives NaN alone, or other outputs than the candidate.
        """
        worst: dict[str, Accuracy] = {}
        task: Task | None = None
        for number, (inputs, reference, anchor) in enumerate(self._references(bucket, samples)):
            result = found(inputs)
            if result.keys() != reference.keys():
                raise InputError(
                    f"gives {', '.join(reference)}, the bundle {', '.join(result)}",
                    where=self.source,
                    hint="Is the bundle made from this model?",
                )
            if number == 0:
                self._choose(inputs, reference)
                task = None if self._task is None else self._task()
                self.evidence[bucket] = Evidence(inputs, reference, result)
            left, right = reference, result
            if task is not None:
                memo = self._memos.setdefault((bucket, number), {}) if self.keep else {}
                left, right = self._measure(task, Sample(inputs, reference, result, self.reference, found, memo))
            aligned = anchor if left is reference else None
            for name, a in left.items():
                measure = of_other_sizes if _sizes_differ(a, right[name]) else compare
                entry = measure(name, a, right[name], None if aligned is None else aligned[name])
                worst[name] = entry if name not in worst else worse(worst[name], entry)
        return Figures(tuple(worst.values()), {} if task is None else task.results())

    def _measure(self, task: Task, sample: Sample) -> tuple[Outputs, Outputs]:
        """Gives a sample to a task. Returns both sides' outputs as the task pairs them."""
        reference, result = sample.reference, sample.found
        try:
            with runs.explained(f"{self.task_name} can't be measured on what both sides give"):
                task.update(sample)
                return task.align(reference, result)
        except InputError:
            if any(_sizes_differ(a, result[name]) for name, a in reference.items()):
                return reference, result  # what is compared then says it
            raise

    def verdicts(self, figures: Mapping[str, Figures]) -> tuple[Verdict, ...]:
        """Which gates hold.

        Raises:
            InputError: A gate bounds something that was not measured.
        """
        return gates_module.judge(self.gates, figures, self.task_name)

    @property
    def task_name(self) -> str:
        """The task that is measured; empty where none is."""
        return next((name for name, task in tasks.TASKS.items() if task is self._task), "")

    def _choose(self, inputs: Outputs, outputs: Outputs) -> None:
        if not self.task_why:
            self._task, self.task_why = tasks.task_for(self.task, inputs, outputs)

    def _references(self, bucket: str, samples: Iterable[Outputs]) -> Iterable[tuple[Outputs, Outputs, Outputs | None]]:
        if bucket in self._kept:
            yield from self._kept[bucket]
            return
        kept = []
        for number, inputs in enumerate(samples):
            reference = self.reference(inputs)
            self._check_comparable(reference)
            anchor = self._anchor_of(inputs) if number < ANCHORED else None
            if self.fidelity is not None and self.difference is None and number < ANCHORED:
                self.difference = self.fidelity.check(inputs, reference, anchor)
            if self.difference is not None:
                self.anchor, anchor, self.no_anchor = None, None, "the capture is not the model"
            entry = (inputs, reference, anchor)
            if self.keep:
                kept.append(entry)
            yield entry
        if self.keep:
            self._kept[bucket] = kept

    def _anchor_of(self, inputs: Outputs) -> Outputs | None:
        if self.anchor is None:
            return None
        try:
            return self.anchor(inputs)
        except Exception as error:  # whatever an operation says that has no FP64
            self.anchor = None
            self.no_anchor = first_line(error)
            return None

    def _check_comparable(self, outputs: Outputs) -> None:
        values = [y for y in outputs.values() if y.numel()]
        if values and all(bool(y.isnan().all()) for y in values):
            raise InputError(
                f"gives nothing but NaN in FP32 on these inputs: {', '.join(outputs)}",
                where=self.source,
                hint="Nothing can be compared with that. Give real inputs (--inputs), or mend the model",
            )


def worse(a: Accuracy, b: Accuracy) -> Accuracy:
    """The worse of each figure."""
    noises = [x for x in (a.sqnr_db, b.sqnr_db) if x is not None]
    column = min((x for x in (a, b) if x.column is not None), key=lambda x: x.column or 0.0, default=a)
    ratios = [x for x in (a.rmse_ratio, b.rmse_ratio) if x is not None]
    return replace(
        a,
        cosine=None if a.cosine is None or b.cosine is None else min(a.cosine, b.cosine),
        sqnr_db=min(noises, default=None),
        max_abs=max(a.max_abs, b.max_abs),
        mean_abs=max(a.mean_abs, b.mean_abs),
        max_rel=max(a.max_rel, b.max_rel),
        mean_rel=max(a.mean_rel, b.mean_rel),
        finite=a.finite and b.finite,
        nan=a.nan + b.nan,
        inf=a.inf + b.inf,
        left_out=a.left_out + b.left_out,
        rmse_ratio=max(ratios, default=None),
        column=column.column,
        column_at=column.column_at,
        equal=None if a.equal is None or b.equal is None else min(a.equal, b.equal),
        sizes=a.sizes or b.sizes,
    )


def named(tree: Any) -> Outputs:
    """The tensors among nested results, each by its path: ``logits``, ``0.boxes``."""
    described, tensors = nesting.describe(tree, lambda leaf: isinstance(leaf, torch.Tensor), "outputs")
    names = nesting.output_names(nesting.Outputs(described, tuple(range(len(tensors)))), len(tensors))
    return dict(zip(names, tensors, strict=True))


def named_leaves(tree: Any) -> Outputs:
    """The tensors among any results by path, also inside objects that torch can open and a bundle can't hold."""
    try:
        return named(tree)
    except InputError:
        leaves, _ = torch.utils._pytree.tree_flatten_with_path(tree)
        paths = ((torch.utils._pytree.keystr(path).lstrip(".") or "output", leaf) for path, leaf in leaves)
        return {path: leaf for path, leaf in paths if isinstance(leaf, torch.Tensor)}


def flat_run(
    run: Callable[[Sequence[torch.Tensor]], Sequence[Any]], inputs: Sequence[str], outputs: nesting.Outputs
) -> Run:
    """A run over flat tensors as a run over names, from one seed.

    Args:
        run: From flat inputs to flat outputs.
        inputs: Names of the inputs, in order.
        outputs: How the model's outputs nest.
    """

    def call(given: Outputs) -> Outputs:
        with runs.seeded():
            return runs.name_outputs(outputs, run([given[name] for name in inputs]))

    return call


@dataclass(frozen=True, slots=True)
class Validation:
    """The outcome: figures by bucket, verdicts, and what was compared with what.

    Attributes:
        reference: What was compared with, in words.
        inputs: What both sides ran on, in words.
        given: Whether those are the user's.
        samples: How many in each bucket.
        ran: What was run, in words.
        figures: By bucket.
        verdicts: One for each gate.
        task: Name of the task; empty where there is none.
        task_why: Why that one.
        no_anchor: Why there are no errors against FP64; empty where there are.
        difference: In what the capture is not the model, and why; empty where it is, or was not compared with it.
    """

    reference: str
    inputs: str
    given: bool
    samples: int
    ran: str
    figures: Mapping[str, Figures]
    verdicts: tuple[Verdict, ...]
    task: str = ""
    task_why: str = ""
    no_anchor: str = ""
    difference: str = ""

    @property
    def entries(self) -> list[Accuracy]:
        """Every output in every bucket."""
        return [entry for each in self.figures.values() for entry in each.outputs]

    @property
    def finite(self) -> bool:
        """Whether infinities and NaNs stand where they do in FP32."""
        return all(entry.finite for entry in self.entries)

    @property
    def passed(self) -> bool:
        """Whether the capture is the model, all gates hold, and nothing is NaN or infinite that is not in FP32."""
        return not self.difference and self.finite and all(verdict.passed for verdict in self.verdicts)

    @property
    def worst_bucket(self) -> str:
        """The bucket with the least cosine similarity, or the fewest equal values."""
        return min(self.figures, key=lambda b: min((e.similarity for e in self.figures[b].outputs), default=1.0))

    @property
    def min_cosine(self) -> float | None:
        """What every output's cosine similarity has to reach."""
        return next((v.gate.bound for v in self.verdicts if v.gate.metric == "cosine" and not v.gate.output), None)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the gates do not see, in sentences: errors under a large common value, integers that differ."""
        said: dict[str, str] = {}
        left_out = {entry.output: entry.left_out for entry in self.entries if entry.left_out}
        for entry in sorted(self.entries, key=lambda entry: entry.similarity):
            name, column = entry.output, entry.column
            if entry.sizes:
                said.setdefault(name, entry.sizes)
            elif entry.equal is not None and entry.equal < 1:
                share = f"{100 * entry.equal:.4g} % of the values of {name} equal FP32's"
                said.setdefault(name, f'{share}; --gate "equal[{name}]>=0.99" asks for more')
            elif column is not None and entry.cosine is not None and column < (self.min_cosine or 0) <= entry.cosine:
                where = (
                    f"in {name}{entry.column_at} is {column:.6f}" if entry.column_at else f"of {name} is {column:.6f}"
                )
                said.setdefault(
                    name,
                    f'less its mean, the cosine {where}; --gate "column[{name}]>={self.min_cosine:.15g}" asks for more',
                )
        alike = "are not finite, in FP32 as in BF16, and left out of the figures"
        return (*said.values(), *(f"{count} values of {name} {alike}" for name, count in left_out.items()))

    def failures(self) -> str:
        """What failed, in one sentence; empty where nothing did."""
        said = [
            f"{verdict.gate.metric} is {_figure(verdict.value)}"
            + (f" ({verdict.where})" if verdict.where else "")
            + f", the gate is {verdict.gate.relation}{verdict.gate.bound:.15g}"
            for verdict in self.verdicts
            if not verdict.passed
        ]
        if self.difference:
            said.insert(0, self.difference)
        if not self.finite:
            said.append("values are finite in one of FP32 and BF16 alone, or infinite with another sign")
        return "; ".join(said)

    def to_json(self) -> dict[str, Any]:
        """As report.json has it."""
        numbers = [entry for entry in self.entries if not entry.discrete]
        return {
            "cosine": min((entry.similarity for entry in numbers or self.entries), default=1.0),
            "max_abs": max((entry.max_abs for entry in numbers), default=0.0),
            "finite": self.finite,
            "min_cosine": self.min_cosine,
            "passed": self.passed,
            "failed": self.failures(),
            "gates": [verdict.to_json() for verdict in self.verdicts],
            "reference": self.reference,
            "inputs": self.inputs,
            "inputs_given": self.given,
            "samples": self.samples,
            "ran": self.ran,
            "task": {
                "name": self.task,
                "why": self.task_why,
                "metrics": {bucket: dict(each.task) for bucket, each in self.figures.items()},
            },
            "no_anchor": self.no_anchor,
            "difference": self.difference,
            "remarks": list(self.remarks),
            "outputs": {bucket: [_entry(entry) for entry in each.outputs] for bucket, each in self.figures.items()},
        }


def _sizes_differ(reference: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether an output has as many dimensions but other sizes: a model's sizes may depend on data."""
    return reference.dim() == found.dim() and reference.shape != found.shape


def _entry(entry: Accuracy) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in entry.__dataclass_fields__}


def _figure(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)
