"""Takes a transposed convolution for the convolution without zeros between pixels that it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall
from armopt.ir.operations import CONV
from armopt.ir.records import PassResult, Skip
from armopt.kernels import post_ops

_aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertTransposedConv:
    """conv_transpose(x [N, C, H, W], W [C, O, kh, kw], stride s) -> depth to space of conv(x, W' [s * s * O, C, …]).

    Each output pixel of a patch of s x s becomes channels of one, so that no multiplication meets the zeros that the
    Compute Library puts between pixels: an s-th of the arithmetic in each dimension, and in BF16, in which oneDNN's own
    is `ref`. Refuses groups and a dilation.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        made: _Made = {}
        for node in g.calls_to(graph_module.graph, CONV):
            call = ConvCall.of(node)
            if not call.transposed:
                continue
            if reason := _refusal(call):
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _convert(graph_module, node, call, made)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _refusal(call: ConvCall[fx.Node]) -> str | None:
    if call.groups != 1:
        return "it has groups"
    return "it has a dilation" if max(call.dilation) > 1 else None


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


def _convert(graph_module: fx.GraphModule, node: fx.Node, call: ConvCall[fx.Node], made: _Made) -> None:
    graph = graph_module.graph
    held = g.constant(graph_module, call.weight)
    geometry = zip(held.shape[2:], call.stride, call.padding, call.output_padding, strict=True)
    dimensions = [_Dimension.of(*each) for each in geometry]
    key: tuple[object, ...] = (call.weight_name, *dimensions)
    if key not in made:
        made[key] = _phases(held, dimensions)
    phases = g.add_constant(graph_module, f"{call.weight_name}_phases", made[key], node, [call.weight])
    bias = call.bias
    if bias is not None:
        shift = g.constant(graph_module, bias)
        count = made[key].shape[0] // shift.numel()
        key = (bias.target, count)
        if key not in made:
            made[key] = shift.repeat(count)
        bias = g.add_constant(graph_module, f"{bias.target}_phases", made[key], node, [bias])
    conv = call.replace(
        weight=phases,
        bias=bias,
        other=None,
        stride=[1] * len(dimensions),
        padding=[each.padding for each in dimensions],
        transposed=False,
        output_padding=[0] * len(dimensions),
        post_op=call.post_op if call.other is None else post_ops.NONE,
    ).insert(node)
    y = _cropped(graph, node, _depth_to_space(graph, node, conv, dimensions), dimensions)
    if call.other is not None:
        y = g.insert_call(graph, node, _aten.add.Tensor, (y, call.other))
        if call.post_op == post_ops.ADD_RELU:
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
    channels = g.fake_value(y).shape[-1]
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
