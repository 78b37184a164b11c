"""Optimizes one model as its user would, runs what came of it, and compares that with the model in FP32."""

from __future__ import annotations

import re
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import armopt
from armopt import accuracy
from armopt.bundle.program import Program
from armopt.compiler.captured_model import capture_model
from armopt.compiler.optimize import Result, carry_out
from armopt.compiler.output import Output
from armopt.compiler.recipe import Planned, Recipe
from armopt.dynamo import graphs
from armopt.errors import CaptureError
from armopt.ir.records import Plan, Precision
from armopt.kernels import table
from armopt.models.huggingface import without_cache
from benchmarks.coverage.cases import Call, Case, Sample

TARGET = "graviton3"
MIN_COSINE = accuracy.MIN_COSINE
#: The classes of kernels, as the page counts layers.
CLASSES = ("BF16", "FP32", "BLAS", "ATen")
#: A reason is told where so large a share of the multiplications has it.
_TELLING = 0.02
#: What a layer's reason begins with, and others of the same reason don't have.
_ESTIMATE = re.compile(r"^about [\d.]+ [mu]?s; ")


@dataclass(frozen=True)
class _Recording(Recipe):
    """A recipe that remembers the plans that it carried out last, by part."""

    plans: dict[str, tuple[Plan, ...]] = field(default_factory=dict)

    def lower_part(self, planned: Planned, plans: Any = None) -> tuple[Program, ...]:
        if plans is None:
            self.plans[planned.part.path] = planned.plans
        return Recipe.lower_part(self, planned, plans)


@dataclass(slots=True)
class _Outcome:
    """What came of a model.

    Attributes:
        form: As what it runs: "graph", "1 part", "N parts", "compiled" or "generate".
        plans: One of each graph.
        figures: Of every output.
        seconds: Of CPU that optimizing took.
        megabytes: Most that the process held by then.
        notes: What else is to be said.
    """

    form: str
    plans: list[Plan]
    figures: list[accuracy.Accuracy]
    seconds: float
    megabytes: float
    notes: list[str] = field(default_factory=list)


def measure(case: Case) -> dict[str, Any]:
    """The row of one model, measured in this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that the twins run: the page says so
    sample = case.build()
    sample.model.eval()
    parameters = sum(parameter.numel() for parameter in sample.model.parameters())
    with tempfile.TemporaryDirectory(prefix="armopt-coverage-") as folder:
        outcome = _outcome(sample, Path(folder) / "bundle")
    notes = [*outcome.notes, *_reasons(outcome.plans)]
    if not all(each.finite for each in outcome.figures):
        notes.append("NOT FINITE")
    return {
        "input": _shapes(sample.calls[0]),
        "parameters": parameters,
        "form": outcome.form,
        **_layers(outcome.plans),
        **_shares(outcome.plans),
        "cosine": min(each.similarity for each in outcome.figures),
        "max_rel": max(each.max_rel for each in outcome.figures),
        "seconds": round(outcome.seconds, 1),
        "megabytes": round(outcome.megabytes),
        "notes": notes,
        "torch": torch.__version__,
    }


def passed(row: Mapping[str, Any]) -> bool:
    """Whether a model went through with results that are good enough to serve."""
    return "error" not in row and row["cosine"] >= MIN_COSINE and "NOT FINITE" not in row["notes"]


def _outcome(sample: Sample, place: Path) -> _Outcome:
    """The best form that a model can have: one graph, parts of it, or compiled where it runs."""
    if sample.generates:
        return _generate(sample)
    if sample.detects:
        return _parts(sample, place)
    try:
        return _graph(sample, place)
    except CaptureError as error:
        why = f"no single graph: {error.what}"
    try:
        outcome = _parts(sample, place)
    except _NoPartsError as error:
        why = f"{why}; no parts: {error}"
        outcome = _compiled(sample)
    outcome.notes.append(why)
    return outcome


class _NoPartsError(Exception):
    """Why a model can't be taken in parts."""


def _graph(sample: Sample, place: Path) -> _Outcome:
    args, kwargs = sample.calls[0]
    expected = _eager(sample)
    with _Clock() as clock:
        result, plans = _optimize(sample.model, kwargs or args, place, "graph")
    found = armopt.load(place)(*args, **kwargs)
    _check_alike(expected, found)
    return _Outcome("graph", plans, _compared(expected, found), clock.seconds, clock.megabytes, _repaired(result))


def _parts(sample: Sample, place: Path) -> _Outcome:
    """A bundle of kind "module"; detections are compared part by part, for a list of boxes has no cosine."""
    expected = _eager(sample)
    with _Clock() as clock:
        try:
            result, plans = _optimize(sample.model, sample.calls, place, "module")
        except armopt.ArmoptError as error:
            raise _NoPartsError(error.what) from error
    args, kwargs = sample.calls[0]
    found = armopt.load(place, model=sample.model)(*args, **kwargs)
    notes = _repaired(result)
    if sample.detects:
        from tests import detection

        above, alike = detection.found_again(expected, found)
        notes.append(f"{alike} of {above} detections found again")
        figures = [each for found in result.verdict.figures.values() for each in found.outputs]
    else:
        figures = _compared(expected, found)
    form = f"{len(plans)} part{'s'[: len(plans) > 1]}"
    return _Outcome(form, plans, figures, clock.seconds, clock.megabytes, notes)


def _compiled(sample: Sample) -> _Outcome:
    args, kwargs = sample.calls[0]
    expected = _eager(sample)
    with _Clock() as clock, without_cache(sample.model):
        run = armopt.compile(sample.model, kwargs or args, target=TARGET)
    with without_cache(run):
        found = run(*args, **kwargs)
    return _Outcome("compiled", _compiled_plans(), _compared(expected, found), clock.seconds, clock.megabytes)


