"""The submodules of a model that can be captured, where the model as a whole can't: found by watching it run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from armopt import capture
from armopt.capture.widening import SAID, say_if_half
from armopt.errors import CaptureError, InputError
from armopt.ir import buckets
from armopt.ir.nesting import Inputs
from armopt.ir.records import Bucket, Captured, Skip
from armopt.models.huggingface import without_cache

#: Positional and named inputs of one call.
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
#: Plans for one part: more points cost loading time, and the nearest serves between them.
MOST_BUCKETS = 2
#: Modules whose matrices are no Linear's or convolution's weights.
_OTHERS = (torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.RNNBase, torch.nn.RNNCellBase)


@dataclass(frozen=True, slots=True)
class CapturedPart:
    """A part of a model as one graph.

    Attributes:
        path: Of the submodule, as torch names it: the model itself has the empty path.
        captured: Its graph.
        buckets: The sizes to plan for.
    """

    path: str
    captured: Captured
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a submodule: how its inputs nest, and their shapes and dtypes."""

    structure: Inputs
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


def find(
    model: torch.nn.Module, calls: Sequence[Call], source: str
) -> tuple[tuple[CapturedPart, ...], tuple[Skip, ...]]:
    """Captures the largest submodules that can be, from the model down; dimensions that vary between calls are dynamic.

    Args:
        model: Left as it was.
        calls: Inputs to run it on. What differs between them is taken to vary, all else to be fixed.
        source: What to call the model in messages.

    Returns:
        The parts, and why submodules around them stay Python.

    Raises:
        InputError: The model fails on a call, or nothing in it can be captured.
    """
    if not has_layers(model):
        hint = "armopt.compile runs it as it is"
        raise InputError("has no Linear and no convolution, so nothing can be optimized", where=source, hint=hint)
    parts: list[CapturedPart] = []
    left: list[Skip] = []
    level = {"": model}
    say_if_half(model, source)
    with capture.eval_mode(model), without_cache(model), torch.no_grad():
        seen = _watch(model, calls, source)
        while level:
            reasons = {path: _unfit(seen.get(path, [])) for path in level}
            wanted = {path: _representative(seen[path]) for path, reason in reasons.items() if reason is None}
            samples = _collect(model, calls, wanted, source)
            deeper: dict[str, torch.nn.Module] = {}
            for path, module in level.items():
                reason = reasons[path]
                if reason is None:
                    try:
                        part = _capture(path, module, samples[path], seen[path], source)
                        if not path:
                            raise InputError(
                                "the model can be captured whole", where=source, hint='Leave out kind="module"'
                            )
                        parts.append(part)
                        continue
                    except (CaptureError, InputError) as error:
                        if not path and not isinstance(error, CaptureError):
                            raise
                        reason = error.what
                left.append(Skip(path or source, reason))
                deeper |= dict(_children(module, path))
            level = deeper
    if not parts:
        what = f"nothing in the model can be captured: {left[0].reason}"
        raise InputError(what, where=source, hint="See docs/compile.md")
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return tuple(sorted(parts, key=lambda part: order[part.path])), tuple(left)


def has_layers(module: torch.nn.Module) -> bool:
    """Whether a module, or one inside it, holds a matrix that a kernel may multiply with."""
    return any(
        parameter.dim() > 1
        for part in module.modules()
        if not isinstance(part, _OTHERS)
        for parameter in part.parameters(recurse=False)
    )


def _children(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Submodules with layers; lists and dictionaries of modules are looked through."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, (torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from _children(child, inner)
        elif has_layers(child):
            yield inner, child


@contextmanager
def _hooked(model: torch.nn.Module, paths: Collection[str], tell: Callable[[str, Call], None]) -> Iterator[None]:
    """Reports every call of the submodules at `paths` to `tell`, as long as the block runs."""

    def watch(path: str) -> Any:
        return model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs: tell(path, (args, kwargs)), with_kwargs=True
        )

    handles = [watch(path) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: torch.nn.Module, calls: Sequence[Call], source: str) -> dict[str, list[_Seen | str]]:
    """Every call of every submodule with layers; a text where its inputs can't be described."""
    found: dict[str, list[_Seen | str]] = {}

    def note(path: str, call: Call) -> None:
        entries = found.setdefault(path, [])
        try:
            described, tensors = capture.describe_inputs(*call)
        except InputError as error:
            entries.append(f"{error.where} {error.what}")
            return
        shapes, dtypes = tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)
        entry = _Seen(described, shapes, dtypes)
        if entry not in entries:
            entries.append(entry)

    paths = [path for path, module in model.named_modules() if has_layers(module)]
    with _hooked(model, paths, note):
        for args, kwargs in calls:
            capture.try_once(model, args, kwargs, source)
    return found


