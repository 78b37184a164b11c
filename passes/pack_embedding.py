"""Keeps tables of embeddings in BF16."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.passes._pack import cast, rounded_constant

_aten = torch.ops.aten


@dataclass(frozen=True)
class PackEmbedding:
    """embedding(W, i) -> cast_fp32(embedding(W_bf16, i)): half the bytes, and one table where a product shares it.

    Refuses a table of fewer bytes than `least`, which saves too little for a rounding, one that is no constant, and
    one that the user keeps in FP32.

    Attributes:
        rounded: BF16 weights by name; plans of one model share them.
        pinned: Nodes that stay in FP32.
        least: Bytes of the table in FP32.
    """

    rounded: dict[str, torch.Tensor]
    pinned: Collection[str] = ()
    least: int = 1 << 20

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        graph = graph_module.graph
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for node in g.calls_to(graph, _aten.embedding.default):
            held = node.args[0]
            table = g.find_constant(graph_module, held)
            if not isinstance(held, fx.Node) or table is None or table.dtype != torch.float32:
                continue
            if node.name in self.pinned:
                skipped.append(Skip(node.name, "the user keeps it in FP32"))
                continue
            if table.numel() * table.element_size() < self.least:
                skipped.append(Skip(node.name, f"the table has fewer than {self.least} bytes"))
                continue
            weight = rounded_constant(graph_module, held, self.rounded, node)
            half = g.insert_call(graph, node, _aten.embedding.default, (weight, *node.args[1:]), dict(node.kwargs))
            rewritten.append(node.name)
            g.replace_and_erase(node, cast(graph, node, half, torch.float32))
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))
