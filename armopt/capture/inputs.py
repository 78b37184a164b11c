"""Example inputs: described by ``--input x=1x3x224x224:float32``, like others by statistics, arranged as a call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from armopt.capture.dimensions import NAME, Axes, Dimension
from armopt.errors import InputError
from armopt.ir import buckets
from armopt.ir.records import Bucket, ExampleSpec, InputSpec, Statistics

#: No integer is as large.
_WHOLE = 2**63 - 1
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_FORM = (
    "Write NAME=1x3x224x224:float32, or NAME=1x128:int64:30522 for integers below 30522; "
    "a name in the shape is a dimension that varies: NAME=1xtokens:int64"
)
_SIZE = rf"(?:\d+|{NAME})"
_PATTERN = re.compile(
    rf"(?:(?P<name>[\w.]+)=)?(?P<shape>scalar|{_SIZE}(?:x{_SIZE})*)(?::(?P<dtype>\w+))?(?::(?P<below>\d+))?"
)


@dataclass(frozen=True, slots=True)
class InputOption:
    """One ``--input``: name (empty: by position), shape, dtype, and for integers the bound.

    A name in the shape is a dimension that varies.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    below: int = 2

    def tensor(self, generator: torch.Generator, dims: Mapping[str, Dimension] = MappingProxyType({})) -> torch.Tensor:
        """A random tensor: normal for floats, in [0, below) for integers."""
        shape = [size if isinstance(size, int) else dims[size].captured() for size in self.shape]
        if self.dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=generator).bool()
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(self.dtype)
        return torch.randint(0, self.below, shape, generator=generator).to(self.dtype)

    def axes(self, dims: Mapping[str, Dimension]) -> dict[int, Dimension]:
        """Which of its dimensions vary."""
        return {axis: dims[size] for axis, size in enumerate(self.shape) if isinstance(size, str)}


def parse(text: str) -> InputOption:
    """Reads one ``--input``.

    Raises:
        InputError: It has another form, or an unknown dtype.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InputError(f"can't read {text!r}", where="--input", hint=_FORM)
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r} in {text!r}", where="--input", hint=f"Known are {', '.join(_DTYPES)}"
        )
    shape = (
        ()
        if match["shape"] == "scalar"
        else tuple(int(size) if size.isdigit() else size for size in match["shape"].split("x"))
    )
    if 0 in shape:
        raise InputError(f"a size is 0 in {text!r}", where="--input", hint="Give sizes from 1")
    return InputOption(match["name"] or "", shape, getattr(torch, dtype), int(match["below"] or 2))


@dataclass(frozen=True, slots=True)
class Generated:
    """What ``--input`` options give: tensors without a name, those with one, and which of their dimensions vary."""

    positional: list[torch.Tensor]
    named: dict[str, torch.Tensor]
    axes: Axes


def generate(
    options: Sequence[InputOption],
    dims: Mapping[str, Dimension] = MappingProxyType({}),
    samples: Mapping[str, torch.Tensor] = MappingProxyType({}),
    seed: int = 0,
) -> Generated:
    """The tensors of options: random ones, and `samples` in the place of those of the same name.

    Args:
        options: What to generate.
        dims: The dimensions that their shapes may name.
        samples: Tensors by name.
        seed: Of the random numbers.

    Raises:
        InputError: The size of a dimension is not known, or a sample has another number of dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = {size: Dimension(size) for option in options for size in option.shape if isinstance(size, str)} | dict(dims)
    positional: list[torch.Tensor] = []
    named = dict(samples)
    axes: dict[int, dict[int, Dimension]] = {}
    for option in options:
        tensor = samples.get(option.name) if option.name else None
        if tensor is None:
            tensor = option.tensor(generator, dims)
        elif tensor.dim() != len(option.shape):
            what = f"input {option.name} has {tensor.dim()} dimensions in the file, {len(option.shape)} here"
            raise InputError(what, where="--input", hint="Write as many sizes and names as the tensor has dimensions")
        if option.name:
            named[option.name] = tensor
        else:
            positional.append(tensor)
        if found := option.axes(dims):
            axes[id(tensor)] = found
    return Generated(positional, named, axes)


def statistics(tensor: torch.Tensor) -> Statistics | None:
    """Of an example input; finite values alone count."""
    if tensor.is_complex():
        return None
    values = tensor.detach().double().flatten()
    values = values[torch.isfinite(values)]
    if values.numel() == 0:
        return None
    figures = values.mean(), values.std(correction=0), values.min(), values.max()
    return Statistics(*(float(figure) for figure in figures))


def like(spec: InputSpec, bucket: Bucket, generator: torch.Generator) -> torch.Tensor:
    """A random tensor for an input: with the statistics of its example where those are known.

    Args:
        spec: The input.
        bucket: The dynamic sizes.
        generator: Of the random numbers.
    """
    shape = tuple((buckets.evaluate(size, bucket) or 1) if isinstance(size, str) else size for size in spec.shape)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    known = spec.statistics if isinstance(spec, ExampleSpec) else None
    if known is None:
        return InputOption(spec.name, shape, dtype).tensor(generator)
    if dtype == torch.bool:
        chosen: torch.Tensor = torch.rand(shape, generator=generator) < known.mean
        return chosen
    if dtype.is_floating_point:
        values: torch.Tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values * known.std + known.mean
        return values.clamp(known.min, known.max).to(dtype)
    least, most = (min(max(int(bound), -_WHOLE), _WHOLE - 1) for bound in (known.min, known.max))
    return torch.randint(least, most + 1, shape, generator=generator).to(dtype)


def bind(
    names: Sequence[str],
    positional: Sequence[torch.Tensor],
    named: Mapping[str, torch.Tensor],
    where: str,
    *,
    open_ended: bool = False,
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Arranges tensors as a call: as many by position as come first in the signature, the rest by name.

    Args:
        names: Parameters that can be given by position, in order.
        positional: Tensors without a name.
        named: Tensors with one.
        where: The model, for the message.
        open_ended: Whether it takes names beyond `names` (``**kwargs``) or any number by position.

    Raises:
        InputError: A name that the model doesn't take, or too many tensors.
    """
    named = dict(named)
    if "" in named:
        positional = [*positional, named.pop("")]
    unknown = [name for name in named if name not in names]
    if (unknown or len(positional) > len(names)) and not open_ended:
        what = f"the model takes no input {unknown[0]!r}" if unknown else f"too many inputs: {len(positional)}"
        raise InputError(what, where=where, hint=f"Its inputs are: {', '.join(names)}")
    args = list(positional)
    for name in names[len(args) :]:
        if name not in named:
            break
        args.append(named.pop(name))
    return tuple(args), named


def parameters(model: torch.nn.Module) -> tuple[list[str], list[str], bool]:
    """What forward takes: by position, by name only, and whether it takes more of either."""
    kinds = inspect.Parameter
    found: Any = inspect.signature(model.forward).parameters.values()
    by_position = [p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    by_name = [p.name for p in found if p.kind == kinds.KEYWORD_ONLY]
    return by_position, by_name, any(p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for p in found)
