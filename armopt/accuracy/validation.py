"""`validate`: a bundle, as it runs on this host, against FP32."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from armopt import inputs as inputs_module
from armopt import sites, structure
from armopt.accuracy import gates as gates_module
from armopt.accuracy import nodes, runs, tasks
from armopt.accuracy import report as report_module
from armopt.accuracy import samples as samples_module
from armopt.accuracy.checker import Checker, Run, Validation, flat_run, named
from armopt.accuracy.gates import Figures, Gate
from armopt.accuracy.metrics import MIN_COSINE, relative_error
from armopt.accuracy.samples import Given, Samples
from armopt.accuracy.tasks import Outputs
from armopt.errors import InputError
from armopt.ir import Captured

if TYPE_CHECKING:
    from armopt.bundle.codec import Program
    from armopt.bundle.reader import Bundle, Part
    from armopt.runtime import Model

#: Told the name of each step, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
#: What BF16 makes of a weight is off by 2^-9 at most; more is another weight.
_OTHER_WEIGHTS = 2.0**-6


@dataclass(frozen=True, slots=True)
class Original:
    """What a bundle is compared with.

    Attributes:
        said: In words.
        source: Shorter, for messages.
        reference: Runs it in FP32, flat.
        anchor: Runs it in FP64, flat; None where it is no graph.
        prepared: Its graph with the layers' names of the bundle; None for the bundle's own graph.
    """

    said: str
    source: str
    reference: Callable[[Sequence[torch.Tensor]], Sequence[Any]]
    anchor: Callable[[Sequence[torch.Tensor]], Sequence[Any]] | None
    prepared: fx.GraphModule | None


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
    against: str | Path | torch.nn.Module | None = None,
    model: str = "",
    inputs: Given | None = None,
    min_cosine: float = MIN_COSINE,
    gates: Sequence[str] = (),
    task: str = "",
    report: str | Path | None = None,
    trust_pickle: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> dict[str, Any]:
    """Compares a bundle, as it runs on this host, with FP32.

    Args:
        bundle: The bundle.
        against: The original: a module, or its file. Without it the reference is what ``--keep-reference`` stored, else
            the bundle's own graph with its stored weights and all activations in FP32, which leaves the rounding of
            weights out; the report says which.
        model: Reference to the class of `against`, where that is a state dict; and, for a folder of images, whose
            weights say how they are prepared.
        inputs: Tensors by name, several such samples, a file of them, or a folder of files or images; by default
            seeded random ones for each bucket, with the statistics of the example inputs.
        min_cosine: The least cosine similarity of any output.
        gates: More bounds: ``top1>=0.995``.
        task: ``classification``, ``detection``, ``segmentation``, ``language``, ``embedding`` or ``none``; by default
            found from the outputs.
        report: Where to write a report: HTML, or JSON where the name ends in .json.
        trust_pickle: Whether unpickling `against` may run code.
        progress: Told of each step.

    Returns:
        ``cosine`` (the worst), ``passed``, ``gates``, ``reference``, ``inputs``, ``ran``, ``task``, ``nodes``, and
        every output's metrics by bucket.

    Raises:
        InputError: The original doesn't fit the bundle, the inputs don't fit the model, a gate or task is unknown, or
            the original gives NaN.
    """
    from armopt import runtime
    from armopt.bundle import reader

    bounds = gates_module.standard(gates, min_cosine)
    if report is not None:
        report_module.check_place(Path(report))
    progress("read", 0, 1)
    read = reader.read(bundle, reference=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", runtime.ArmoptWarning)
        loaded = runtime.load_parts(read)
    if read.manifest.is_module:
        _check_options(inputs, task)
    given = None
    if inputs is not None:
        model_name = model or str(read.manifest.model["source"])
        given = samples_module.read(inputs, read.signature["specs"], model_name)
    if model and against is None and not (given is not None and given.pictures):
        raise InputError(
            "says what class --against's state dict belongs to, and there is no --against",
            where=f"--model {model}",
            hint="Add --against FILE, or leave --model out",
        )
    progress("capture", 0, 1)
    originals = _originals(read, against, model, trust_pickle)
    figures: dict[str, Figures] = {}
    compared: dict[str, _Compared] = {}
    for part in read.parts:
        original, running = originals[part.path], loaded[part.path]
        order = [spec["name"] for spec in part.signature["specs"]]
        checker = Checker(
            reference=flat_run(original.reference, order, part.signature["outputs"]),
            anchor=None if original.anchor is None else flat_run(original.anchor, order, part.signature["outputs"]),
            gates=bounds,
            task=tasks.NONE if part.path else task,
            source=original.source,
        )
        found = _found(part, running, order)
        for bucket, samples in _by_bucket(part, running, given, order).items():
            name = f"{part.path} {bucket}".strip()
            figures[name] = checker.figures(name, _counted(samples, name, progress), found)
            compared[name] = _Compared(_program_of(part, bucket), original, samples, checker, order)
    first = next(iter(compared.values()))
    portable = any(each.portable for each in loaded.values())
    result = Validation(
        reference=first.original.said,
        inputs=first.samples.said,
        given=first.samples.given,
        samples=len(first.samples),
        ran="portable twins on this host" if portable else "the kernels of this host",
        figures=figures,
        verdicts=gates_module.check(bounds, figures, first.checker.task_name),
        task=first.checker.task_name,
        task_why=first.checker.task_why,
        no_anchor=next((each.checker.no_anchor for each in compared.values() if each.checker.no_anchor), ""),
    )
    worst = compared[result.worst_bucket]
    evidence = worst.checker.evidence[result.worst_bucket]
    errors = nodes.errors(
        worst.program,
        worst.original.prepared,
        [evidence.inputs[name] for name in worst.order],
        lambda done, total: progress("layers", done, total),
    )
    outcome = result.to_json() | {"nodes": nodes.entries(errors), "node_bucket": result.worst_bucket}
    if report is not None:
        progress("report", 0, 1)
        about = report_module.About.of(read.manifest, str(bundle))
        report_module.save(Path(report), outcome, about, result, errors, evidence, first.samples.pictures[:1])
    return outcome


def _check_options(inputs: Given | None, task: str) -> None:
    """Refuses what a bundle of kind "module" has nothing for.

    Raises:
        InputError: Naming the option.
    """
    if inputs is not None:
        raise InputError('its parts take no inputs of the model (kind "module")', where="--inputs", hint="Leave it out")
    if task not in ("", tasks.NONE):
        raise InputError('its parts have no task (kind "module")', where=f"--task {task}", hint="Leave it out")


def _found(part: Part, running: Model, order: Sequence[str]) -> Run:
    """A graph as it runs on this host, from named inputs to named outputs; its buffers stay as they were."""

    def call(given: Outputs) -> Outputs:
        tensors = [given[name] for name in order]
        running.check(tensors)
        with contextlib.ExitStack() as undone:
            for program in part.programs:
                undone.enter_context(runs.unchanged_buffers(program.graph_module))
            return flat_run(running.run_flat, order, part.signature["outputs"])(given)

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
    specs = part.signature["specs"]
    return {bucket_name(program.bucket): samples_module.generated(specs, program.bucket) for program in part.programs}


def _counted(samples: Samples, bucket: str, progress: Progress) -> Any:
    for done, sample in enumerate(samples):
        progress(f"compare {bucket}", done, len(samples))
        yield sample


def _program_of(part: Part, bucket: str) -> Program:
    return next(program for program in part.programs if bucket_name(program.bucket) == bucket)


def _originals(
    read: Bundle, against: str | Path | torch.nn.Module | None, model: str, trust_pickle: bool
) -> dict[str, Original]:
    """What each graph is compared with, by path: the original, what was kept of it, or the bundle's own graph."""
    if against is None:
        return {part.path: _own(read, part) for part in read.parts}
    if read.manifest.is_module:
        return _submodules(read, against, model)
    captured = _capture(read, against, model, trust_pickle)
    original = _of_graph(captured.graph_module, f"the original in FP32 ({captured.source})", captured.source)
    assert original.prepared is not None
    _check_weights(read.programs[0], original.prepared, original.source)
    return {"": original}


