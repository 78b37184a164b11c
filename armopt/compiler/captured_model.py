"""What a user gives to be optimized, as parts that are captured: the whole model is one part."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from armopt import capture
from armopt.capture import files, submodules
from armopt.capture.dimensions import NO_AXES, Axes, Dimension, Example, captured_batch
from armopt.capture.files import torchscript
from armopt.capture.files.format import TrustedFile
from armopt.capture.submodules import CapturedPart
from armopt.errors import InputError, unknown
from armopt.ir import graph as g
from armopt.ir.pieces import BATCH
from armopt.ir.records import Bucket, Captured, Skip, Symbol

#: A module, an exported program, a model file (a TrustedFile where reading it may run code), or what
#: :mod:`armopt.capture` made of one of them.
Model = torch.nn.Module | torch.export.ExportedProgram | Captured | files.Divided | str | Path | TrustedFile
Inputs = Sequence[Any] | Mapping[str, Any] | Example
Kind = Literal["graph", "module"]


@dataclass(frozen=True, slots=True)
class Shell:
    """The Python around the parts of a model, which stays the model's own.

    Attributes:
        module: The model.
        factory: Reference to what builds it; empty where none is known.
        state: Parameters and buffers of all that is no part, by name.
    """

    module: torch.nn.Module
    factory: str
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class CapturedModel:
    """A model, captured.

    Attributes:
        name: Where it comes from, for messages.
        parts: Its graphs, each with the sizes to plan for.
        left: Why submodules around the parts stay Python.
        shell: The Python around the parts; None where the one part is the model itself.
    """

    name: str
    parts: tuple[CapturedPart, ...]
    left: tuple[Skip, ...] = ()
    shell: Shell | None = None

    @property
    def digest(self) -> str:
        """sha256 over all graphs and tensors, in hexadecimal."""
        if self.shell is None:
            return self.parts[0].captured.digest
        state = hashlib.sha256()
        for part in self.parts:
            state.update(f"{part.path}:{part.captured.digest}".encode())
        for name, tensor in sorted(self.shell.state.items()):
            state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            state.update(g.tensor_bytes(tensor))
        return state.hexdigest()

    def at_most_rows(self) -> CapturedModel:
        """This model planned for one size of the batch alone, the largest."""
        (part,) = self.parts
        most = max(bucket[BATCH] for bucket in part.buckets)
        kept = tuple(bucket for bucket in part.buckets if bucket[BATCH] == most)
        return replace(self, parts=(replace(part, buckets=kept),))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All parameters and buffers of the original."""
        if self.shell is None:
            return list(self.parts[0].captured.graph_module.buffers())
        return [*self.shell.module.parameters(), *self.shell.module.buffers()]


def capture_model(
    model: Model,
    example_inputs: Inputs | None = None,
    *,
    kind: Kind = "graph",
    batch: Sequence[int] = (),
    dims: Mapping[str, Dimension] = MappingProxyType({}),
    any_batch: bool = False,
) -> CapturedModel:
    """Captures a model whole, or part by part.

    Args:
        model: See :data:`Model`.
        example_inputs: Positional inputs as a sequence, or named ones as a mapping; a file may have its own. Of kind
            "module": a sequence of calls, each with such inputs; sizes that differ between them may vary.
        kind: "graph" or "module".
        batch: Sizes of the first dimension to plan for; several make it dynamic.
        dims: Other dimensions that vary, of what is captured already or named in an :class:`Example`.
        any_batch: Whether one size makes the batch dynamic too.

    Raises:
        InputError: The model or an input is unusable.
        CaptureError: torch.export can't take the model whole.
    """
    batch = _checked_batch(batch)
    if kind not in get_args(Kind):
        raise unknown("kind", str(kind), get_args(Kind))
    if isinstance(example_inputs, Example):
        dims = {each.name: each for given in example_inputs.dims.values() for each in given.values()} | dict(dims)
    if kind == "module":
        model = _to_divide(model, example_inputs)
    if isinstance(model, files.Divided):
        return _divided(model)
    captured = _captured(model, example_inputs, captured_batch(batch, vary=any_batch), dims)
    at = {name: each.at for name, each in dims.items()}
    if batch and any(symbol.name == BATCH for symbol in captured.symbols):
        at[BATCH] = tuple(batch)
    return CapturedModel(captured.source, (CapturedPart("", captured, find_buckets(captured, at)),))


