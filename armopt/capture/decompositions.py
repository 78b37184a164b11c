"""Takes the writing out of an exported program, as torch does, in a fraction of its time.

``run_decompositions({})`` keeps composite operations whole. To do so it gives each of the hundreds that torch has
another implementation for a while, which takes longer than all else in the capture of a small model. Those that a
program doesn't reach need none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram, exported_program

_aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
#: Composites that torch takes apart, since they may show memory of their inputs or write to it; of other composites
#: they reach none. A program with others is decomposed as torch does it.
_TAKEN_APART = frozenset(
    {
        *(_aten.batch_norm, _aten.chunk, _aten.contiguous, _aten.dropout, _aten.dropout_, _aten.expand_as),
        *(_aten.flatten, _aten.reshape, _aten.to, _aten.unflatten),
    }
)
_COLLECT = "_collect_all_valid_cia_ops"
_lock = threading.Lock()

Operations = frozenset[torch._ops.OpOverload]


def without_writes(program: ExportedProgram) -> ExportedProgram:
    """The program without operations that write or alias, where torch can tell; what else is composite stays whole."""
    kept = reached(program)
    # of what a program does not reach torch would take another implementation for a custom operation's
    own = {
        target: other for target, other in _OWN.items() if program.graph.find_nodes(op="call_function", target=target)
    }
    with torch.no_grad(), contextlib.nullcontext() if kept is None else showing(kept):
        decomposed: ExportedProgram = program.run_decompositions(own)
    return decomposed


def _istft(x: torch.Tensor, n_fft: int, *args: Any, **kwargs: Any) -> Any:
    """What it is made of, without its check of the window's values, which no graph without data passes."""
    arguments = _aten.istft.default._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments[2:]}
    given |= dict(zip(given, args, strict=False)) | kwargs
    if given["return_complex"] or given["onesided"] is False:
        return NotImplemented
    hop, width, length = given["hop_length"] or n_fft // 4, given["win_length"] or n_fft, given["length"]
    window = x.real.new_ones(width) if given["window"] is None else given["window"]
    left = (n_fft - width) // 2
    window = torch.nn.functional.pad(window, (left, n_fft - width - left))
    frames = torch.fft.irfft(x, n_fft, dim=-2, norm="ortho" if given["normalized"] else "backward") * window.unsqueeze(
        -1
    )
    count, cut = x.shape[-1], n_fft // 2 if given["center"] else 0
    whole = n_fft + hop * (count - 1)
    end = whole - cut if length is None else cut + length

    def overlapped(pieces: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.fold(pieces, (1, whole), (1, n_fft), stride=(1, hop))[:, 0, 0, cut:end]

    batched = frames if x.dim() == 3 else frames.unsqueeze(0)
    y = overlapped(batched) / overlapped(window.square().expand(1, count, n_fft).transpose(1, 2))
    if length is not None:
        y = torch.nn.functional.pad(y, (0, max(0, length - y.shape[1])))
    return y if x.dim() == 3 else y.squeeze(0)


_OWN = {_aten.istft.default: _istft}


def reached(program: ExportedProgram) -> Operations | None:
    """The composites that are to stay whole; None where they can't be told."""
    try:
        from torch._export.utils import _is_preservable_cia_op
    except ImportError:  # it is torch's own affair, and may go
        return None
    reached = set()
    for node in program.graph_module.graph.nodes:
        target = node.target
        if node.op == "get_attr":  # the graph of a branch or a loop
            return None
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if _is_preservable_cia_op(target):
            reached.add(target)
        elif _is_composite(target) and target.overloadpacket not in _TAKEN_APART:
            return None
    return frozenset(reached)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return _COMPOSITE in target.py_kernels or target.has_kernel_for_dispatch_key(_COMPOSITE)


@contextlib.contextmanager
def showing(kept: Operations) -> Iterator[None]:
    """Hides all composite operations but these from torch, in this thread; a torch that collects none sees all."""
    collect = getattr(exported_program, _COLLECT, None)
    if collect is None:
        yield
        return
    thread = threading.get_ident()
    with _lock:
        setattr(exported_program, _COLLECT, lambda: set(kept) if threading.get_ident() == thread else collect())
        try:
            yield
        finally:
            setattr(exported_program, _COLLECT, collect)
