"""Removes operations that change nothing at inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir import strides
from armopt.ir.records import PassResult

_aten = torch.ops.aten
_COPIES = (
    _aten.clone.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.detach_.default,
    _aten.lift_fresh_copy.default,
    _aten.contiguous.default,
    _aten.dropout.default,
    _aten.feature_dropout.default,
)
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)
_VIEWS = (_aten.alias.default, _aten.detach.default, _aten.detach_.default)
_CASTS = (_aten._to_copy.default, _aten.to.dtype, _aten.to.dtype_layout)


@dataclass(frozen=True)
class RemoveIdentities:
    """clone, alias, detach, contiguous, dropout in eval mode, padding by nothing, joining with nothing (as caches do),
    casts to the same dtype, metadata checks: x -> x.

    Leaves every cast that changes the dtype, and a copy that matters: of an input or weight that the model returns, of
    a buffer that it writes to, or in another layout where that is seen: see KeepStrides.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten = []
        written = g.written_constants(graph_module.graph)
        for node in g.calls_to(graph_module.graph, *_COPIES, *_PADS, *_CASTS, _aten.cat.default):
            source = _only_part(node) if node.target is _aten.cat.default else node.args[0]
            if isinstance(source, fx.Node) and _is_identity(node, source, written):
                rewritten.append(node.name)
                g.replace_and_erase(node, source)
        for node in list(graph_module.graph.nodes):
            if _is_metadata_check(node):
                rewritten.append(node.name)
                graph_module.graph.erase_node(node)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten))


def _only_part(joined: fx.Node) -> fx.Node | None:
    """What tensors without elements are joined to; None where there is not one such."""
    given: Any = joined.args[0]
    parts = [part for part in given if 0 not in g.symbolic_shape(g.fake_value(part).shape)]
    return parts[0] if len(parts) == 1 else None


def _is_metadata_check(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    return name in ("aten::_assert_tensor_metadata", "aten::sym_constrain_range_for_size") and not node.users


def _is_identity(node: fx.Node, source: fx.Node, written: set[str]) -> bool:
    if not _keeps_values(node, source):
        return False
    if node.target in _VIEWS:
        return True
    root = _root(source)
    if root.op in ("placeholder", "get_attr") and any(reader.op == "output" for reader in _sharing(node)):
        return False  # the caller may write into what it gets back
    if root.op == "get_attr" and str(root.target) in written:
        return False  # the copy keeps the value from before the write
    lies_otherwise = strides.fixes_layout(node) or not strides.are_equal(g.fake_value(source), g.fake_value(node))
    return not (lies_otherwise and any(map(strides.reads_strides, strides.through_views(node))))


def _keeps_values(node: fx.Node, source: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    if node.target in (_aten.dropout.default, _aten.feature_dropout.default) and node.args[2] is not False:
        return False
    amounts: Any = node.args[1] if node.target in _PADS else ()
    return all(amount == 0 for amount in amounts)


def _root(node: fx.Node) -> fx.Node:
    """What owns the memory that a node is a view of."""
    while strides.is_view(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def _sharing(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's memory, what may be a view of it and what reads that included."""
    for user in node.users:
        yield user
        if strides.is_view(user):
            yield from _sharing(user)
