"""`validate`: a bundle, as it runs on this host, against FP32."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from armopt import progress
from armopt.accuracy import gates as gates_module
from armopt.accuracy import nodes, runs, tasks
from armopt.accuracy import samples as samples_module
from armopt.accuracy.checker import Checker, Run, Validation, flat_run, named
from armopt.accuracy.gates import Figures, Gate
from armopt.accuracy.metrics import MIN_COSINE
from armopt.accuracy.originals import Original, find_originals
from armopt.accuracy.report import page
from armopt.accuracy.samples import Given, Samples
from armopt.accuracy.tasks import Outputs
from armopt.capture.files.format import TrustedFile
from armopt.errors import ArmoptWarning, InputError

if TYPE_CHECKING:
    from armopt.bundle.program import Part, Program
    from armopt.bundle.reader import Bundle
    from armopt.runtime.model import Model


@dataclass(frozen=True, slots=True)
class _Compared:
    """What was run for one bucket of one graph."""

    program: Program
    original: Original
    samples: Samples
    checker: Checker
    order: Sequence[str]


def validate(
    bundle: str | Path,
    *,
    against: str | Path | torch.nn.Module | TrustedFile | None = None,
    model: str = "",
    inputs: Given | None = None,
    min_cosine: float = MIN_COSINE,
    gates: Sequence[str] = (),
    task: str = "",
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Compares a bundle, as it runs on this host, with FP32.

    Args:
        bundle: The bundle.
        against: The original: a module, its file, or a :class:`TrustedFile`, which may run code. Without it the
            reference is what ``--keep-reference`` stored, else the bundle's own graph with its stored weights and all
            activations in FP32, which leaves the rounding of weights out; the report says which.
        model: Reference to the class of `against`, where that is a state dict; and, for a folder of images, whose
            weights say how they are prepared.
        inputs: Tensors by name, several such samples, a file of them, or a folder of files or images; by default
            seeded random ones for each bucket, with the statistics of the example inputs.
        min_cosine: The least cosine similarity of any output.
        gates: More bounds: ``top1>=0.995``.
        task: ``classification``, ``detection``, ``segmentation``, ``language``, ``embedding`` or ``none``; by default
            found from the outputs.
        report: Where to write a report: HTML, or JSON where the name ends in .json.

    Returns:
        ``cosine`` (the worst), ``passed``, ``gates``, ``reference``, ``inputs``, ``ran``, ``task``, ``nodes``, and
        every output's metrics by bucket.

    Raises:
        InputError: The original doesn't fit the bundle, the inputs don't fit the model, a gate or task is unknown, or
            the original gives NaN alone.
    """
    from armopt.bundle import reader
    from armopt.runtime import load

    bounds = gates_module.standard(gates, min_cosine)
    if report is not None:
        page.check_place(Path(report))
    progress.report("read", 0, 1)
    read = reader.read(bundle, reference=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        loaded = load.load_parts(read)
    given = _given(read, inputs, task, model, against is not None)
    progress.report("capture", 0, 1)
    originals = find_originals(read, against, model)
    figures: dict[str, Figures] = {}
    compared: dict[str, _Compared] = {}
    for part in read.parts:
        for name, each, found in _compare(part, loaded[part.path], originals[part.path], bounds, task, given):
            figures[name], compared[name] = found, each
    portable = any(each.portable for each in loaded.values())
    result = _outcome(compared, figures, bounds, portable)
    if against is None:  # what the bundle was made with is no judge of the capture: that was found before
        result = replace(result, difference=read.manifest.accuracy.difference)
    worst = compared[result.worst_bucket]
    evidence = worst.checker.evidence[result.worst_bucket]
    errors = nodes.errors(
        worst.program,
        worst.original.prepared,
        [evidence.inputs[name] for name in worst.order],
        lambda done, total: progress.report("layers", done, total),
    )
    outcome = result.to_json() | {"nodes": nodes.entries(errors), "node_bucket": result.worst_bucket}
    if report is not None:
        progress.report("report", 0, 1)
        about = page.About.of(read.manifest, str(bundle))
        pictures = next(iter(compared.values())).samples.pictures[:1]
        page.save(Path(report), outcome, about, result, errors, evidence, pictures)
    return outcome


def _given(read: Bundle, inputs: Given | None, task: str, model: str, against: bool) -> Samples | None:
    """The user's samples; None where none were given.

    Raises:
        InputError: They don't fit the bundle, or an option has nothing to say.
    """
    if read.manifest.is_module:
        _check_options(inputs, task)
    given = None
    if inputs is not None:
        name = model or str(read.manifest.model.source)
        given = samples_module.read(inputs, read.whole.signature.specs, name)
    if model and not against and not (given is not None and given.pictures):
        raise InputError(
            "says what class --against's state dict belongs to, and there is no --against",
            where=f"--model {model}",
            hint="Add --against FILE, or leave --model out",
        )
    return given


def _compare(
    part: Part, running: Model, original: Original, bounds: Sequence[Gate], task: str, given: Samples | None
) -> Iterator[tuple[str, _Compared, Figures]]:
    """Runs both sides of one graph in each bucket."""
    order = [spec.name for spec in part.signature.specs]
    checker = Checker(
        reference=flat_run(original.reference, order, part.signature.outputs),
        anchor=None if original.anchor is None else flat_run(original.anchor, order, part.signature.outputs),
        gates=tuple(bounds),
        task=tasks.NONE if part.path else task,
        source=original.source,
        no_anchor="" if original.anchor is not None else "the original is run as it is, in FP32",
    )
    found = _found(part, running, order)
    for bucket, samples in _by_bucket(part, running, given, order).items():
        name = f"{part.path} {bucket}".strip()
        figures = checker.figures(name, _counted(samples, name), found)
        yield name, _Compared(_program_of(part, bucket), original, samples, checker, order), figures


def _outcome(
    compared: Mapping[str, _Compared], figures: Mapping[str, Figures], bounds: Sequence[Gate], portable: bool
) -> Validation:
    """All that was compared, and which gates hold."""
    first = next(iter(compared.values()))
    return Validation(
        reference=first.original.said,
        inputs=first.samples.said,
        given=first.samples.given,
        samples=len(first.samples),
        ran="portable twins on this host" if portable else "the kernels of this host",
        figures=figures,
        verdicts=gates_module.judge(bounds, figures, first.checker.task_name),
        task=first.checker.task_name,
        task_why=first.checker.task_why,
        no_anchor=next((each.checker.no_anchor for each in compared.values() if each.checker.no_anchor), ""),
    )


def _check_options(inputs: Given | None, task: str) -> None:
    """Refuses what a bundle of kind "module" has nothing for.

    Raises:
        InputError: Naming the option.
    """
    if inputs is not None:
        raise InputError(
            'its parts take no inputs of the model (kind "module")', where="inputs (--inputs)", hint="Leave it out"
        )
    if task not in ("", tasks.NONE):
        raise InputError('its parts have no task (kind "module")', where=f"task (--task) {task}", hint="Leave it out")


def _found(part: Part, running: Model, order: Sequence[str]) -> Run:
    """A graph as it runs on this host, from named inputs to named outputs; its buffers stay as they were."""

    def call(given: Outputs) -> Outputs:
        tensors = [given[name] for name in order]
        running.check_inputs(tensors)
        with contextlib.ExitStack() as undone:
            for program in part.programs:
                undone.enter_context(runs.unchanged_buffers(program.graph_module))
            return flat_run(running.run_flat, order, part.signature.outputs)(given)

    return call


def compare_callables(
    reference: Callable[..., Any],
    found: Callable[..., Any],
    samples: Sequence[Sequence[Any]],
    *,
    gates: Sequence[Gate] = (),
    task: str = "",
    source: str = "the original",
) -> tuple[Validation, Checker]:
    """Compares two models that are called alike, whatever they take and return: for what is no single graph.

    Args:
        reference: The original in FP32.
        found: What is compared with it.
        samples: Positional arguments of each call; the tensors among them are named by their path.
        gates: What has to hold.
        task: Name of the task; found from the outputs where empty.
        source: What to call the original in messages.
    """
    calls: dict[int, Sequence[Any]] = {}

    def inputs_of(call: Sequence[Any]) -> Outputs:
        tensors = named(list(call))
        calls[id(tensors)] = call
        return tensors

    def run(side: Callable[..., Any]) -> Run:
        def call(given: Outputs) -> Outputs:
            with torch.no_grad():
                return named(side(*calls[id(given)]))

        return call

    checker = Checker(run(reference), None, tuple(gates), task, source)
    figures = {"static": checker.figures("static", [inputs_of(call) for call in samples], run(found))}
    result = Validation(
        reference=source,
        inputs="given as tensors",
        given=True,
        samples=len(samples),
        ran="as called",
        figures=figures,
        verdicts=checker.verdicts(figures),
        task=checker.task_name,
        task_why=checker.task_why,
        no_anchor="the original is no single graph",
    )
    return result, checker


def bucket_name(bucket: Mapping[str, int]) -> str:
    """A bucket as text: ``batch=8``; ``static`` where nothing is dynamic."""
    return ",".join(f"{name}={size}" for name, size in bucket.items()) or "static"


def _by_bucket(part: Part, running: Model, given: Samples | None, order: Sequence[str]) -> dict[str, Samples]:
    """The user's samples, in the bucket that the first of them runs in, or generated ones for each bucket."""
    if given is not None:
        sample = given.load[0]()
        return {bucket_name(running.bucket([sample[name] for name in order])): given}
    specs = part.signature.specs
    return {bucket_name(program.bucket): samples_module.generated(specs, program.bucket) for program in part.programs}


def _counted(samples: Samples, bucket: str) -> Any:
    for done, sample in enumerate(samples):
        progress.report(f"compare {bucket}", done, len(samples))
        yield sample


def _program_of(part: Part, bucket: str) -> Program:
    return next(program for program in part.programs if bucket_name(program.bucket) == bucket)
