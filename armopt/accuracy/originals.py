"""The FP32 original that a bundle is compared with, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from armopt.accuracy import runs
from armopt.accuracy import samples as samples_module
from armopt.accuracy.metrics import relative_error
from armopt.capture import inputs
from armopt.capture.files.format import TrustedFile
from armopt.errors import InputError
from armopt.ir import nesting
from armopt.ir.calls import call_of, layers
from armopt.ir.records import Captured

if TYPE_CHECKING:
    from armopt.bundle.program import Part, Program
    from armopt.bundle.reader import Bundle


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


Against = str | Path | torch.nn.Module | TrustedFile


def find_originals(read: Bundle, against: Against | None, model: str) -> dict[str, Original]:
    """What each graph is compared with, by path: the original, what was kept of it, or the bundle's own graph."""
    if against is None:
        return {part.path: _own(read, part) for part in read.parts}
    if read.manifest.is_module:
        return _submodules(read, against, model)
    captured = _capture(read, against, model)
    original = _of_graph(captured.graph_module, f"the original in FP32 ({captured.source})", captured.source)
    assert original.prepared is not None
    _check_weights(read.programs[0], original.prepared, original.source)
    return {"": original}


def _path(against: str | Path | TrustedFile) -> Path:
    return Path(against.path if isinstance(against, TrustedFile) else against)


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


def _submodules(read: Bundle, against: Against, model: str) -> dict[str, Original]:
    """The parts of the original, which are modules and not graphs."""
    if isinstance(against, torch.nn.Module):
        whole, source = against, type(against).__name__
    else:
        from armopt.capture import files

        path = _path(against)
        whole = files.build(path, files.Options(model=model or str(read.manifest.model.factory)))
        source = str(path)
    said = f"the original in FP32 ({source})"
    return {part.path: Original(said, source, _flat(whole, part), None, None) for part in read.parts}


def _flat(whole: torch.nn.Module, part: Part) -> Callable[[Sequence[torch.Tensor]], Sequence[Any]]:
    """A submodule as a function of flat tensors, whose result stands as a graph's does."""
    try:
        module = whole.get_submodule(part.path)
    except AttributeError:
        raise InputError(f"has no part {part.path}", where=type(whole).__name__, hint="Is it the original?") from None
    outputs = part.signature.outputs
    arrange = nesting.builder(part.signature.inputs.tree)

    def call(tensors: Sequence[torch.Tensor]) -> Sequence[Any]:
        nested = arrange(list(tensors))
        with torch.no_grad(), runs.true_fp32():
            found = nesting.flatten(outputs.tree, module(*nested["args"], **nested["kwargs"]), "outputs")
        flat: list[Any] = [None] * (max(outputs.positions) + 1)
        for position, tensor in zip(outputs.positions, found, strict=True):
            flat[position] = tensor
        return flat

    module.eval()
    return call


def _of_graph(graph_module: fx.GraphModule, said: str, source: str) -> Original:
    from armopt import passes
    from armopt.ir import graph as g
    from armopt.passes import _pipeline as pipeline

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
    exact = {layer.name: call_of(layer) for layer in layers(prepared.graph)}
    for site in program.sites.values():
        if site.node not in exact:
            raise InputError(f"has no layer {site.node}", where=source, hint=hint)
        weight = getattr(prepared, exact[site.node].weight_name)
        stored = getattr(program.graph_module, site.weight_key)
        if weight.shape != stored.shape or relative_error(weight, stored) > _OTHER_WEIGHTS:
            raise InputError(f"layer {site.node} has other weights than the bundle", where=source, hint=hint)


def _capture(read: Bundle, against: Against, model: str) -> Captured:
    """The original as a flat graph that takes the bundle's inputs."""
    from armopt import capture
    from armopt.capture import files

    specs = read.whole.signature.specs
    tensors = dict(next(iter(samples_module.generated(specs, read.programs[0].bucket))))
    sizes = tuple(sorted({program.bucket["batch"] for program in read.programs if "batch" in program.bucket}))
    batch = sizes if len(sizes) > 1 else ()
    if isinstance(against, torch.nn.Module):
        args, kwargs = inputs.bind(inputs.parameters(against)[0], [], tensors, "original", open_ended=True)
        captured = capture.module(against, args, kwargs, batch=batch, source=type(against).__name__)
    else:
        trusted = isinstance(against, TrustedFile)
        options = files.Options(model=model, samples=tensors, batch=batch, trust_pickle=trusted)
        captured = files.open_model(_path(against), options)
    if len(captured.input_specs) != len(specs):
        raise InputError(
            f"takes {len(captured.input_specs)} inputs, the bundle {len(specs)}",
            where=captured.source,
            hint="Is the bundle made from this model?",
        )
    return captured
