"""A lowered graph with what is known of its layers: what a bundle holds for each bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import layers
from armopt.ir.records import Bucket, Site
from armopt.kernels import sites


@dataclass(frozen=True, slots=True)
class Program:
    """The graph for one bucket.

    Attributes:
        bucket: The sizes it was planned for.
        graph_module: armopt and ATen operations over flat tensors.
        sites: Every Linear and convolution by its node's name.
        shapes: Output shape of each of them; None where dynamic.
    """

    bucket: Bucket
    graph_module: fx.GraphModule
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[int | None, ...]]


def describe_program(graph_module: fx.GraphModule, bucket: Bucket, values: Bucket) -> Program:
    """Describes a lowered graph at a bucket (`values`: the same by torch.export's names)."""
    found = {site.node: site for site in sites.find(graph_module, values)}
    shapes = {
        node.name: tuple(int(size) if g.is_fixed(size) else None for size in g.fake_value(node).shape)
        for node in layers(graph_module.graph)
    }
    return Program(bucket, graph_module, found, shapes)
