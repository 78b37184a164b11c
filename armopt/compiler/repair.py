"""Repair: the fewest layers to take out of BF16, and no further than needed, so that every gate holds.

Layers are ranked by what each alone, as planned, does to the outputs. The shortest prefix of that ranking that passes
in FP32 is found by doubling and halving, then every layer of it that is not needed goes back, and each that is left
gets the cheapest of its remedies that is enough. Every step is measured; how many there may be is bounded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from armopt.accuracy.gates import Figures, Gate
from armopt.ir.records import Decision, Plan, Precision, Site
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use

#: Plan -> what was measured with it.
Evaluate = Callable[[Plan], Figures]
#: Plan and the name of a layer -> what was measured with that layer alone as planned, and all else in FP32.
EvaluateAlone = Callable[[Plan, str], Figures]
#: Told how many evaluations were made, of how many at most.
Progress = Callable[[int, int], None]
#: Evaluations if nothing else is said.
EVALUATIONS = 128

#: All in FP32: see Kernel.steps_out_of_bf16.
FULL = 3
#: Layer -> how far it is taken out of BF16, from 1, the first remedy, to all in FP32.
Assignment = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that was taken out of BF16."""

    node: str
    before: str
    after: str
    precision: str


@dataclass(frozen=True, slots=True)
class Repair:
    """What repair did.

    Attributes:
        plans: The plans, one for each bucket.
        changes: The layers, of all buckets.
        passed: Whether all gates hold now.
        evaluations: How many plans were measured.
        said: In one sentence: what it costs, or why there is no repair.
    """

    plans: tuple[Plan, ...]
    changes: tuple[Change, ...]
    passed: bool
    evaluations: int
    said: str

    def to_json(self) -> dict[str, Any]:
        """As reports have it."""
        changes = [asdict(change) for change in self.changes]
        return {"passed": self.passed, "evaluations": self.evaluations, "said": self.said, "changes": changes}


@dataclass(frozen=True, slots=True, order=True)
class _Score:
    """How bad a measurement is, worst part first: values that are not finite, gates missed, noise."""

    broken: int
    shortfall: float
    noise: float

    @property
    def passed(self) -> bool:
        return not self.broken and not self.shortfall


class _OutOfBudgetError(Exception):
    pass


def search(
    plans: Sequence[Plan],
    sites: Sequence[Mapping[str, Site]],
    gates: Sequence[Gate],
    evaluate: Evaluate,
    alone: EvaluateAlone,
    *,
    evaluations: int = EVALUATIONS,
    progress: Progress = lambda done, most: None,
) -> Repair:
    """Finds what has to leave BF16 in all plans of a model.

    Args:
        plans: One for each bucket.
        sites: The sites of each plan, by node.
        gates: What has to hold in every bucket.
        evaluate: Measures a plan.
        alone: Measures one layer of a plan.
        evaluations: How many measurements at most, besides three for each bucket.
        progress: Told of each.

    Returns:
        Plans that pass; or, where there are none, the plans as they were.
    """
    searcher = _Searcher(gates, evaluate, alone, evaluations, progress)
    assignment: Assignment = {}
    for plan, known in zip(plans, sites, strict=True):
        found = searcher.repair(plan, known, assignment)
        if found is None:
            said = "no repair: the gates fail with every layer in FP32 too"
            return Repair(tuple(plans), (), False, searcher.count, said)
        assignment = found
    repaired = tuple(apply(plan, known, assignment) for plan, known in zip(plans, sites, strict=True))
    if not all(searcher.score(plan, always=True).passed for plan in repaired):
        said = "no repair: what one bucket needs breaks another"
        return Repair(tuple(plans), (), False, searcher.count, said)
    return Repair(repaired, _changes(plans, repaired), True, searcher.count, _cost(plans, repaired, sites))


