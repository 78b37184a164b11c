"""What `armopt.compile` gives, against the module itself: gated, and repaired, as `optimize` does with a bundle."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from armopt import progress
from armopt.accuracy import Checker, Validation, runs, tasks
from armopt.accuracy.checker import named_leaves
from armopt.accuracy.fidelity import suspects
from armopt.accuracy.gates import Figures
from armopt.accuracy.tasks import Outputs
from armopt.capture.calls import is_tensor, unchanged
from armopt.compiler import repair
from armopt.compiler.checks import Checks
from armopt.compiler.repair import Repair
from armopt.dynamo import graphs
from armopt.dynamo.programs import Programmed
from armopt.errors import ArmoptWarning, InputError
from armopt.ir.records import Decision, Plan, Site

#: What the one call is called that everything is compared on.
_BUCKET = "static"
#: Between the number of a program and the name of a layer in it.
_IN = ": "

#: A model as it is called.
Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checked.

    Attributes:
        module: Whose buffers and attributes a call may change.
        original: The model as PyTorch runs it.
        compiled: The model as armopt runs it.
        name: For messages.
    """

    module: torch.nn.Module
    original: Call
    compiled: Call
    name: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured of a compiled model, and what repair did; None where nothing broke."""

    validation: Validation
    repair: Repair | None


def check(subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any], checks: Checks) -> Outcome | None:
    """Compares both on the inputs of one call and, where a gate breaks and the checks allow it, repairs the programs.

    Nothing of the module is changed but its programs. A gate that fails in the end is a warning.

    Returns:
        The outcome; None, with a warning that says why, where nothing could be compared.

    Raises:
        InputError: A gate is unknown, or the model fails.
    """
    bounds = checks.bounds()
    trial = _Trial(subject, args, kwargs)
    trial.found(trial.inputs)  # compiles, and says what the model says of its inputs
    task = checks.task or ("" if checks.gates else tasks.NONE)
    checker = Checker(
        trial.reference, None, bounds, task, subject.name, keep=True, no_anchor="the model is no single graph"
    )
    try:
        figures = checker.figures(_BUCKET, [trial.inputs], trial.found)
    except InputError as error:
        _warn(f"{subject.name} was not compared with FP32: {error.what}. {error.hint}")
        return None
    repaired = None
    if not _passed(checker, figures) and checks.repair:
        repaired = _repair(trial, checker, checks)
        figures = checker.figures(_BUCKET, [trial.inputs], trial.found)
    found = {_BUCKET: figures}
    validation = Validation(
        reference=f"{subject.name} in FP32, as PyTorch runs it",
        inputs=checks.examples,
        given=True,
        samples=1,
        ran="as compiled here",
        figures=found,
        verdicts=checker.verdicts(found),
        task=checker.task_name,
        task_why=checker.task_why,
        no_anchor=checker.no_anchor,
        difference="" if _passed(checker, figures) else _difference(trial, checker),
    )
    if not validation.passed:
        no_repair = f". There is {repaired.said}" if repaired is not None else ""
        _warn(f"{subject.name} as compiled is not the model: {validation.failures()}{no_repair}")
    return Outcome(validation, repaired)


def _warn(text: str) -> None:
    warnings.warn(text, ArmoptWarning, stacklevel=2)


def _passed(checker: Checker, figures: Figures) -> bool:
    return all(entry.finite for entry in figures.outputs) and all(
        verdict.passed for verdict in checker.verdicts({_BUCKET: figures})
    )


class _Trial:
    """One call of both sides, again and again from the same state."""

    def __init__(self, subject: Subject, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.subject = subject
        self._leaves, self._tree = torch.utils._pytree.tree_flatten((list(args), dict(kwargs)))
        self.inputs: Outputs = {f"input{i}": leaf for i, leaf in enumerate(self._leaves) if is_tensor(leaf)}
        self.ran: dict[tuple[int, int], tuple[graphs.Weights, int]] = {}

    def reference(self, given: Outputs) -> Outputs:
        """The results of the model as PyTorch runs it."""
        with runs.true_fp32(), runs.explained("PyTorch can't run it in FP32"):
            return self._call(self.subject.original, given)

    def found(self, given: Outputs) -> Outputs:
        """The results of the model as compiled; what ran for it is noted."""
        with graphs.watched() as ran:
            result = self._call(self.subject.compiled, given)
        self.ran |= {(id(weights), index): (weights, index) for weights, index in ran}
        return result

    def _call(self, call: Call, given: Outputs) -> Outputs:
        leaves = [given.get(f"input{i}", leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = _copied(torch.utils._pytree.tree_unflatten(leaves, self._tree))
        with torch.no_grad(), runs.seeded(), unchanged(self.subject.module):
            result = call(*args, **kwargs)
            return {name: runs.plain(tensor).clone() for name, tensor in named_leaves(result).items()}


def _copied(arguments: Any) -> Any:
    """The arguments of a call, which may write into them: tensors, and caches that are objects."""
    try:
        return copy.deepcopy(arguments)
    except Exception:  # an object that refuses: its tensors at least
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, arguments)


def _difference(trial: _Trial, checker: Checker) -> str:
    """What makes the module another under Dynamo, where that is known."""
    for reason, suspect in suspects(trial.subject.module):
        with suspect:
            reference = trial.reference(trial.inputs)
        again = _against(checker, reference)
        if _passed(again, again.figures(_BUCKET, [trial.inputs], trial.found)):
            return f"likely reason: {reason}"
    return ""


def _against(checker: Checker, reference: Outputs) -> Checker:
    """The same gates and task, with other results of the original."""
    return Checker(lambda _: reference, None, checker.gates, checker.task, checker.source)


def _repair(trial: _Trial, checker: Checker, checks: Checks) -> Repair:
    """Takes layers of all programs that ran out of BF16, as far as the gates need it."""
    programs = list(trial.ran.values())
    current = [weights.programs[index] for weights, index in programs]
    plan, sites = _merged(current)

    def evaluate(candidate: Plan) -> Figures:
        with _replaced(programs, _split(candidate, current)):
            return checker.figures(_BUCKET, [trial.inputs], trial.found)

    def alone(candidate: Plan, node: str) -> Figures:
        others = {decision.node: repair.FULL for decision in candidate.decisions if decision.node != node}
        return evaluate(repair.apply(candidate, sites, others))

    found = repair.search(
        [plan],
        [sites],
        checker.gates,
        evaluate,
        alone,
        evaluations=checks.evaluations,
        progress=lambda done, most: progress.report("repair", done, most),
    )
    if found.passed:
        for (weights, index), chosen in zip(programs, _split(found.plans[0], current), strict=True):
            weights.keep(index, chosen)
    for weights, _ in programs:
        weights.settle()
    return found


def _merged(current: Sequence[Programmed]) -> tuple[Plan, dict[str, Site]]:
    """The plans of several programs as one, whose layers are called by program."""
    decisions: list[Decision] = []
    sites: dict[str, Site] = {}
    for number, programmed in enumerate(current):
        decisions += [replace(each, node=f"{number}{_IN}{each.node}") for each in programmed.plan.decisions]
        sites |= {f"{number}{_IN}{node}": site for node, site in programmed.sites.items()}
    return replace(current[0].plan, bucket={}, decisions=tuple(decisions)), sites


def _split(plan: Plan, current: Sequence[Programmed]) -> list[Plan]:
    """The plan of each program out of the merged one."""
    taken = iter(plan.decisions)
    return [
        replace(each.plan, decisions=tuple(replace(next(taken), node=old.node) for old in each.plan.decisions))
        for each in current
    ]


@contextlib.contextmanager
def _replaced(programs: Sequence[tuple[graphs.Weights, int]], plans: Sequence[Plan]) -> Iterator[None]:
    """Runs the portable twins of other plans for a while."""
    undo = [(weights, index, weights.programs[index]) for weights, index in programs]
    try:
        for (weights, index), plan in zip(programs, plans, strict=True):
            if plan != weights.programs[index].plan:
                weights.swap(index, weights.twin(index, plan))
        yield
    finally:
        for weights, index, before in undo:
            weights.swap(index, before)
