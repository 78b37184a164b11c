"""Merges Linear layers that read the same input: query, key and value become one product."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten
from armopt.kernels.ops import LINEAR, POST_OP

_aten = torch.ops.aten


@dataclass(frozen=True)
class MergeProjections:
    """linear(x, A, a), linear(x, B, b) -> parts of linear(x, cat(A, B), cat(a, b)).

    One call costs its fixed part once, and packs x once. Refuses a layer with a fused post-op, and one whose weight
    another layer shares: merging would store it twice.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        layers = list(g.calls(graph_module.graph, LINEAR))
        uses = Counter(_name(layer.args[1]) for layer in layers)
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for layer in layers:
            by_input[layer.args[0]].append(layer)  # type: ignore[index]
        for group in by_input.values():
            if len(group) < 2:
                continue
            reasons = {layer: _refusal(layer, uses) for layer in group}
            skipped += [Skip(layer.name, reason) for layer, reason in reasons.items() if reason]
            members = [layer for layer, reason in reasons.items() if reason is None]
            if len(members) > 1:
                rewritten += [member.name for member in members]
                _merge(graph_module, members)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _name(weight: object) -> str:
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def _refusal(layer: fx.Node, uses: Counter[str]) -> str | None:
    post_op = layer.args[POST_OP[LINEAR]]
    if post_op != "none":
        return f"its {post_op} is fused"
    if uses[_name(layer.args[1])] > 1:
        return f"its weight {_name(layer.args[1])} is shared"
    return None


def _merge(graph_module: fx.GraphModule, members: list[fx.Node]) -> None:
    first = members[0]
    weights = [_constant(graph_module, member.args[1]) for member in members]
    name = f"{_name(first.args[1])}_merged"
    weight = g.add_constant(graph_module, name, torch.cat(weights), first, [member.args[1] for member in members])  # type: ignore[misc]
    bias = None
    if any(member.args[2] is not None for member in members):
        biases = [
            w.new_zeros(w.shape[0]) if member.args[2] is None else _constant(graph_module, member.args[2])
            for member, w in zip(members, weights, strict=True)
        ]
        bias = g.add_constant(graph_module, f"{name}_bias", torch.cat(biases), first)
    args = (first.args[0], weight, bias, None, "none", aten.LINEAR.name, 0)
    merged = g.insert_call(graph_module.graph, first, LINEAR, args, name=f"{first.name}_merged")
    start = 0
    for member, w in zip(members, weights, strict=True):
        part = g.insert_call(graph_module.graph, member, _aten.narrow.default, (merged, -1, start, w.shape[0]))
        g.replace_and_erase(member, part)
        start += w.shape[0]


def _constant(graph_module: fx.GraphModule, node: object) -> torch.Tensor:
    tensor = g.constant(graph_module, node)
    assert tensor is not None
    return tensor.detach()
