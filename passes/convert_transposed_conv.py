"""Takes a transposed convolution for the convolution without zeros between pixels that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops
from armopt.kernels.ops import CONV

_aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertTransposedConv:
    """conv_transpose(x [N, C, H, W], W [C, O, kh, kw], stride s) -> depth to space of conv(x, W' [s * s * O, C, …]).

    Each output pixel of a patch of s x s becomes channels of one, so that no multiplication meets the zeros that the
    Compute Library puts between pixels: an s-th of the arithmetic in each dimension, and in BF16, in which oneDNN's own
    is `ref`. Refuses groups, a dilation, and three dimensions.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        made: _Made = {}
        for node in g.calls(graph_module.graph, CONV):
            if not node.args[7]:
                continue
            if reason := _refusal(node):
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _convert(graph_module, node, made)
        g.sweep(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(node: fx.Node) -> str | None:
    dilation: Any = node.args[6]
    if node.args[9] != 1:
        return "it has groups"
    if max(dilation) > 1:
        return "it has a dilation"
    return "it has three dimensions" if len(dilation) > 2 else None


@dataclass(frozen=True)
class _Dimension:
    """One spatial dimension. Row ``r`` of the uncropped result is row ``r // stride`` of the convolution, and its
    ``r % stride``-th group of channels.

    `taps` are those of the convolution, `before` and `after` the rows to crop.
    """

    stride: int
    taps: int
    padding: int
    before: int
    after: int

    @staticmethod
    def of(size: int, stride: int, padding: int, output_padding: int) -> _Dimension:
        reach = size - padding + output_padding  # of the last input row
        taps = -(-max(size, reach) // stride)
        # what is cropped at both sides, the convolution leaves out already where it can
        blocks = min(padding // stride, taps - (-(-reach // stride)), taps - 1)
        before = padding - blocks * stride
        return _Dimension(stride, taps, taps - 1 - blocks, before, (taps - blocks) * stride - reach)


#: Weights and biases by name and by what they were made for: a layer that is used twice keeps one of each.
_Made = dict[tuple[object, ...], torch.Tensor]


def _convert(graph_module: fx.GraphModule, node: fx.Node, made: _Made) -> None:
    graph = graph_module.graph
    x, weight, bias, other, stride, padding, dilation, _, output_padding, groups, post_op, *rest = node.args
    assert isinstance(weight, fx.Node)
    held = g.constant(graph_module, weight)
    assert held is not None
    geometry = zip(held.shape[2:], stride, padding, output_padding, strict=True)  # type: ignore[arg-type]
    dimensions = [_Dimension.of(*each) for each in geometry]
    key: tuple[object, ...] = (weight.target, *dimensions)
    if key not in made:
        made[key] = _phases(held.detach(), dimensions)
    phases = g.add_constant(graph_module, f"{weight.target}_phases", made[key], node, [weight])
    if bias is not None:
        assert isinstance(bias, fx.Node)
        shift = g.constant(graph_module, bias)
        assert shift is not None
        count = made[key].shape[0] // shift.numel()
        key = (bias.target, count)
        if key not in made:
            made[key] = shift.detach().repeat(count)
        bias = g.add_constant(graph_module, f"{bias.target}_phases", made[key], node, [bias])
    ones, zeros = [1] * len(dimensions), [0] * len(dimensions)
    added = other is not None
    geometry_now = (ones, [each.padding for each in dimensions], dilation, False, zeros, groups)
    args = (x, phases, bias, None, *geometry_now, post_ops.NONE if added else post_op, *rest)
    conv = g.insert_call(graph, node, CONV, args)
    y = _cropped(graph, node, _depth_to_space(graph, node, conv, dimensions), dimensions)
    if added:
        y = g.insert_call(graph, node, _aten.add.Tensor, (y, other))
        if post_op == post_ops.ADD_RELU:
            y = g.insert_call(graph, node, _aten.relu.default, (y,))
    name = node.name
    g.replace_and_erase(node, y)
    conv.name = name


def _phases(weight: torch.Tensor, dimensions: list[_Dimension]) -> torch.Tensor:
    """[C, O, k…] -> [s… * O, C, taps…]: tap ``a * s + phase`` works on the row ``a`` before: the last first."""
    extra = [each.taps * each.stride - size for each, size in zip(dimensions, weight.shape[2:], strict=True)]
    weight = torch.nn.functional.pad(weight, [side for size in reversed(extra) for side in (0, size)])
    weight = weight.reshape(*weight.shape[:2], *(size for each in dimensions for size in (each.taps, each.stride)))
    taps, phases = range(2, weight.dim(), 2), range(3, weight.dim(), 2)
    weight = weight.permute(*phases, 1, 0, *taps).flip(tuple(range(-len(taps), 0)))
    return weight.flatten(0, len(phases)).contiguous()


def _depth_to_space(graph: fx.Graph, node: fx.Node, y: fx.Node, dimensions: list[_Dimension]) -> fx.Node:
    """[N, s… * O, B…] -> [N, O, s * B…], through channels_last, where the rows of a patch are runs of memory."""
    if all(each.stride == 1 for each in dimensions):
        return y
    last = len(dimensions)
    y = g.insert_call(graph, node, _aten.permute.default, (y, [0, *range(2, last + 2), 1]))
    channels = g.value(y).shape[-1]
    for dim, each in enumerate(dimensions, 1):
        if each.stride == 1:
            continue
        channels //= each.stride
        y = g.insert_call(graph, node, _aten.unflatten.int, (y, -1, [each.stride, int(channels)]))
        if dim < last:
            y = g.insert_call(
                graph,
                node,
                _aten.permute.default,
                (y, [*range(dim + 1), last + 1, *range(dim + 1, last + 1), last + 2]),
            )
        y = g.insert_call(graph, node, _aten.flatten.using_ints, (y, dim, dim + 1))
    return g.insert_call(graph, node, _aten.permute.default, (y, [0, last + 1, *range(1, last + 1)]))


def _cropped(graph: fx.Graph, node: fx.Node, y: fx.Node, dimensions: list[_Dimension]) -> fx.Node:
    for dim, each in enumerate(dimensions, 2):
        if each.before or each.after:
            end = -each.after or 2**63 - 1
            y = g.insert_call(graph, node, _aten.slice.Tensor, (y, dim, each.before, end))
    return y
