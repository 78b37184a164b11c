"""A lowered graph with what is known of its layers: what a bundle holds for each bucket."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import layers
from armopt.ir.records import Bucket, Signature, Site
from armopt.kernels import sites


@dataclass(frozen=True, slots=True)
class Result:
    """A tensor of fixed size that a node gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: object) -> Result | None:
        """That of a tensor, where its size is fixed."""
        if not isinstance(value, torch.Tensor) or not all(map(g.is_fixed, value.shape)):
            return None
        return Result(tuple(map(int, value.shape)), value.dtype)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Program:
    """The graph for one bucket.

    Attributes:
        bucket: The sizes it was planned for.
        graph_module: armopt and ATen operations over flat tensors.
        sites: Every Linear and convolution by its node's name. In a graph that was read the nodes have names of
            armopt's own making; `site.node` is the name in the bundle, which people know.
        shapes: Output shape of each of them; None where dynamic.
        results: What each node gives at the bucket's sizes, where that is one tensor.
        is_fixed: Whether these are its only sizes.
        weights: Names in the bundle of the graph's constants, where they differ.
    """

    bucket: Bucket
    graph_module: fx.GraphModule
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[int | None, ...]]
    weights: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Result] = field(default_factory=dict)
    is_fixed: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of a model: that of the submodule at `path`, or of the whole model, which has none."""

    path: str
    programs: Sequence[Program]
    signature: Signature

    @property
    def prefix(self) -> str:
        """What names of its weights begin with in a bundle."""
        return f"{self.path}/" if self.path else ""


def describe_program(graph_module: fx.GraphModule, bucket: Bucket, values: Bucket) -> Program:
    """Describes a lowered graph at a bucket (`values`: the same by torch.export's names)."""
    found = {site.node: site for site in sites.find(graph_module, values)}
    shapes = {
        node.name: tuple(int(size) if g.is_fixed(size) else None for size in g.fake_value(node).shape)
        for node in layers(graph_module.graph)
    }
    given = {node.name: Result.of(node.meta.get("val")) for node in graph_module.graph.nodes}
    results = {name: result for name, result in given.items() if result is not None}
    return Program(bucket, graph_module, found, shapes, results=results)