def _generate(sample: Sample) -> _Outcome:
    """A generate loop with its cache: each step's logits against one call of the model in FP32 on the same text."""
    args, kwargs = sample.calls[0]
    asked = {"use_cache": True, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    with _Clock() as clock:
        run: Any = armopt.compile(sample.model, target=TARGET)
        found = run.generate(*args, **kwargs, **asked, **sample.generates)
    steps, text = len(found.logits), found.sequences[:, :-1]
    decoder = sample.model.config.is_encoder_decoder
    given = {**kwargs, "decoder_input_ids": text} if decoder else {"input_ids": text}
    with torch.no_grad():
        expected = sample.model(**given, use_cache=False).logits[:, -steps:]
    figures = _compared(expected, torch.stack(found.logits, 1))
    return _Outcome("generate", _compiled_plans(), figures, clock.seconds, clock.megabytes, [f"{steps} tokens"])


class _Clock:
    """Seconds of CPU that a block takes, and the most that the process has held by its end."""

    seconds = megabytes = 0.0

    def __enter__(self) -> _Clock:
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._start
        self.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _optimize(model: torch.nn.Module, inputs: Any, place: Path, kind: Any) -> tuple[Result, list[Plan]]:
    """What `armopt.optimize` does, and the plan of each part."""
    recipe = _Recording(**{name: getattr(Recipe.of(TARGET), name) for name in Recipe.__slots__})
    if kind == "module":
        calls = [kwargs or args for args, kwargs in inputs]
        opened = lambda: capture_model(model, calls, kind="module")  # noqa: E731
    else:
        opened = lambda: capture_model(model, inputs)  # noqa: E731
    result = carry_out(opened, recipe, armopt.Checks(), Output(place), divided=kind == "module")
    return result, [plans[0] for plans in recipe.plans.values()]


def _eager(sample: Sample) -> Any:
    """What the model itself gives for the first call."""
    args, kwargs = sample.calls[0]
    with torch.no_grad(), without_cache(sample.model):
        return sample.model(*args, **kwargs)


def _repaired(result: Result) -> list[str]:
    repair = result.manifest.accuracy.repair
    failed = [] if result.passed else [f"FAILED: {result.verdict.failures()}"]
    return [*failed, *([repair.said] if repair is not None else [])]


def _compiled_plans() -> list[Plan]:
    """The first plan of each graph that Dynamo found."""
    return [each.programs[0].plan for graph in graphs.graphs() for each in graph.held if each.programs]


def _check_alike(expected: Any, found: Any) -> None:
    """Raises TypeError where the bundle's result is built otherwise than the model's."""
    if isinstance(expected, torch.Tensor) != isinstance(found, torch.Tensor):
        raise TypeError(f"the bundle returns a {type(found).__name__}, the model a {type(expected).__name__}")
    if not isinstance(expected, torch.Tensor) and [*_keys(expected)] != [*_keys(found)]:
        raise TypeError(f"the bundle returns {[*_keys(found)]}, the model {[*_keys(expected)]}")


def _keys(result: Any) -> Iterable[Any]:
    return result if isinstance(result, Mapping) else range(len(result))


def _compared(expected: Any, found: Any) -> list[accuracy.Accuracy]:
    leaves = list(_leaves(expected))
    return accuracy.compare_all([f"output {i}" for i, _ in enumerate(leaves)], leaves, list(_leaves(found)))


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of a result, by position; a model output is a mapping."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _leaves(value)


def _shapes(call: Call) -> str:
    args, kwargs = call
    return ", ".join("x".join(map(str, leaf.shape)) for leaf in _leaves([*args, kwargs]))


def _layers(plans: Iterable[Plan]) -> dict[str, int]:
    """How many layers run in which way."""
    counts = dict.fromkeys(CLASSES, 0)
    for plan in plans:
        for decision in plan.decisions:
            kernel = table.get(decision.kernel)
            kind = {"blas": "BLAS", "aten": "ATen"}.get(kernel.backend)
            counts[kind or ("BF16" if kernel.precision == Precision.BF16 else "FP32")] += 1
    return counts


def _shares(plans: Iterable[Plan]) -> dict[str, float]:
    """Of all multiplications, those in BF16 and those of two activations."""
    total = in_bf16 = activations = 0
    for plan in plans:
        precisions = {decision.node: decision.precision for decision in plan.decisions}
        for product in plan.products:
            total += product.multiplications
            in_bf16 += product.multiplications * (precisions.get(product.node) == Precision.BF16)
            activations += product.multiplications * (product.node not in precisions and not product.weight_bytes)
    return {"share": in_bf16 / max(total, 1), "activations": activations / max(total, 1)}


def _reasons(plans: list[Plan]) -> list[str]:
    """Why products on weights are not in BF16, with the share of each reason, the largest first."""
    total = sum(product.multiplications for plan in plans for product in plan.products)
    found: Counter[str] = Counter()
    for plan in plans:
        decisions = {decision.node: decision for decision in plan.decisions}
        for product in plan.products:
            decision = decisions.get(product.node)
            if decision is not None and decision.precision != Precision.BF16:
                found[_ESTIMATE.sub("", decision.reason)] += product.multiplications
            elif decision is None and product.weight_bytes:
                found[product.reason] += product.multiplications
    said = [(count / max(total, 1), reason) for reason, count in found.most_common()]
    return [f"{share:.0%}: {reason}" for share, reason in said if share >= _TELLING]
