"""Evaluates what depends on constants alone."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir import strides
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten
#: What makes a tensor of a given shape, of another only the dtype.
_NEW = frozenset({_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default})
_JOINS = (_aten.stack.default, _aten.cat.default)


@dataclass(frozen=True)
class FoldConstants:
    """f(constants) -> constant, also one of several results.

    Of new_zeros(x) and the like nothing but the shape counts. Refuses a result larger than its inputs and `max_growth`
    bytes, random or mutable operations, buffers that the model writes to, and views whose strides are seen: a constant
    is contiguous once it is stored.
    """

    max_growth: int = 1 << 20

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        written = g.written_constants(graph_module.graph)
        rewritten, skipped = [], []
        for node in list(graph_module.graph.nodes):
            source = _source(node)
            if (
                not _foldable(node)
                or _shows_strides(node)
                or any(str(n.target) in written for n in source.all_input_nodes)
            ):
                continue
            like = node.args[0] if node.target in _NEW else None
            inputs = [g.find_constant(graph_module, n) for n in source.all_input_nodes if n is not like]
            if any(tensor is None for tensor in inputs):
                continue
            size = node.meta["val"].numel() * node.meta["val"].element_size()
            bound = max([self.max_growth, *(t.numel() * t.element_size() for t in inputs if t is not None)])
            if size > bound:
                skipped.append(Skip(node.name, f"the result takes {size} bytes, more than what it is made from"))
                continue
            value = _evaluated(graph_module, node, like)
            made_of = source.all_input_nodes if _arranges(source) else ()
            folded = g.add_constant(graph_module, f"folded_{node.name}", value, node, made_of)
            rewritten.append(node.name)
            g.replace_and_erase(node, folded)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _evaluated(graph_module: fx.GraphModule, node: fx.Node, like: object) -> Any:
    """The value of a node, or its values; of `like` nothing but the dtype is looked at."""
    if (source := _source(node)) is not node:
        return _evaluated(graph_module, source, like)[node.args[1]]
    known = {n: g.find_constant(graph_module, n) for n in node.all_input_nodes}
    if isinstance(like, fx.Node):
        known[like] = torch.empty((), dtype=g.fake_value(like).dtype)
    target: Any = node.target
    with torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        value: Any = target(*args, **kwargs)
    # the bits of what is conjugated or negated later are no values: they would not be stored
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.resolve_conj().resolve_neg(), value)


def _shows_strides(node: fx.Node) -> bool:
    """Whether it is a view that is not contiguous, and somebody reads its strides; passes know other operations."""
    value = node.meta.get("val")
    if not strides.is_view(node) or value is None or strides.is_dense(value, range(value.dim())):
        return False
    return any(user.op == "output" or user.target in strides.READ_STRIDES for user in strides.through_views(node))


def _arranges(node: fx.Node) -> bool:
    """Whether an operation only arranges values anew."""
    return strides.is_view(node) or node.target in _JOINS


def _source(node: fx.Node) -> fx.Node:
    """The operation that makes a value: of one of several results the operation that gives them all."""
    taken: Any = node.args[0] if node.target is operator.getitem else node
    return taken if isinstance(taken, fx.Node) else node


def _foldable(node: fx.Node) -> bool:
    target: Any = _source(node).target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in value.shape):
        return False
    tags = (torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output)
    return g.is_pure(_source(node)) and target.namespace == "aten" and not any(tag in target.tags for tag in tags)