def _unfit(seen: Sequence[_Seen | str]) -> str | None:
    """Why a submodule is no graph, from its calls; None where it may be one."""
    if not seen:
        return "it is not called as a module on the example inputs"
    first = seen[0]
    for entry in seen:
        if isinstance(entry, str):
            return entry
        assert isinstance(first, _Seen)
        ranks = [len(shape) for shape in first.shapes]
        if entry.structure != first.structure or entry.dtypes != first.dtypes:
            return "its inputs nest otherwise from call to call, or hold other numbers"
        if [len(shape) for shape in entry.shapes] != ranks:
            return "its inputs have other ranks from call to call"
    return None


def _representative(seen: Sequence[_Seen | str]) -> _Seen:
    """The call to capture from: the largest of those whose varying sizes are none of 0 and 1, which export fixes."""
    entries = [entry for entry in seen if isinstance(entry, _Seen)]
    varying = _varying(entries)

    def rank(entry: _Seen) -> tuple[bool, int]:
        sizes = [shape[d] for shape, dims in zip(entry.shapes, varying, strict=True) for d in dims]
        return all(size > 1 for size in sizes), sum(math.prod(shape) for shape in entry.shapes)

    return max(entries, key=rank)


def _varying(entries: Sequence[_Seen]) -> list[set[int]]:
    """For each tensor, the dimensions that differ between calls."""
    return [
        {d for d in range(len(shapes[0])) if len({shape[d] for shape in shapes}) > 1}
        for shapes in zip(*(entry.shapes for entry in entries), strict=True)
    ]


def _collect(
    model: torch.nn.Module, calls: Sequence[Call], wanted: Mapping[str, _Seen], source: str
) -> dict[str, Call]:
    """The inputs of one chosen call of each submodule."""
    found: dict[str, Call] = {}

    def keep(path: str, call: Call) -> None:
        if path in found:
            return
        described, tensors = capture.describe_inputs(*call)
        if (described, tuple(tuple(t.shape) for t in tensors)) == (wanted[path].structure, wanted[path].shapes):
            copied = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, call)
            found[path] = copied

    with _hooked(model, wanted, keep):
        for args, kwargs in calls:
            if len(found) < len(wanted):
                capture.try_once(model, args, kwargs, source)
    return found


def _capture(
    path: str, module: torch.nn.Module, sample: Call, seen: Sequence[_Seen | str], source: str
) -> CapturedPart:
    """One submodule as a graph that serves all its calls.

    Raises:
        CaptureError: It can't be exported so.
    """
    entries = [entry for entry in seen if isinstance(entry, _Seen)]
    args, kwargs = sample
    where = f"{source}: {path}" if path else source
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SAID)  # once, of the whole model
        captured = capture.module(module, args, kwargs, varying=_varying(entries), source=where)
    found: list[Bucket] = []
    for entry in entries:
        sizes = _sizes(captured, entry)
        if sizes is None:
            raise CaptureError("its graph holds for some of its calls only", where=where)
        if 0 not in sizes.values():
            found.append(dict(zip(sizes, buckets.round_up(list(sizes.values())), strict=True)))
    distinct = [bucket for i, bucket in enumerate(found) if bucket not in found[:i]]
    distinct.sort(key=lambda bucket: math.prod(bucket.values()))
    while len(distinct) > MOST_BUCKETS:  # the ends stay
        del distinct[len(distinct) // 2]
    return CapturedPart(path, captured, tuple(distinct))


def _sizes(captured: Captured, entry: _Seen) -> dict[str, int] | None:
    """The dynamic dimensions of a call; None where it does not fit the graph."""
    names = {symbol.name for symbol in captured.symbols}
    sizes: dict[str, int] = {}
    for spec, shape in zip(captured.input_specs, entry.shapes, strict=True):
        for expected, size in zip(spec.shape, shape, strict=True):
            if isinstance(expected, int):
                if expected != size:
                    return None
            elif expected in names and sizes.setdefault(expected, size) != size:
                return None
    return sizes
