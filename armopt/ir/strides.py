"""How tensors lie in memory: who can see it, and the calls that give a tensor the layout that it is said to have."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

_aten = torch.ops.aten
#: Give other values, or fail, on the same values in another layout.
READ_STRIDES = frozenset(
    {
        *(_aten.as_strided.default, _aten.as_strided_copy.default, _aten.as_strided_scatter.default),
        *(_aten.view_as_complex.default, _aten.view_as_complex_copy.default),
        *(_aten.view.dtype, _aten.view_copy.dtype, _aten._reshape_alias.default, _aten._reshape_alias_copy.default),
        *(_aten.sym_stride.int, _aten.sym_stride.default, _aten.sym_storage_offset.default),
        *(_aten.sym_is_contiguous.default, _aten.is_contiguous.memory_format, _aten.is_contiguous.default),
        *(_aten.native_group_norm.default, _aten.kron.default),  # fail on what is not contiguous
    }
)
#: Views in all but their schema.
_UNSAFE_VIEWS = frozenset(
    {
        _aten.unsafe_split.Tensor,
        _aten.unsafe_split_with_sizes.default,
        _aten.unsafe_chunk.default,
        _aten._unsafe_view.default,
    }
)
_FORMATS = {(0, 2, 3, 1): torch.channels_last, (0, 2, 3, 4, 1): torch.channels_last_3d}


def reads_strides(node: fx.Node) -> bool:
    """Whether a node's result depends on how its operands lie in memory, or whoever gets them can see it.

    Random numbers fill memory in its order. What another library's operation does is not known.
    """
    if node.op == "output":
        return True
    if node.op != "call_function" or node.target in READ_STRIDES:
        return node.op == "call_function"
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace not in ("aten", "prims", "armopt") or _is_random(node)


def _is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers: attention only with dropout."""
    target: Any = node.target
    if target is _aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0))
    return torch.Tag.nondeterministic_seeded in target.tags


def is_view(node: Any) -> bool:
    """Whether a node's result may lie in the memory of its first operand, part of a list of views included."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target in _UNSAFE_VIEWS)


def fixes_layout(node: fx.Node) -> bool:
    """Whether a node gives its operand's values in a layout of its own."""
    return node.target is _aten.contiguous.default or _memory_format(node) not in (None, torch.preserve_format)


def through_views(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's memory, views and what reads them included, up to a copy in another layout."""
    for user in node.users:
        yield user
        if is_view(user) and not fixes_layout(user):
            yield from through_views(user)


def _memory_format(node: fx.Node) -> Any:
    found = node.kwargs.get("memory_format")
    return next((each for each in node.args if isinstance(each, torch.memory_format)), found)


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie alike; strides of dimensions of one don't count."""
    if one.dim() != other.dim() or one.layout is not torch.strided or other.layout is not torch.strided:
        return False
    return all(
        statically_known_true(size == 1) or statically_known_true(a == b)
        for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True)
    )


def order(value: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost in memory; None where there are gaps or overlaps."""
    if value.layout is not torch.strided:
        return None
    plain = tuple(range(value.dim()))
    known = [plain, *(dims for dims in _FORMATS if len(dims) == value.dim()), _sorted(value)]
    return next((dims for dims in known if dims is not None and is_dense(value, dims)), None)


def _sorted(value: torch.Tensor) -> tuple[int, ...] | None:
    strides = [_hint(stride) for stride in value.stride()]
    sizes = [_hint(size) for size in value.shape]
    if None in strides or None in sizes:
        return None
    dims: Any = range(value.dim())
    return tuple(sorted(dims, key=lambda dim: (-(strides[dim] or 0), -(sizes[dim] or 0))))


def _hint(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    return None if size.node.hint is None else int(size.node.hint)


def is_dense(value: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether a tensor lies in memory without gaps in this order of dimensions, from the outermost to the innermost."""
    expected: Any = 1
    for dim in reversed(dims):
        size = value.shape[dim]
        if statically_known_true(size == 1):
            continue
        if not statically_known_true(value.stride(dim) == expected):
            return False
        expected = expected * size
    return True


def calls(dims: tuple[int, ...]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The calls that give a tensor this order of dimensions in memory: operation, further operands, keywords.

    They copy nothing where it has it already.
    """
    if dims == tuple(range(len(dims))):
        return [(_aten.contiguous.default, (), {})]
    if dims in _FORMATS:
        return [(_aten.contiguous.default, (), {"memory_format": _FORMATS[dims]})]
    back = [dims.index(dim) for dim in range(len(dims))]
    permute = _aten.permute.default
    return [(permute, (list(dims),), {}), (_aten.contiguous.default, (), {}), (permute, (back,), {})]
