"""Example inputs: described by ``--input x=1x3x224x224:float32``, like others by statistics, arranged as a call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armopt.errors import InputError
from armopt.ir import buckets
from armopt.ir.records import Bucket, ExampleSpec, InputSpec, Statistics

#: No integer is as large.
_WHOLE = 2**63 - 1
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_FORM = "Write NAME=1x3x224x224:float32, or NAME=1x128:int64:30522 for integers below 30522"
_PATTERN = re.compile(r"(?:(?P<name>[\w.]+)=)?(?P<shape>scalar|\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?::(?P<below>\d+))?")


@dataclass(frozen=True, slots=True)
class InputOption:
    """One ``--input``: name (empty: by position), shape, dtype, and for integers the bound."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    below: int = 2

    def tensor(self, generator: torch.Generator) -> torch.Tensor:
        """A random tensor: normal for floats, in [0, below) for integers."""
        if self.dtype == torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator).bool()
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.randint(0, self.below, self.shape, generator=generator).to(self.dtype)


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
    shape = () if match["shape"] == "scalar" else tuple(int(size) for size in match["shape"].split("x"))
    return InputOption(match["name"] or "", shape, getattr(torch, dtype), int(match["below"] or 2))


def generate(options: Sequence[InputOption], seed: int = 0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Random tensors: those without a name, in order, and those with one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [(option.name, option.tensor(generator)) for option in options]
    return [t for name, t in tensors if not name], {name: t for name, t in tensors if name}


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
