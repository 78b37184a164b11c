"""Plans memory: results that are not needed at the same time share one piece of it, made once for all calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_ALIGNMENT = 64
_NOTHING: frozenset[fx.Node] = frozenset()
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_aten = torch.ops.aten
#: Composites that always give a tensor of their own.
_GIVE_NEW = frozenset(
    {
        *(_aten.layer_norm, _aten.group_norm, _aten.batch_norm, _aten.rms_norm, _aten.linear, _aten.matmul),
        *(_aten.softmax, _aten.log_softmax, _aten.scaled_dot_product_attention, _aten.max_pool2d),
        *(_aten.adaptive_avg_pool1d, _aten.adaptive_avg_pool2d, _aten.conv1d, _aten.conv2d, _aten.conv3d),
    }
)


@dataclass(frozen=True, slots=True)
class Arena:
    """Where results lie.

    Attributes:
        size: Bytes in all.
        places: The first byte of each result that has a place. What a caller gets has none: it is the caller's own.
    """

    size: int
    places: Mapping[fx.Node, int]


def plan(graph: fx.Graph, sizes: Mapping[fx.Node, int]) -> Arena:
    """Gives results places, the largest first, each the lowest that is free while it is needed.

    Args:
        graph: What runs, in its order.
        sizes: Bytes of each result that may have a place, a new tensor of its node's own.
    """
    order = {node: at for at, node in enumerate(graph.nodes)}
    last = _last_uses(graph, sizes, order)
    places: dict[fx.Node, int] = {}
    for node in sorted(last, key=lambda each: (-sizes[each], order[each])):
        at = 0
        for start, end in sorted(
            (places[other], places[other] + sizes[other])
            for other in places
            if order[other] <= last[node] and order[node] <= last[other]
        ):
            if at + sizes[node] <= start:
                break
            at = max(at, -(-end // _ALIGNMENT) * _ALIGNMENT)
        places[node] = at
    return Arena(max((places[node] + sizes[node] for node in places), default=0), places)


def _last_uses(graph: fx.Graph, sizes: Mapping[fx.Node, int], order: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """When each result is read last, through whatever shows its memory; without those that no place may have."""
    shown: dict[fx.Node, frozenset[fx.Node]] = {}
    last = {node: order[node] for node in sizes}
    lost: set[fx.Node] = set()
    for node in graph.nodes:
        read = frozenset[fx.Node]().union(*(shown.get(source, _NOTHING) for source in node.all_input_nodes))
        last |= dict.fromkeys(read, order[node])
        if node.op == "output" or _changes_how_it_lies(node.target):
            lost |= read
        if node in sizes:
            shown[node] = frozenset((node,))
        elif read and _may_show_memory(node.target):
            shown[node] = read
    return {node: at for node, at in last.items() if node not in lost}


def _may_show_memory(target: Any) -> bool:
    """Whether an operation may give memory of its inputs; most composites don't say so, and some do (dropout)."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    if any(each.alias_info is not None for each in target._schema.returns):
        return True
    return target.overloadpacket not in _GIVE_NEW and target.has_kernel_for_dispatch_key(_COMPOSITE)


def _changes_how_it_lies(target: Any) -> bool:
    """Whether an operation changes the shape or strides of a tensor in place: that would last for the next call."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.inplace_view in target.tags