def _own(read: Bundle, part: Part) -> Original:
    if read.reference is not None:
        graph_module = read.reference.graph_module
        said = "the model in FP32, as the bundle keeps it (batch norm folded)"
        return Original(said, "the kept reference", *_runs(graph_module), prepared=graph_module)
    kept = "" if part.path else ", or optimize with --keep-reference"
    graph_module = part.programs[0].graph_module
    return Original(
        f"the bundle's own graph with FP32 activations (weights as stored; pass --against for the original{kept})",
        "the bundle's own graph",
        lambda tensors: runs.run(graph_module, tensors, runs.InFp32),
        lambda tensors: runs.run(graph_module, tensors, runs.InFp64),
        prepared=None,
    )


def _submodules(read: Bundle, against: str | Path | torch.nn.Module, model: str) -> dict[str, Original]:
    """The parts of the original, which are modules and not graphs."""
    if isinstance(against, torch.nn.Module):
        whole, source = against, type(against).__name__
    else:
        from armopt import sources

        whole = sources.build(Path(against), sources.Options(model=model or str(read.manifest.model["factory"])))
        source = str(against)
    said = f"the original in FP32 ({source})"
    return {part.path: Original(said, source, _flat(whole, part), None, None) for part in read.parts}


def _flat(whole: torch.nn.Module, part: Part) -> Callable[[Sequence[torch.Tensor]], Sequence[Any]]:
    """A submodule as a function of flat tensors, whose result stands as a graph's does."""
    try:
        module = whole.get_submodule(part.path)
    except AttributeError:
        raise InputError(f"has no part {part.path}", where=type(whole).__name__, hint="Is it the original?") from None
    outputs = part.signature["outputs"]
    arrange = structure.builder(part.signature["inputs"])

    def call(tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        nested = arrange(list(tensors))
        with torch.no_grad(), runs.true_fp32():
            found = structure.flatten(outputs, module(*nested["args"], **nested["kwargs"]), "outputs")
        flat: list[Any] = [None] * (max(outputs["positions"]) + 1)
        for position, tensor in zip(outputs["positions"], found, strict=True):
            flat[position] = tensor
        return flat

    module.eval()
    return call


def _of_graph(graph_module: fx.GraphModule, said: str, source: str) -> Original:
    from armopt import graph as g
    from armopt import passes, pipeline

    prepared, _ = pipeline.run(g.copy(graph_module), passes.PREPARE)
    return Original(said, source, *_runs(graph_module), prepared=prepared)


def _runs(graph_module: fx.GraphModule) -> tuple[Any, Any]:
    return (
        lambda tensors: runs.run(graph_module, tensors),
        lambda tensors: runs.run(graph_module, tensors, runs.InFp64),
    )


def _check_weights(program: Program, prepared: fx.GraphModule, source: str) -> None:
    """Refuses an original whose layers are not those that the bundle was made of.

    Raises:
        InputError: Naming the first layer that is missing or has other weights.
    """
    hint = "Is the bundle made from this model?"
    exact = {layer.name: layer for layer in sites.layers(prepared.graph)}
    for name, site in program.sites.items():
        if name not in exact:
            raise InputError(f"has no layer {name}", where=source, hint=hint)
        weight = getattr(prepared, str(exact[name].args[1].target))  # type: ignore[union-attr]
        stored = getattr(program.graph_module, site.weight_key)
        if weight.shape != stored.shape or relative_error(weight, stored) > _OTHER_WEIGHTS:
            raise InputError(f"layer {name} has other weights than the bundle", where=source, hint=hint)


def _capture(read: Bundle, against: str | Path | torch.nn.Module, model: str, trust_pickle: bool) -> Captured:
    """The original as a flat graph that takes the bundle's inputs."""
    from armopt import capture, sources

    specs = read.signature["specs"]
    tensors = dict(next(iter(samples_module.generated(specs, read.programs[0].bucket))))
    sizes = tuple(sorted({program.bucket["batch"] for program in read.programs if "batch" in program.bucket}))
    batch = sizes if len(sizes) > 1 else ()
    if isinstance(against, torch.nn.Module):
        args, kwargs = inputs_module.bind(
            inputs_module.parameters(against)[0], [], tensors, "original", open_ended=True
        )
        captured = capture.module(against, args, kwargs, batch=batch, source=type(against).__name__)
    else:
        options = sources.Options(model=model, samples=tensors, batch=batch, trust_pickle=trust_pickle)
        captured = sources.open_model(Path(against), options)
    if len(captured.input_specs) != len(specs):
        raise InputError(
            f"takes {len(captured.input_specs)} inputs, the bundle {len(specs)}",
            where=captured.source,
            hint="Is the bundle made from this model?",
        )
    return captured
