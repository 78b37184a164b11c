"""Operations through which activations may stay in BF16: they move or select values, or round once or twice more."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

#: Move or select values: BF16 in, the same BF16 out.
MOVES_VALUES = frozenset(
    {
        _aten.reshape.default,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.narrow.default,
        _aten.select.int,
        _aten.relu.default,
        _aten.hardtanh.default,
        _aten.max_pool2d.default,
        _aten.constant_pad_nd.default,
        _aten.pad.default,
        _aten.cat.default,
        _aten.channel_shuffle.default,
    }
)
#: Compute in FP32 on BF16 operands and round once: one rounding more than in FP32.
ROUNDS_ONCE = frozenset({_aten.gelu.default, _aten.silu.default, _aten.hardswish.default})
#: Multiplies in BF16, sums and takes the softmax in FP32, and rounds the probabilities in between.
ATTENTION = _aten.scaled_dot_product_attention.default
KEEPS_BF16 = MOVES_VALUES | ROUNDS_ONCE | {ATTENTION}


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """What an operation that keeps BF16 works on: of attention query, key and value. A mask may stay in FP32."""
    found: Any = node.args[: 3 if node.target is ATTENTION else 1]
    return tuple(found)


def producer(node: Any) -> fx.Node:
    """The node that makes a value, looking through operations that keep BF16; of several operands, the first one's."""
    while node.op == "call_function" and node.target in KEEPS_BF16:
        source = node.args[0]
        node = source[0] if isinstance(source, (list, tuple)) else source
    assert isinstance(node, fx.Node)
    return node


def attention_of(node: fx.Node) -> set[fx.Node]:
    """The attention that reads a value, looking through operations that move values."""
    found: set[fx.Node] = set()
    for user in node.users:
        if user.target is ATTENTION:
            found.add(user)
        elif user.target in MOVES_VALUES:
            found |= attention_of(user)
    return found


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, looking through operations that keep BF16."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user) if user.target in KEEPS_BF16 else [user]
    return found
