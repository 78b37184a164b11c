"""The FP32 original that a bundle is compared with, wherever it comes from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from armopt import capture
from armopt.accuracy import runs
from armopt.accuracy.metrics import relative_error
from armopt.capture import files
from armopt.capture.eager import Eager
from armopt.capture.files.format import TrustedFile
from armopt.capture.widening import in_fp32, is_half
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.runtime.loaded import Loaded

if TYPE_CHECKING:
    from armopt.bundle.program import Part, Program
    from armopt.bundle.reader import Bundle


#: Cosine similarity of the rows of a weight: what BF16 makes of one is off by 2^-9 at most.
_SAME_WEIGHTS = 1 - 2.0**-12
#: How far off a weight is that was rounded to BF16 and not scaled.
_ROUNDED = 2.0**-8
#: From flat inputs to flat outputs.
FlatRun = Callable[[Sequence[torch.Tensor]], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Original:
    """What a bundle is compared with.

    Attributes:
        said: In words.
        source: Shorter, for messages.
        reference: Runs it in FP32, flat.
        anchor: Runs it in FP64, flat; None where it can't.
        prepared: Its graph with the layers' names of the bundle; None for the bundle's own graph, by layers.
    """

    said: str
    source: str
    reference: FlatRun
    anchor: FlatRun | None
    prepared: fx.GraphModule | None


Against = str | Path | torch.nn.Module | TrustedFile


def find_originals(read: Bundle, against: Against | None, model: str) -> dict[str, Original]:
    """What each graph is compared with, by path: the original, what was kept of it, or the bundle's own graph."""
    if against is None:
        return {part.path: _own(read, part) for part in read.parts}
    if read.manifest.is_module:
        return _submodules(read, against, model)
    return {"": _whole(read, against, model)}


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
    """The parts of the original."""
    if isinstance(against, torch.nn.Module):
        whole, source = against, type(against).__name__
    else:
        path = _path(against)
        whole = files.build(path, files.Options(model=model or str(read.manifest.model.factory)))
        source = str(path)
    return {part.path: _of_module(read, part, _submodule(whole, part.path), source) for part in read.parts}


def _submodule(whole: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        return whole.get_submodule(path)
    except AttributeError:
        raise InputError(f"has no part {path}", where=type(whole).__name__, hint="Is it the original?") from None


def _whole(read: Bundle, against: Against, model: str) -> Original:
    """The original of a bundle of one graph, which is run as it is and never exported."""
    if isinstance(against, torch.nn.Module):
        return _of_module(read, read.whole, against, type(against).__name__)
    path = _path(against)
    loaded = files.load(path, files.Options(model=model, trust_pickle=isinstance(against, TrustedFile)))
    if isinstance(loaded, torch.export.ExportedProgram):
        return _of_program(read, loaded, str(path))
    return _of_module(read, read.whole, loaded, str(path))


def _of_module(read: Bundle, part: Part, module: torch.nn.Module, source: str) -> Original:
    signature = part.signature
    if any(isinstance(each.__dict__.get("forward"), Loaded) for each in module.modules()):
        what = "runs a bundle's graphs since armopt.load took it: it is no original any more"
        raise InputError(what, where=source, hint="Give a copy from before, or what builds the model")
    if is_half(module):
        module = in_fp32(module, source)
    capture.check_dtypes(module, source)
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    eager = Eager.of_module(module, signature.inputs, signature.outputs, source)
    drawn = runs.random_nodes(part.programs[0].graph_module)
    anchor = None if drawn else functools.partial(runs.run_eager, eager.in_fp64)
    return _eager(read, eager, anchor, _with_weights(part.programs[0], weights, source))


def _of_program(read: Bundle, program: torch.export.ExportedProgram, source: str) -> Original:
    """An exported program, which takes the bundle's inputs by name."""
    names = [spec.name for spec in read.whole.signature.specs]
    taken = [str(name) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    if sorted(names) != sorted(taken):
        other = next((name for name in names if name not in taken), "")
        what = f"takes no input {other!r}" if other else f"takes {len(taken)} inputs, the bundle {len(names)}"
        raise InputError(what, where=source, hint=f"Its inputs are: {', '.join(taken)}. Is the bundle made from it?")
    prepared = _with_weights(read.programs[0], program.state_dict, source)
    eager = Eager.of_program(program, read.whole.signature.outputs, source)
    places = [names.index(name) for name in taken]

    def ordered(tensors: Sequence[torch.Tensor], *, times: int = 1) -> Sequence[Any]:
        return eager([tensors[place] for place in places], times=times)

    return replace(_eager(read, eager, None, prepared), reference=functools.partial(runs.run_eager, ordered))


def _eager(read: Bundle, eager: Eager, anchor: FlatRun | None, prepared: fx.GraphModule) -> Original:
    return Original(
        said=f"the original in FP32 ({eager.source})",
        source=eager.source,
        reference=functools.partial(runs.run_eager, eager),
        anchor=anchor,
        prepared=prepared if read.reference is None else read.reference.graph_module,
    )


def _runs(graph_module: fx.GraphModule) -> tuple[Any, Any]:
    return (
        lambda tensors: runs.run(graph_module, tensors),
        lambda tensors: runs.run(graph_module, tensors, runs.InFp64),
    )


def _with_weights(program: Program, weights: Mapping[str, torch.Tensor], source: str) -> fx.GraphModule:
    """The bundle's graph with the original's own FP32 weights, for errors of single layers.

    Those are taken that have the name and the shape of a layer's. Batch norm, folded, scales their rows: then the
    stored ones stay.

    Raises:
        InputError: Naming the first layer that has other weights: it is another model.
    """
    named = {name.replace(".", "_"): tensor.detach() for name, tensor in weights.items()}
    made = g.copy(program.graph_module)
    for site in program.sites.values():
        exact = named.get(f"{site.node}_weight")
        stored = getattr(program.graph_module, site.weight_key)
        if exact is None or exact.shape != stored.shape:
            continue
        a, b = exact.float().flatten(1), stored.detach().float().flatten(1)
        alike = torch.nn.functional.cosine_similarity(a, b).abs()
        empty = (a.norm(dim=1) == 0) | (b.norm(dim=1) == 0)
        if bool((alike[~empty] < _SAME_WEIGHTS).any()):
            raise InputError(
                f"layer {site.node} has other weights than the bundle",
                where=source,
                hint="Is the bundle made from this model?",
            )
        if relative_error(exact, stored) <= _ROUNDED:
            setattr(made, site.weight_key, exact)
    return made