class _Searcher:
    """Counts and remembers measurements."""

    def __init__(
        self, gates: Sequence[Gate], evaluate: Evaluate, alone: EvaluateAlone, most: int, progress: Progress
    ) -> None:
        self.count = 0
        self._gates, self._evaluate, self._alone = gates, evaluate, alone
        self._most, self._progress = most, progress
        self._known: dict[tuple[Any, ...], _Score] = {}

    def score(self, plan: Plan, *, always: bool = False) -> _Score:
        """Measures a plan, once; `always` without regard to the budget."""
        key = (tuple(plan.bucket.items()), *(decision.kernel for decision in plan.decisions))
        if key not in self._known:
            self._known[key] = self._measured(lambda: self._evaluate(plan), always=always)
        return self._known[key]

    def repair(self, plan: Plan, sites: Mapping[str, Site], base: Assignment) -> Assignment | None:
        """What to take out of BF16, `base` with it, so that a plan passes; None where nothing helps."""

        def passes(assignment: Assignment, *, always: bool = False) -> bool:
            return self.score(apply(plan, sites, assignment), always=always).passed

        if passes(base, always=True):
            return base
        free = [decision for decision in plan.decisions if base.get(decision.node) != FULL]
        candidates = [decision.node for decision in free if _remedy(decision, sites[decision.node], FULL)]
        chosen: Assignment = {**base, **dict.fromkeys(candidates, FULL)}
        if not passes(chosen, always=True):
            return None
        with contextlib.suppress(_OutOfBudgetError):  # what passes so far is a repair, if not the smallest
            ranked = self._rank(plan, sites, candidates)
            count = _shortest(len(ranked), lambda k: passes({**base, **dict.fromkeys(ranked[:k], FULL)}))
            for smaller in _smaller(ranked[:count], sites, base, passes):
                chosen = smaller
        return chosen

    def _rank(self, plan: Plan, sites: Mapping[str, Site], candidates: Sequence[str]) -> list[str]:
        """Layers by what each alone does to the outputs, the worst first; of equals the cheaper to take out.

        Half of the budget goes into it at most; layers beyond that follow, those with the least work first.
        """
        by_work = sorted(candidates, key=lambda node: _work(sites[node]))
        most = max(1, (self._most - self.count) // 2)
        measured, rest = by_work[:most], by_work[most:]
        scores = {node: self._measured(partial(self._alone, plan, node)) for node in measured}
        measured.sort(key=lambda node: scores[node], reverse=True)
        return measured + rest

    def _measured(self, measure: Callable[[], Figures], *, always: bool = False) -> _Score:
        if self.count >= self._most and not always:
            raise _OutOfBudgetError
        self._progress(self.count, self._most)
        self.count += 1
        return _score(self._gates, measure())


def _score(gates: Sequence[Gate], figures: Figures) -> _Score:
    shortfall = 0.0
    for gate in gates:
        shortfall += max((gate.shortfall(value) for _, value in figures.values(gate)), default=0.0)
    noises = [10 ** (-e.sqnr_db / 10) for e in figures.outputs if e.sqnr_db is not None and not e.discrete]
    broken = sum(not entry.finite for entry in figures.outputs)
    return _Score(broken, shortfall, max(noises, default=0.0))


def _shortest(most: int, passes: Callable[[int], bool]) -> int:
    """The least k up to `most` that passes, where `most` does and more is never worse."""
    low, high = 0, 1
    while high < most and not passes(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _smaller(
    ranked: Sequence[str], sites: Mapping[str, Site], base: Assignment, passes: Callable[[Assignment], bool]
) -> Iterator[Assignment]:
    """Assignments that pass, each smaller than the one before: all in FP32, fewer of them, and those less far."""
    chosen: Assignment = {**base, **dict.fromkeys(ranked, FULL)}
    yield chosen
    for node in sorted(ranked, key=lambda n: (-ranked.index(n), -_work(sites[n]))):
        as_before = {node: base[node]} if node in base else {}
        fewer = {name: steps for name, steps in chosen.items() if name != node} | as_before
        if passes(fewer):
            yield (chosen := fewer)
    for node in [name for name in chosen if chosen[name] != base.get(name)]:
        for steps in range(base.get(node, 0) + 1, FULL):
            cheaper = {**chosen, node: steps}
            if passes(cheaper):
                yield (chosen := cheaper)
                break


def _work(site: Site) -> int:
    """Multiplications."""
    return site.m * site.k * site.n


def _remedy(decision: Decision, site: Site, steps: int) -> Kernel | None:
    """The kernel that takes a layer so many steps out of BF16; None where it is out that far, or there is none."""
    if table.get(decision.kernel).steps_out_of_bf16 >= steps:
        return None
    remedies = (k for k in table.kernels(decision.op, Use.REPAIR) if k.steps_out_of_bf16 == steps)
    return next((kernel for kernel in remedies if kernel.refuses(site) is None), None)


def apply(plan: Plan, sites: Mapping[str, Site], assignment: Assignment) -> Plan:
    """The plan with some layers taken out of BF16, each as far as the assignment says."""
    decisions = []
    for decision in plan.decisions:
        site, steps = sites[decision.node], assignment.get(decision.node)
        kernel = None if steps is None else _remedy(decision, site, steps)
        if kernel is not None:
            decision = replace(
                decision,
                kernel=kernel.name,
                precision=kernel.precision,
                layout=kernel.layout,
                reason=f"repaired: a gate failed with {decision.kernel}",
                block=kernel.block(site, plan.target),
            )
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def _changes(before: Sequence[Plan], after: Sequence[Plan]) -> tuple[Change, ...]:
    pairs = [
        (old, new)
        for first, second in zip(before, after, strict=True)
        for old, new in zip(first.decisions, second.decisions, strict=True)
        if old.kernel != new.kernel
    ]
    return tuple(dict.fromkeys(Change(new.node, old.kernel, new.kernel, new.precision) for old, new in pairs))


def _cost(before: Sequence[Plan], after: Sequence[Plan], sites: Sequence[Mapping[str, Site]]) -> str:
    """How much of the multiplications, in the bucket where it is most, and how many bytes of weights."""
    shares, widened = [], {}
    for first, second, known in zip(before, after, sites, strict=True):
        moved = [new for old, new in zip(first.decisions, second.decisions, strict=True) if old.kernel != new.kernel]
        total = sum(_work(site) for site in known.values())
        in_fp32 = sum(_work(known[d.node]) for d in moved if d.precision != Precision.BF16)
        shares.append(in_fp32 / total if total else 0.0)
        for decision in moved:
            if table.get(decision.kernel).rounding.weights == torch.float32:
                widened[known[decision.node].weight_key] = 2 * math.prod(known[decision.node].weight)
    nodes = {change.node for change in _changes(before, after)}
    layers = "1 layer" if len(nodes) == 1 else f"{len(nodes)} layers"
    bytes_more = f", {sum(widened.values()):,} bytes more of weights" if widened else ""
    return f"{layers} repaired: {100 * max(shares):.3g} % of the multiplications in FP32{bytes_more}"
