"""What stands between the layers of a bound program and depends on what they give, or on this host's libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.bf16_flow import ATTENTION, operands, producer
from armopt.ir.calls import call_of, is_layer
from armopt.kernels import max_pool, table

_aten = torch.ops.aten


def pool_as_integers(
    source: fx.GraphModule, mapping: Mapping[fx.Node, fx.Node], shapes: Mapping[str, Sequence[int | None]]
) -> None:
    """Max pools right behind a layer in BF16 that gives nothing negative, where the size of its image is known."""
    for old in g.calls_to(source.graph, _aten.max_pool2d.default):
        layer = old.args[0]
        if not isinstance(layer, fx.Node) or not is_layer(layer):
            continue
        height, width = shapes[layer.name][-2:]
        window = max_pool.window(old)
        positive = call_of(layer).post_op in max_pool.NOT_NEGATIVE and _is_planned_in_bf16(layer)
        if positive and window is not None and height is not None and width is not None:
            max_pool.emit(mapping[old], window, (height, width))


def _is_planned_in_bf16(layer: fx.Node) -> bool:
    return table.get(call_of(layer).kernel).activations == torch.bfloat16


def attend_in_fp32(source: fx.GraphModule, mapping: Mapping[fx.Node, fx.Node]) -> None:
    """PyTorch's attention, where it is planned in BF16, between casts.

    Without a BF16 product in BLAS torch 2.13 calls oneDNN's ``ref`` for each head, 27 times the instructions of FP32
    (12 heads of 128x64).
    """
    for old in g.calls_to(source.graph, ATTENTION):
        made, node = producer(old.args[0]), mapping[old]
        if node.target is not ATTENTION or not is_layer(made) or not _is_planned_in_bf16(made):
            continue
        wide = tuple(cast(node, x, torch.float32) for x in operands(node))
        node.args = (*wide, *node.args[len(wide) :])
        users = list(node.users)
        with node.graph.inserting_after(node):
            narrow = node.graph.call_function(_aten._to_copy.default, (node,), {"dtype": torch.bfloat16})
        for user in users:
            user.replace_input_with(node, narrow)


def cast(before: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Inserts a cast of `source` in front of a node."""
    with before.graph.inserting_before(before):
        return before.graph.call_function(_aten._to_copy.default, (source,), {"dtype": dtype})
