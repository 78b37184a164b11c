"""Dimensions of inputs that vary: by what name, between which sizes, and at which sizes plans are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from armopt.capture.calls import Args, Kwargs, describe_inputs, is_tensor
from armopt.errors import CaptureError, InputError, first_line
from armopt.ir.pieces import BATCH

#: A name in a shape, where ``x`` stands between sizes.
NAME = r"[A-WYZa-wyz_][A-WYZa-wyz_0-9]*"
_RANGE = re.compile(rf"(?P<name>{NAME})=(?P<least>\d+)\.\.(?P<most>\d+)?")
_AT = re.compile(rf"(?P<name>{NAME})=(?P<sizes>\d+(?:,\d+)*)")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A dimension whose size varies from call to call.

    Attributes:
        name: As messages, plans and bundles have it.
        least: The least size, from 1.
        most: The largest size; None where there is no bound.
        at: Sizes to plan for; other calls run the nearest plan. By default the example's size.
    """

    name: str
    least: int = 1
    most: int | None = None
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = f"dimension {self.name!r}"
        if not re.fullmatch(NAME, self.name):
            hint = "Use letters without x, digits and underscores: tokens"
            raise InputError("is no name of a dimension", where=repr(self.name), hint=hint)
        if self.least < 1 or (self.most is not None and self.most < max(2, self.least)):
            raise InputError(
                f"can't go from {self.least} to {self.most}", where=where, hint="Give sizes from 1, the largest from 2"
            )
        for size in self.at:
            if size < self.least or (self.most is not None and size > self.most):
                said = f"{size} is not in {self.least}..{'' if self.most is None else self.most}"
                raise InputError(said, where=where, hint=f"Plan for sizes between: --at {self.name}=…")

    def captured(self, found: int = 0) -> int:
        """The size to capture at, where an example has `found`; torch.export takes one of 1 as a constant."""
        largest = max(self.at, default=found or self.most or 0)
        if not largest:
            hint = f"Say it with --dim {self.name}=1..512, or where to plan with --at {self.name}=128"
            raise InputError("its size is not known", where=f"dimension {self.name!r}", hint=hint)
        return max(2, largest)

    @property
    def exported(self) -> Any:
        """As torch.export has it."""
        return torch.export.Dim(self.name, min=self.least, max=self.most)


#: By the id of a tensor of the example, which of its dimensions vary.
Axes = Mapping[int, Mapping[int, Dimension]]
NO_AXES: Axes = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Example:
    """Example inputs, and which of their dimensions vary.

    Attributes:
        inputs: Positional inputs as a sequence, or named ones as a mapping.
        dims: Input, by name or position -> its dimension -> what that is: ``{"input_ids": {1: tokens}}``.
    """

    inputs: Sequence[Any] | Mapping[str, Any]
    dims: Mapping[str | int, Mapping[int, Dimension]] = field(default_factory=dict)

    def axes(self) -> Axes:
        """By tensor.

        Raises:
            InputError: There is no such input or dimension.
        """
        given: Mapping[Any, Any] = self.inputs if isinstance(self.inputs, Mapping) else dict(enumerate(self.inputs))
        found = {}
        for name, dimensions in self.dims.items():
            tensor = given.get(name)
            if not isinstance(tensor, torch.Tensor):
                hint = f"The example inputs are {', '.join(map(str, given))}"
                raise InputError(f"no tensor {name!r} among the example inputs", where="dims", hint=hint)
            for axis in dimensions:
                if not 0 <= axis < tensor.dim():
                    what = f"input {name} has {tensor.dim()} dimensions, so none of number {axis}"
                    raise InputError(what, where="dims", hint="Count from 0")
            found[id(tensor)] = dimensions
        return found


def parse(ranges: Sequence[str], at: Sequence[str]) -> dict[str, Dimension]:
    """Dimensions from ``--dim tokens=1..512`` and ``--at tokens=32,128,512``.

    Raises:
        InputError: One has another form, or a size is out of range.
    """
    bounds: dict[str, dict[str, Any]] = {}
    for text in ranges:
        if (match := _RANGE.fullmatch(text)) is None:
            raise InputError(f"can't read {text!r}", where="--dim", hint="Write NAME=LEAST..MOST: tokens=1..512")
        most = int(match["most"]) if match["most"] else None
        given = bounds.setdefault(match["name"], {})
        if given:
            raise InputError(f"{match['name']} is given twice", where="--dim", hint="Give one range for each name")
        given.update(least=int(match["least"]), most=most)
    for text in at:
        if (match := _AT.fullmatch(text)) is None:
            raise InputError(f"can't read {text!r}", where="--at", hint="Write NAME=SIZES: tokens=32,128,512")
        given = bounds.setdefault(match["name"], {})
        given["at"] = (*given.get("at", ()), *map(int, match["sizes"].split(",")))
    return {name: Dimension(name, **given) for name, given in bounds.items()}


def captured_batch(batch: Sequence[int], *, vary: bool) -> tuple[int, ...]:
    """The sizes of the batch to capture for: several make it dynamic, and so does a single one where it is to vary."""
    return (*batch, 2) if batch and vary else tuple(batch)


