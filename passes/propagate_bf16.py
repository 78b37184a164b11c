"""Keeps activations in BF16 between kernels that work on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.bf16_flow import ATTENTION, KEEPS_BF16, operands
from armopt.ir.operations import JOIN_ROWS, SPLIT_ROWS
from armopt.ir.records import PassResult, Skip
from armopt.passes._pack import cast

_aten = torch.ops.aten
_CAST = _aten._to_copy.default


@dataclass(frozen=True)
class PropagateBf16:
    """cast_bf16(cast_fp32(x)) -> x; cast_bf16(f(cast_fp32(x))) -> f(x) for an f that moves or selects values.

    The second form reaches through gelu, silu and hardswish as well, which round once more, and casts each part of a
    concatenation. Rows that are split among experts, and joined again, are cast as a whole. Refuses an f whose FP32
    result is used by anything but casts to BF16. Attention works in BF16 where its query, key and value are, whoever
    reads the result: a product, which rounds it anyway.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass until nothing changes."""
        rewritten: list[str] = []
        while changed := _cancel(graph_module) + _cast_whole(graph_module) + _sink(graph_module):
            rewritten += changed
        g.remove_unused(graph_module)
        skipped = [
            Skip(node.name, "another operand is in FP32" if node.target is ATTENTION else "its result is read in FP32")
            for node in g.calls_to(graph_module.graph, *KEEPS_BF16)
            if is_cast(node.args[0], torch.float32)
        ]
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def is_cast(node: Any, dtype: torch.dtype) -> bool:
    """Whether a node only converts to `dtype`."""
    return isinstance(node, fx.Node) and node.target is _CAST and dict(node.kwargs) == {"dtype": dtype}


def _cast_from(cast: fx.Node) -> fx.Node:
    """What a cast converts."""
    (source,) = cast.all_input_nodes
    return source


def _cancel(graph_module: fx.GraphModule) -> list[str]:
    """cast_bf16(cast_fp32(x)) -> x. Equal casts of one tensor become one."""
    rewritten = []
    seen: dict[fx.Node, fx.Node] = {}
    for node in g.calls_to(graph_module.graph, _CAST):
        source = node.args[0]
        if not is_cast(node, torch.bfloat16) or not isinstance(source, fx.Node):
            continue
        if is_cast(source, torch.float32) and _is_bf16(_cast_from(source)):
            replacement = _cast_from(source)
        elif source in seen:
            replacement = seen[source]
        else:
            seen[source] = node
            continue
        rewritten.append(node.name)
        g.replace_and_erase(node, replacement)
        if not source.users:
            graph_module.graph.erase_node(source)
    return rewritten


def _cast_whole(graph_module: fx.GraphModule) -> list[str]:
    """Each part of split_rows cast -> split_rows(cast(x)); join_rows of parts that are all cast -> cast(join_rows)."""
    return [*_cast_before_splits(graph_module), *_cast_behind_joins(graph_module)]


def _cast_before_splits(graph_module: fx.GraphModule) -> list[str]:
    rewritten = []
    for node in g.calls_to(graph_module.graph, SPLIT_ROWS):
        casts = {part: list(part.users) for part in node.users}
        if not casts or not all(len(found) == 1 and is_cast(found[0], torch.bfloat16) for found in casts.values()):
            continue
        source, ends = node.all_input_nodes
        node.args = (cast(graph_module.graph, node, source, torch.bfloat16), ends)
        node.meta["val"] = [part.bfloat16() for part in node.meta["val"]]
        for part, (each,) in casts.items():
            part.meta["val"] = each.meta["val"]
            g.replace_and_erase(each, part)
        rewritten.append(node.name)
    return rewritten


def _cast_behind_joins(graph_module: fx.GraphModule) -> list[str]:
    rewritten = []
    for node in g.calls_to(graph_module.graph, JOIN_ROWS):
        parts: Any = node.args[0]
        if not all(is_cast(part, torch.float32) and _is_bf16(_cast_from(part)) for part in parts):
            continue
        half = g.insert_call(graph_module.graph, node, JOIN_ROWS, ([_cast_from(part) for part in parts], node.args[1]))
        rewritten.append(node.name)
        g.replace_and_erase(node, cast(graph_module.graph, node, half, torch.float32))
        for part in parts:
            if not part.users:
                graph_module.graph.erase_node(part)
    return rewritten


def _is_bf16(node: fx.Node) -> bool:
    return g.fake_value(node).dtype == torch.bfloat16


def _sink(graph_module: fx.GraphModule) -> list[str]:
    """f(cast_fp32(x)) -> cast_fp32(f(x)) where every reader of f goes back to BF16, so that the casts cancel."""
    rewritten = []
    for node in g.calls_to(graph_module.graph, _aten.cat.default):
        if not _wants_bf16(node):
            continue
        parts: Any = node.args[0]
        halves = [cast(graph_module.graph, node, part, torch.bfloat16) for part in parts]
        half = g.insert_call(graph_module.graph, node, _aten.cat.default, (halves, *node.args[1:]))
        rewritten.append(node.name)
        g.replace_and_erase(node, cast(graph_module.graph, node, half, torch.float32))
    for node in g.calls_to(graph_module.graph, *KEEPS_BF16):
        sources = operands(node)
        if not all(is_cast(source, torch.float32) for source in sources):
            continue
        if node.target is not ATTENTION and not _wants_bf16(node):
            continue
        target: Any = node.target
        args = (*map(_cast_from, sources), *node.args[len(sources) :])
        half = g.insert_call(graph_module.graph, node, target, args, dict(node.kwargs))
        rewritten.append(node.name)
        g.replace_and_erase(node, cast(graph_module.graph, node, half, torch.float32))
        for source in set(sources):
            if not source.users:
                graph_module.graph.erase_node(source)
    return rewritten


def _wants_bf16(node: fx.Node) -> bool:
    """Whether all that reads a node, through operations that may run in BF16, converts it to BF16 or is attention."""
    return bool(node.users) and all(
        is_cast(user, torch.bfloat16) or user.target is ATTENTION or (user.target in KEEPS_BF16 and _wants_bf16(user))
        for user in node.users
    )
