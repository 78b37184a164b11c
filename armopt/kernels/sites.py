"""Finds the Linear and convolution nodes of a graph and describes each for the planner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from armopt.ir import graph as g
from armopt.ir.bf16_flow import attention_of, operands, producer, readers
from armopt.ir.calls import ConvCall, call_of, is_layer, layers
from armopt.ir.records import Bucket, Op, Site
from armopt.kernels.geometry import output_size


def find(graph_module: fx.GraphModule, bucket: Bucket) -> tuple[Site, ...]:
    """All sites, with shapes as they are at `bucket`."""
    bucket = g.with_rows_of_parts(graph_module.graph, bucket)
    return tuple(_connected(node, bucket) for node in layers(graph_module.graph))


def _connected(node: fx.Node, bucket: Bucket) -> Site:
    """The site of one node, with what it is connected to."""
    call = call_of(node)
    site = describe(node, g.shape_at(g.fake_value(call.x).shape, bucket), tuple(g.fake_value(call.weight).shape))
    return replace(
        site,
        source=producer(call.x).name,
        residual="" if call.other is None else producer(call.other).name,
        escapes=not all(is_layer(reader) for reader in readers(node)),
        attended=_attended(node, bucket),
    )


def _attended(node: fx.Node, bucket: Bucket) -> tuple[int, int, int]:
    """Heads, scores and multiply-adds of all attention that a layer makes the query of."""
    heads = scores = products = 0
    for attention in attention_of(node):
        query, key, value = operands(attention)
        if producer(query) is node and all(is_layer(producer(x)) for x in (key, value)):
            *lead, rows, size = g.shape_at(g.fake_value(query).shape, bucket)
            count = math.prod(lead) * rows * g.size_at(g.fake_value(key).shape[-2], bucket)
            heads += math.prod(lead)
            scores += count
            products += count * (size + g.size_at(g.fake_value(value).shape[-1], bucket))
    return heads, scores, products


def describe(node: fx.Node, shape: Sequence[int], weight: Sequence[int]) -> Site:
    """The site of one node whose input has `shape` and whose weight has shape `weight`."""
    call = call_of(node)
    if not isinstance(call, ConvCall):
        n, k = weight
        m = math.prod(shape[:-1])
        return Site(
            node.name,
            Op.LINEAR,
            m,
            k,
            n,
            tuple(shape),
            tuple(weight),
            post_op=call.post_op,
            weight_key=call.weight_name,
        )
    spatial = output_size(shape[2:], weight[2:], *call.geometry[:-1])
    channels = weight[1] * call.groups if call.transposed else weight[0]
    return Site(
        node.name,
        Op.CONV,
        m=shape[0] * math.prod(spatial),
        k=math.prod(weight[1:]) if not call.transposed else weight[0] // call.groups * math.prod(weight[2:]),
        n=channels,
        shape=tuple(shape),
        weight=tuple(weight),
        stride=tuple(call.stride),
        padding=tuple(call.padding),
        dilation=tuple(call.dilation),
        groups=call.groups,
        transposed=call.transposed,
        output_padding=tuple(call.output_padding),
        post_op=call.post_op,
        weight_key=call.weight_name,
    )


def result_shape(site: Site) -> tuple[int, ...]:
    """The shape of a site's result, at the sizes that were planned."""
    if site.op == Op.LINEAR:
        return (*site.shape[:-1], site.n)
    geometry = (site.stride, site.padding, site.dilation, site.transposed, site.output_padding)
    return (site.shape[0], site.n, *output_size(site.shape[2:], site.weight[2:], *geometry))
