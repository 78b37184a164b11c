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
from armopt import sites
from armopt.accuracy import gates as gates_module
from armopt.accuracy import nodes, runs
from armopt.accuracy import report as report_module
from armopt.accuracy import samples as samples_module
from armopt.accuracy.checker import Checker, Run, Validation, flat_run, named
from armopt.accuracy.gates import Gate
from armopt.accuracy.metrics import MIN_COSINE, relative_error
from armopt.accuracy.samples import Given, Samples
from armopt.accuracy.tasks import Outputs
from armopt.errors import InputError
from armopt.ir import Captured

if TYPE_CHECKING:
    from armopt.bundle.codec import Program
    from armopt.bundle.reader import Bundle

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
        anchor: Runs it in FP64, flat.
        prepared: Its graph with the layers' names of the bundle; None for the bundle's own graph.
    """

    said: str
    source: str
    reference: Callable[[Sequence[torch.Tensor]], Sequence[Any]]
    anchor: Callable[[Sequence[torch.Tensor]], Sequence[Any]]
    prepared: fx.GraphModule | None


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
        loaded = runtime.from_bundle(read)
    specs = read.signature["specs"]
    order = [spec["name"] for spec in specs]
    model_name = model or str(read.manifest.model["source"])
    given = None if inputs is None else samples_module.read(inputs, specs, model_name)
    if model and against is None and not (given is not None and given.pictures):
        raise InputError(
            "says what class --against's state dict belongs to, and there is no --against",
            where=f"--model {model}",
            hint="Add --against FILE, or leave --model out",
        )
    progress("capture", 0, 1)
    original = _original(read, against, model, trust_pickle)
    if original.prepared is not None and against is not None:
        _check_weights(read.programs[0], original.prepared, original.source)

    def found(given_inputs: Outputs) -> Outputs:
        tensors = [given_inputs[name] for name in order]
        loaded.check(tensors)
        with contextlib.ExitStack() as undone:
            for program in read.programs:
                undone.enter_context(runs.unchanged_buffers(program.graph_module))
            return flat_run(loaded.run_flat, order, read.signature["outputs"])(given_inputs)

    checker = Checker(
        reference=flat_run(original.reference, order, read.signature["outputs"]),
        anchor=flat_run(original.anchor, order, read.signature["outputs"]),
        gates=bounds,
        task=task,
        source=original.source,
    )
    by_bucket = _by_bucket(read, specs, given, lambda sample: loaded.bucket([sample[name] for name in order]))
    figures = {
        bucket: checker.figures(bucket, _counted(samples, bucket, progress), found)
        for bucket, samples in by_bucket.items()
    }
    first = next(iter(by_bucket.values()))
    result = Validation(
        reference=original.said,
        inputs=first.said,
        given=first.given,
        samples=len(first),
        ran="portable twins on this host" if loaded.portable else "the kernels of this host",
        figures=figures,
        verdicts=checker.verdicts(figures),
        task=checker.task_name,
        task_why=checker.task_why,
        no_anchor=checker.no_anchor,
    )
    program = _program_of(read, result.worst_bucket)
    sample = checker.evidence[result.worst_bucket].inputs
    errors = nodes.errors(
        program,
        original.prepared,
        [sample[name] for name in order],
        lambda done, total: progress("layers", done, total),
    )
    outcome = result.to_json() | {"nodes": nodes.entries(errors), "node_bucket": result.worst_bucket}
    if report is not None:
        progress("report", 0, 1)
        about = report_module.About.of(read.manifest, str(bundle))
        evidence = checker.evidence[result.worst_bucket]
        report_module.save(Path(report), outcome, about, result, errors, evidence, first.pictures[:1])
    return outcome


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


def _by_bucket(
    read: Bundle,
    specs: Sequence[Mapping[str, Any]],
    given: Samples | None,
    bucket_of: Callable[[Outputs], Mapping[str, int]],
) -> dict[str, Samples]:
    """The user's samples, in the bucket that the first of them runs in, or generated ones for each bucket."""
    if given is not None:
        return {bucket_name(bucket_of(given.load[0]())): given}
    return {bucket_name(program.bucket): samples_module.generated(specs, program.bucket) for program in read.programs}


def _counted(samples: Samples, bucket: str, progress: Progress) -> Any:
    for done, sample in enumerate(samples):
        progress(f"compare {bucket}", done, len(samples))
        yield sample


def _program_of(read: Bundle, bucket: str) -> Program:
    return next(program for program in read.programs if bucket_name(program.bucket) == bucket)


def _original(read: Bundle, against: str | Path | torch.nn.Module | None, model: str, trust_pickle: bool) -> Original:
    """What the bundle is compared with: the original, what was kept of it, or the bundle's own graph."""
    if against is not None:
        captured = _capture(read, against, model, trust_pickle)
        return _of_graph(captured.graph_module, f"the original in FP32 ({captured.source})", captured.source)
    if read.reference is not None:
        graph_module = read.reference.graph_module
        said = "the model in FP32, as the bundle keeps it (batch norm folded)"
        return Original(said, "the kept reference", *_runs(graph_module), prepared=graph_module)
    said = (
        "the bundle's own graph with FP32 activations (weights as stored; pass --against for the original, "
        "or optimize with --keep-reference)"
    )
    graph_module = read.programs[0].graph_module
    return Original(
        said,
        "the bundle's own graph",
        lambda tensors: runs.run(graph_module, tensors, runs.InFp32),
        lambda tensors: runs.run(graph_module, tensors, runs.InFp64),
        prepared=None,
    )


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
