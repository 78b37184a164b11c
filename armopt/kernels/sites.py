"""Finds the Linear and convolution nodes of a graph and describes each for the planner."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.bf16_flow import attentions, origin, readers
from armopt.ir.records import Bucket, Site
from armopt.kernels.geometry import output_size
from armopt.kernels.ops import CONV, LINEAR, OTHER


def layers(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of armopt::linear and armopt::conv, in order."""
    return g.calls(graph, LINEAR, CONV)


def find(graph_module: fx.GraphModule, bucket: Bucket) -> tuple[Site, ...]:
    """All sites, with shapes as they are at `bucket`."""
    return tuple(_connected(node, bucket) for node in layers(graph_module.graph))


def _connected(node: fx.Node, bucket: Bucket) -> Site:
    """The site of one node, with what it is connected to."""
    site = describe(node, g.concrete_shape(_meta(node.args[0]).shape, bucket), tuple(_meta(node.args[1]).shape))
    other = node.args[OTHER]
    return replace(
        site,
        source=origin(node.args[0]).name,
        residual="" if other is None else origin(other).name,
        escapes=any(reader.target not in (LINEAR, CONV) for reader in readers(node)),
        attended=_attended(node, bucket),
    )


def _attended(node: fx.Node, bucket: Bucket) -> tuple[int, int, int]:
    """Heads, scores and multiply-adds of all attention that a layer makes the query of."""
    heads = scores = products = 0
    for attention in attentions(node):
        query, key, value = attention.args[:3]
        if origin(query) is node and all(origin(x).target in (LINEAR, CONV) for x in (key, value)):
            *lead, rows, size = g.concrete_shape(_meta(query).shape, bucket)
            count = math.prod(lead) * rows * g.concrete(_meta(key).shape[-2], bucket)
            heads += math.prod(lead)
            scores += count
            products += count * (size + g.concrete(_meta(value).shape[-1], bucket))
    return heads, scores, products


def describe(node: fx.Node, shape: Sequence[int], weight: Sequence[int]) -> Site:
    """The site of one node whose input has `shape` and whose weight has shape `weight`."""
    key = str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""
    if node.target is LINEAR:
        n, k = weight
        m = math.prod(shape[:-1])
        return Site(
            node.name, "linear", m, k, n, tuple(shape), tuple(weight), post_op=str(node.args[4]), weight_key=key
        )
    arguments: Any = node.args[4:11]
    stride, padding, dilation, transposed, output_padding, groups, post_op = arguments
    spatial = output_size(shape[2:], weight[2:], stride, padding, dilation, transposed, output_padding)
    channels = weight[1] * groups if transposed else weight[0]
    return Site(
        node.name,
        "conv",
        m=shape[0] * math.prod(spatial),
        k=math.prod(weight[1:]) if not transposed else weight[0] // groups * math.prod(weight[2:]),
        n=channels,
        shape=tuple(shape),
        weight=tuple(weight),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        transposed=transposed,
        output_padding=tuple(output_padding),
        post_op=post_op,
        weight_key=key,
    )


def _meta(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value