def with_batch(args: Args, kwargs: Kwargs, axes: Axes, batch: Sequence[int]) -> Axes:
    """The axes, and the batch: the first dimension of all tensors that share the first one's size there."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if is_tensor(leaf) and leaf.dim() > 0]
    if not tensors:
        return axes
    found = {key: dict(dimensions) for key, dimensions in axes.items()}
    for tensor in tensors:
        if tensor.shape[0] == tensors[0].shape[0]:
            _refuse_batch_of(found.get(id(tensor), {}))
            found.setdefault(id(tensor), {}).setdefault(0, Dimension(BATCH, at=tuple(batch)))
    return found


def resized(args: Args, kwargs: Kwargs, axes: Axes, rows: int | None = None) -> tuple[Args, dict[str, Any], Axes]:
    """The inputs at the sizes to capture, repeated or cut, and which dimensions of them vary.

    With `rows` first dimensions that share the first tensor's size get this one, and do not vary.
    """
    found: dict[int, Mapping[int, Dimension]] = {}
    current = next(
        (leaf.shape[0] for leaf in tree_leaves((args, dict(kwargs))) if is_tensor(leaf) and leaf.dim()), None
    )

    def resize(leaf: Any) -> Any:
        if not is_tensor(leaf):
            return leaf
        vary = axes.get(id(leaf), {})
        sizes = {0: rows} if rows is not None and leaf.dim() and leaf.shape[0] == current else {}
        if sizes:
            _refuse_batch_of(vary)
        tensor = at_sizes(leaf, sizes | {axis: each.captured(leaf.shape[axis]) for axis, each in vary.items()})
        if vary:
            found[id(tensor)] = vary
        return tensor

    args, named = tree_map(resize, (args, dict(kwargs)))
    return args, named, found


def _refuse_batch_of(dimensions: Mapping[int, Dimension]) -> None:
    """Refuses sizes of a batch where the first dimension has another name."""
    if 0 in dimensions and dimensions[0].name != BATCH:
        name = dimensions[0].name
        hint = f"Give its sizes: --at {name}=1,8"
        raise InputError(f"the first dimension is called {name!r}, so there is no batch", where="--batch", hint=hint)


def at_sizes(tensor: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """A tensor repeated or cut along some dimensions; the same one where nothing changes."""
    for axis, size in sizes.items():
        if tensor.shape[axis] != size:
            repeats = [1] * tensor.dim()
            repeats[axis] = -(-size // max(1, tensor.shape[axis]))
            tensor = tensor.repeat(repeats).narrow(axis, 0, size).contiguous()
    return tensor


def dynamic_shapes(model: torch.nn.Module, args: Args, kwargs: dict[str, Any], axes: Axes) -> Any:
    """As torch.export takes them; None where nothing varies.

    Raises:
        InputError: Two dimensions of one name differ in their range.
    """
    if not axes:
        return None
    by_name: dict[str, Dimension] = {}
    for dimensions in axes.values():
        for each in dimensions.values():
            if by_name.setdefault(each.name, each) != each:
                raise InputError("has two ranges", where=f"dimension {each.name!r}", hint="Use one Dimension for both")
    exported = {name: each.exported for name, each in by_name.items()}
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    _, tensors = describe_inputs(args, kwargs)
    for tensor in {id(each): each for each in tensors}.values():
        if id(tensor) in axes:
            shapes[tensor] = {axis: exported[each.name] for axis, each in axes[id(tensor)].items()}
    return shapes.dynamic_shapes(model, args, kwargs)


#: What to do where sizes can't vary freely.
ONE_EACH = "Give that size as a number and make one bundle for each, or use armopt.compile"


def fixed(error: Exception, axes: Axes, source: str) -> CaptureError | None:
    """The error where a model can't serve all sizes of a dimension; None where the export failed of something else."""
    text = str(error)
    if not axes or not re.search("Constraints violated|specialized", text):
        return None
    names = sorted({each.name for dimensions in axes.values() for each in dimensions.values()})
    fixes = [line.strip() for line in text.partition("Suggested fixes:")[2].splitlines() if line.strip()]
    for name in names:
        if hint := _other_range(name, fixes):
            return CaptureError(f"the model does not take all sizes of {name}", where=source, hint=hint)
    said = [name for name in names if re.search(rf"\b{name}\b", text)]
    if said in ([], [BATCH]):
        return CaptureError(
            "the model fixes its batch size, so it can't serve several",
            where=source,
            hint="Give one size in batch (--batch), and make one bundle for each",
        )
    some = ", ".join(fix for fix in fixes if re.match(rf"({'|'.join(said)}) = .*[*+-]", fix))
    what = f"the model fixes {' or '.join(said)}: {next(iter(fixes), first_line(error))}"
    if some:  # multiples of a number
        what = f"the model takes only some sizes of {' and '.join(said)}: {some}"
    return CaptureError(what, where=source, hint=ONE_EACH)


def _other_range(name: str, fixes: Sequence[str]) -> str:
    """What to give for a dimension, where torch.export knows a range: ``tokens = Dim('tokens', max=512)``."""
    form = rf"{name} = Dim\('\w+', (?:min=(\d+))?(?:, )?(?:max=(\d+))?\)"
    match = next(filter(None, (re.match(form, fix) for fix in fixes)), None)
    return f"Give --dim {name}={match[1] or 1}..{match[2] or ''}" if match else ""