def _to_divide(model: Model, example_inputs: Inputs | None) -> files.Divided:
    """A module with the calls that it is to be divided by.

    Raises:
        InputError: It is no module, or these are no calls.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError('kind "module" needs an nn.Module', where=type(model).__name__, hint="Pass the module")
    if isinstance(example_inputs, Example):
        hint = "Give a sequence of calls; sizes that differ between them may vary"
        raise InputError('kind "module" takes no Example', where="example_inputs", hint=hint)
    calls = [example_inputs] if isinstance(example_inputs, Mapping) else example_inputs or ()
    return files.Divided(model, tuple(_call(given) for given in calls))


def _call(given: Any) -> submodules.Call:
    """Positional and named inputs of one call."""
    return ((), dict(given)) if isinstance(given, Mapping) else (tuple(given), {})


def _checked_batch(batch: Any) -> Sequence[int]:
    """The sizes of a batch.

    Raises:
        InputError: They are no sequence of whole numbers from 1.
    """
    hint = "Give a sequence of whole numbers from 1: batch=(8,) or batch=(1, 8, 32)"
    if isinstance(batch, str) or not isinstance(batch, Sequence):
        raise InputError(f"batch is {batch!r}, no sequence of sizes", where="batch", hint=hint)
    wrong = [size for size in batch if not isinstance(size, int) or isinstance(size, bool) or size < 1]
    if wrong:
        raise InputError(f"{wrong[0]!r} is no size of a batch", where="batch", hint=hint)
    return batch


def _divided(model: files.Divided) -> CapturedModel:
    name = model.factory or type(model.module).__name__
    if not model.calls:
        raise InputError("the model needs example calls", where=name, hint="Pass example_inputs=[(images,), (others,)]")
    parts, left = submodules.find(model.module, model.calls, name)
    inside = tuple(f"{part.path}." for part in parts)
    state = {
        key: tensor.detach()
        for key, tensor in model.module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not key.startswith(inside)
    }
    for key, tensor in state.items():
        g.check_dense(tensor, key)
    return CapturedModel(name, parts, left, Shell(model.module, model.factory, state))


def _captured(
    model: torch.nn.Module | torch.export.ExportedProgram | Captured | str | Path | TrustedFile,
    example_inputs: Inputs | None,
    batch: Sequence[int],
    dims: Mapping[str, Dimension],
) -> Captured:
    if isinstance(model, Captured):
        return model
    axes: Axes = NO_AXES
    if isinstance(example_inputs, Example):
        axes, example_inputs = example_inputs.axes(), example_inputs.inputs
    if isinstance(example_inputs, torch.Tensor):  # whose rows are no inputs
        example_inputs = (example_inputs,)
    kwargs = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = None if example_inputs is None else () if kwargs else tuple(example_inputs)
    if isinstance(model, (str, Path, TrustedFile)):
        path, trusted = (model.path, True) if isinstance(model, TrustedFile) else (model, False)
        options = files.Options(
            samples=kwargs or None, args=args or (), axes=axes, batch=tuple(batch), dims=dims, trust_pickle=trusted
        )
        return files.open_model(Path(path), options)
    if isinstance(model, torch.export.ExportedProgram):
        return capture.exported(model, args, kwargs, source="exported program", axes=axes)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected a model, found a {type(model).__name__}",
            where="model",
            hint="Pass an nn.Module, an exported program or the path of a file; wrap a function in a module",
        )
    _refuse_compiled(model)
    if args is None:
        raise InputError("the model needs example inputs", where=type(model).__name__, hint="Pass example_inputs=(x,)")
    if isinstance(model, torch.jit.ScriptModule):
        return torchscript.capture_script(model, args, kwargs, batch=batch, axes=axes)
    return capture.module(model, args, kwargs, batch=batch, axes=axes, source=type(model).__name__)


def _refuse_compiled(model: torch.nn.Module) -> None:
    """Refuses what armopt.compile made.

    Raises:
        InputError: It did.
    """
    if type(vars(model).get("forward")).__module__.startswith("armopt."):
        what, hint = "the model comes from armopt.compile", "Give the one that it was made from"
        raise InputError(what, where=type(model).__name__, hint=hint)


def find_buckets(captured: Captured, at: Mapping[str, Sequence[int]]) -> tuple[Bucket, ...]:
    """The points to plan for: all combinations of the sizes given, the example's along all other dimensions.

    Args:
        captured: The model.
        at: Dimension -> sizes.

    Raises:
        InputError: There is no such dimension, or it has no such size.
    """
    sizes: dict[str, int] = {}
    for spec, tensor in zip(captured.input_specs, captured.example, strict=True):
        sizes |= {size: tensor.shape[d] for d, size in enumerate(spec.shape) if isinstance(size, str)}
    symbols = {symbol.name: symbol for symbol in captured.symbols}
    if unknown := [name for name in at if name not in symbols]:
        said = f"Those that vary are {', '.join(symbols)}" if symbols else "No dimension varies"
        hint = f"{said}; name others in a shape: --input NAME=1x{unknown[0]}:int64"
        if unknown[0] == BATCH:
            hint = "Let it vary: batch=(1, 8) (--batch 1,8)"
        raise InputError(f"no dimension is called {unknown[0]!r}", where=captured.source, hint=hint)
    wanted = [
        [(name, size) for size in _checked_sizes(symbol, at.get(name) or (sizes[name],), captured.source)]
        for name, symbol in symbols.items()
    ]
    return tuple(dict(bucket) for bucket in itertools.product(*wanted))


def _checked_sizes(symbol: Symbol, sizes: Sequence[int], source: str) -> list[int]:
    """Sizes of a dimension, the least first.

    Raises:
        InputError: The model does not take one.
    """
    most = math.inf if symbol.most is None else symbol.most
    for size in sizes:
        if not symbol.least <= size <= most:
            said = f"{symbol.least} and more" if symbol.most is None else f"{symbol.least} to {symbol.most}"
            raise InputError(f"{symbol.name} can't be {size}: the model takes {said}", where=source)
    return sorted(set(sizes))
