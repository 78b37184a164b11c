"""Shapes and dtypes that operations give, for dry runs: of what most models call and torch works out in Python.

For that torch imports sympy and torch._dynamo, which takes longer than loading a bundle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from armopt.ir.operations import JOIN_ROWS, SPLIT_ROWS
from armopt.kernels.geometry import output_size

META = torch.device("meta")


class UnfitError(Exception):
    """What does not come out."""


def shown(value: Any) -> str:
    """A tensor's shape and dtype, for messages; of all else its type."""
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{'x'.join(map(str, value.shape)) or 'scalar'} {value.dtype}".replace("torch.", "")


def pointwise(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What such an operation gives: its shape by broadcasting, its dtype by calling it on one value."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    if not tensors or "device" in kwargs or any(each.name == "memory_format" for each in func._schema.arguments):
        return None
    shape = torch.broadcast_tensors(*tensors)[0].shape  # type: ignore[no-untyped-call]  # broadcast_shapes imports sympy
    found = func(*map(_one, args), **{name: _one(value) for name, value in kwargs.items()})
    if not isinstance(found, torch.Tensor):
        return None
    like = next((each for each in tensors if each.shape == shape), None)
    if like is None:
        return torch.empty(shape, dtype=found.dtype, device=META)
    return _like(like, found.dtype)


def _like(x: torch.Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Dense, its dimensions in the order of `x`: empty_like, which imports sympy for the meta device."""
    order = sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))
    sizes = x.shape if shape is None else shape
    dense = torch.empty([sizes[dim] for dim in order], dtype=dtype, device=META)
    return dense.permute([order.index(dim) for dim in range(x.dim())])


def _one(value: Any) -> Any:
    """A tensor of as many dimensions and one value."""
    return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    first, *others = [each for each in tensors if each.shape != (0,)] or list(tensors)
    place, shape = range(first.dim())[dim], list(first.shape)
    for other in others:
        if [*other.shape[:place], *other.shape[place + 1 :]] != [*shape[:place], *shape[place + 1 :]]:
            raise UnfitError(f"puts {shown(first)} and {shown(other)} together")
        shape[place] += other.shape[place]
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in tensors))
    return torch.empty(shape, dtype=dtype, device=META)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return _cat([each.unsqueeze(dim) for each in tensors], dim)


def _layer_norm(
    x: torch.Tensor, size: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for each in (weight, bias):
        if each is not None and list(each.shape) != list(size):
            raise UnfitError(f"its weight or bias is {shown(each)}")
    if not size or list(x.shape[-len(size) :]) != list(size) or not x.is_floating_point():
        raise UnfitError(f"norms {shown(x)} over the sizes {list(size)}")
    statistics = torch.empty((*x.shape[: -len(size)], *(1 for _ in size)), dtype=x.dtype, device=META)
    return _like(x, x.dtype), statistics, statistics.clone()


def _reduced(x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype) -> torch.Tensor:
    gone = {range(max(1, x.dim()))[each] for each in dim or range(x.dim())}
    kept = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone]
    return torch.empty(kept, dtype=dtype, device=META)


def _mean(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    dtype = x.dtype if dtype is None else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise UnfitError(f"takes the mean of {shown(x)}")
    return _reduced(x, dim, keepdim, dtype)


def _sum(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    whole = torch.int64 if not (x.is_floating_point() or x.is_complex()) else x.dtype
    return _reduced(x, dim, keepdim, whole if dtype is None else dtype)


def _norm(
    x: torch.Tensor,
    ord: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if dtype is not None or not x.is_floating_point():  # other dtypes than its own
        found: torch.Tensor = torch.ops.aten.linalg_vector_norm.default(x, ord, dim, keepdim, dtype=dtype)
        return found
    return _reduced(x, dim, keepdim, x.dtype)


def _triangle(x: torch.Tensor, diagonal: int = 0) -> torch.Tensor:
    if x.dim() < 2:
        raise UnfitError(f"takes the triangle of {shown(x)}")
    return torch.empty(x.shape, dtype=x.dtype, device=META)


def _gather(x: torch.Tensor, dim: int, index: torch.Tensor, sparse_grad: bool = False) -> torch.Tensor:
    place = range(max(1, x.dim()))[dim]
    if index.dtype != torch.int64 or index.dim() != x.dim():  # numbers, indices of 32 bits, none at all
        found: torch.Tensor = torch.ops.aten.gather.default(x, dim, index)
        return found
    if any(a > b for i, (a, b) in enumerate(zip(index.shape, x.shape, strict=True)) if i != place):
        raise UnfitError(f"gathers {shown(index)} from {shown(x)}")
    return torch.empty(index.shape, dtype=x.dtype, device=META)


def _addmm(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    fits = a.dtype == b.dtype == y.dtype and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and y.dim() <= 2
    sizes = (a.shape[0], b.shape[1]) if fits else ()
    if not fits or any(size not in (1, full) for size, full in zip(y.shape[::-1], sizes[::-1], strict=False)):
        raise UnfitError(f"adds {shown(y)} to the product of {shown(a)} and {shown(b)}")
    return torch.empty(sizes, dtype=a.dtype, device=META)


def _alike(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        raise UnfitError(f"is of {shown(x)}")
    return _like(x, x.dtype)


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fits = x.is_floating_point() and x.numel() == batch * channels * size and groups > 0 and channels % groups == 0
    if not fits or any(each is not None and list(each.shape) != [channels] for each in (weight, bias)):
        raise UnfitError(f"norms {shown(x)} in {groups} groups")
    if not x.is_contiguous():  # on the CPU channels_last stays
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten.native_group_norm.default(
            x, weight, bias, batch, channels, size, groups, eps
        )
        return found
    statistics = torch.empty((batch, groups), dtype=x.dtype, device=META)
    return torch.empty(x.shape, dtype=x.dtype, device=META), statistics, statistics.clone()


def _resized(x: torch.Tensor, size: Sequence[int], *rest: Any) -> torch.Tensor:
    if x.dim() != 4 or len(size) != 2 or min(*size, *x.shape[1:]) < 1:
        raise UnfitError(f"resizes {shown(x)} to {list(size)}")
    return _like(x, x.dtype, (*x.shape[:2], *size))


def _plain_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    if half_to_float or not x.is_floating_point():
        raise UnfitError(f"takes the softmax of {shown(x)}")
    return _softmax(x, dim)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    range(max(1, x.dim()))[dim]  # IndexError where there is no such dimension
    return torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=META)


def _embedding(weight: torch.Tensor, indices: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    if weight.dim() != 2 or indices.dtype not in (torch.int64, torch.int32):
        raise UnfitError(f"looks up {shown(indices)} in {shown(weight)}")
    return torch.empty((*indices.shape, weight.shape[1]), dtype=weight.dtype, device=META)


def _index(x: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    tensors = [each for each in indices if each is not None and each.dtype == torch.int64]
    before, end = len(indices) - len(tensors), len(indices)
    fits = len(tensors) > 0 and end <= x.dim() and all(each is None for each in indices[:before])
    if not fits or not x.is_contiguous():  # masks, and dimensions that are left out between
        found: torch.Tensor = torch.ops.aten.index.Tensor(x, indices)
        return found
    shape = torch.broadcast_tensors(*tensors)[0].shape  # type: ignore[no-untyped-call]
    return torch.empty((*x.shape[:before], *shape, *x.shape[end:]), dtype=x.dtype, device=META)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dim() != 3 or b.dim() != 3 or a.dtype != b.dtype or (a.shape[0], a.shape[2]) != b.shape[:2]:
        raise UnfitError(f"multiplies {shown(a)} and {shown(b)}")
    return torch.empty((*a.shape[:2], b.shape[2]), dtype=a.dtype, device=META)


def _max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    stride = stride or kernel
    known = x.dim() == 4 and all(len(each) == 2 for each in (kernel, stride, padding, dilation)) and not ceil_mode
    fits = (
        known
        and min(*kernel, *stride, *dilation) > 0
        and all(0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )
    sizes = output_size(x.shape[2:], kernel, stride, padding, dilation, False, (0, 0)) if fits else [0]
    if min(sizes) < 1:  # torch says what is wrong, and rounds up
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten.max_pool2d_with_indices.default(
            x, kernel, stride, padding, dilation, ceil_mode
        )
        return found
    shape = (*x.shape[:2], *sizes)
    return _like(x, x.dtype, shape), _like(x, torch.int64, shape)


def _split_rows(x: torch.Tensor, ends: torch.Tensor) -> list[torch.Tensor]:
    """Parts that are alike, as plans have them: how many rows each has depends on data."""
    if x.dim() == 0 or ends.dim() != 1 or ends.dtype != torch.int64:
        raise UnfitError(f"splits {shown(x)} at {shown(ends)}")
    count = ends.shape[0]
    return [x[: -(-x.shape[0] // count)] for _ in range(count)]


def _join_rows(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    kinds = {(each.shape[1:], each.dtype) for each in parts if each.dim() > 0}
    if len(kinds) != 1 or any(each.dim() == 0 for each in (*parts, like)):
        raise UnfitError(f"puts {', '.join(map(shown, parts))} together, as many as {shown(like)} has")
    return torch.empty((like.shape[0], *parts[0].shape[1:]), dtype=parts[0].dtype, device=META)


def _view_copy(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Of any strides, as on the CPU; on the meta device torch takes those of a view alone."""
    return torch.empty(x.reshape(size).shape, dtype=x.dtype, device=META)


def _fake_quantize(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For which torch has no rule."""
    if not x.is_floating_point():
        raise UnfitError(f"rounds {shown(x)}")
    return _like(x, x.dtype), _like(x, torch.bool)


#: Rules by operation; their arguments are those of the operation.
RULES: Mapping[Any, Callable[..., Any]] = {
    SPLIT_ROWS: _split_rows,
    JOIN_ROWS: _join_rows,
    torch.ops.aten.view_copy.default: _view_copy,
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.stack.default: _stack,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten.mean.default: functools.partial(_mean, dim=None),
    torch.ops.aten.sum.dim_IntList: _sum,
    torch.ops.aten.sum.default: functools.partial(_sum, dim=None),
    torch.ops.aten.linalg_vector_norm.default: _norm,
    torch.ops.aten.tril.default: _triangle,
    torch.ops.aten.triu.default: _triangle,
    torch.ops.aten.gather.default: _gather,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.hardswish.default: _alike,
    torch.ops.aten.native_group_norm.default: _group_norm,
    torch.ops.aten.upsample_nearest2d.default: _resized,
    torch.ops.aten.upsample_bilinear2d.default: _resized,
    torch.ops.aten._safe_softmax.default: _softmax,
    torch.ops.aten._softmax.default: _plain_softmax,
    torch.ops.aten._log_softmax.default: _plain_softmax,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.embedding.default: _embedding,
    torch.ops.aten.max_pool2d_with_indices.default: _max_pool2d,
    torch.ops.aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantize,
    torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default: _fake_quantize,
    torch.ops.aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantize,
}
