"""Max pooling of BF16 values that are not negative: they compare as the integers of their bits do.

NaN is the largest of all once its sign is gone. ATen's max_pool2d widens each value of each window to FP32 and keeps
the index of the largest: 27 instructions an output of 3x3 on the emulated Graviton3. Rows, then columns, with the
integer maximum take 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
#: Post-ops whose results are never negative.
NOT_NEGATIVE = frozenset({"relu", "relu6", "add_relu", "sigmoid", "hardsigmoid"})


def window(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """Size, stride and padding of a max_pool2d; None where it is dilated or rounds its size up."""
    given: tuple[Any, ...] = node.args[1:]
    size, stride, padding, dilation, ceil = given + _DEFAULTS[len(given) :]
    if any(step != 1 for step in _pair(dilation)) or ceil:
        return None
    return _pair(size), _pair(stride or size), _pair(padding)


def emit(node: fx.Node, window: tuple[list[int], list[int], list[int]], image: Sequence[int]) -> None:
    """Puts the calls that pool an image of [height, width] into the place of `node`."""
    size, stride, padding = window

    def call(target: Any, *args: Any) -> fx.Node:
        with node.graph.inserting_before(node):
            return node.graph.call_function(target, args)

    x = call(_aten.bitwise_and.Scalar, call(_aten.view.dtype, node.args[0], torch.int16), 0x7FFF)
    if max(padding):
        x = call(_aten.constant_pad_nd.default, x, [padding[1], padding[1], padding[0], padding[0]], 0)
    for i, length in enumerate(image):
        outputs = (length + 2 * padding[i] - size[i]) // stride[i] + 1
        whole = x
        for tap in range(size[i]):
            part = call(_aten.slice.Tensor, whole, i - 2, tap, tap + (outputs - 1) * stride[i] + 1, stride[i])
            x = part if tap == 0 else call(_aten.maximum.default, x, part)
    node.replace_all_uses_with(call(_aten.view.dtype, x, torch.bfloat16))
    node.graph.erase_node(node)


_DEFAULTS: tuple[Any, ...] = (None, [], [0, 0], [1, 1], False)


def _pair(values: Any) -> list[int]:
    listed = [int(value) for value in values] if isinstance(values, (list, tuple)) else [int(values)]
    return listed * 2 if len(listed) == 1 else listed
