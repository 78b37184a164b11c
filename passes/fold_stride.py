"""Turns the strided convolution on an image into one without a stride on more channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall
from armopt.ir.operations import CONV
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten
#: The Compute Library takes input channels in fours: with fewer the rest of each four is zeros.
_FOUR = 4
#: Channels from which it does not pay: 9, as of three frames that are stacked, gain; 15 lose.
_MANY = 12


@dataclass(frozen=True)
class FoldStride:
    """conv(x [N, C, H, W], W, stride s) -> conv(x' [N, C * s * s, H / s, W / s], W'), for few channels.

    Space to depth: each s x s patch of pixels becomes the channels of one. Fewer filter taps have to be gathered, and
    no channel is padding; a patch embedding becomes a Linear. Done where it pays on the emulated Graviton3: filters of
    five and more with a stride of two (30.5 -> 19 M instructions for 7 x 7 on 224 x 224) and patches of eight and more
    (20 -> 7 M for 16 x 16). Refuses groups, a dilation, transposed convolutions, and images whose size is dynamic.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten, skipped = [], []
        for node in g.calls_to(graph_module.graph, CONV):
            call = ConvCall.of(node)
            weight = g.constant(graph_module, call.weight)
            if not _pays(call, weight):
                continue
            reason = _refusal(call)
            if reason is not None:
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _fold(graph_module, node, call, weight)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _pays(call: ConvCall[fx.Node], weight: torch.Tensor) -> bool:
    """Whether it is the convolution of an image that this is for."""
    channels = weight.shape[1]
    if weight.dim() != 4 or channels >= _MANY or channels % _FOUR == 0:
        return False
    stride, filters = list(call.stride), list(weight.shape[2:])
    patches = filters == stride and max(call.padding) == 0 and min(stride) >= 8
    return (patches and channels < _FOUR) or (stride == [2, 2] and min(filters) >= 5)


def _refusal(call: ConvCall[fx.Node]) -> str | None:
    height, width = g.fake_value(call.x).shape[2:]
    if call.transposed or call.groups != 1:
        return "a transposed or grouped convolution"
    if len(set(call.stride)) > 1 or max(call.dilation) > 1:
        return "unequal strides or a dilation"
    if not (g.is_fixed(height) and g.is_fixed(width)):
        return "the size of the image is dynamic"
    return None


def _fold(graph_module: fx.GraphModule, node: fx.Node, call: ConvCall[fx.Node], weight: torch.Tensor) -> None:
    graph = graph_module.graph
    x, step, before = call.x, call.stride[0], call.padding
    outputs, channels, *filters = weight.shape
    taps = [-(-size // step) for size in filters]
    blocks = [int(size) - 1 + tap for size, tap in zip(g.fake_value(node).shape[2:], taps, strict=True)]
    sizes = zip(blocks, g.fake_value(x).shape[2:], before, strict=True)
    after = [block * step - int(size) - pad for block, size, pad in sizes]
    if any(before) or any(after):
        x = g.insert_call(graph, node, _aten.constant_pad_nd.default, (x, [before[1], after[1], before[0], after[0]]))
    batch = g.fake_value(x).shape[0]
    rows = batch if isinstance(batch, int) else -1
    x = g.insert_call(graph, node, _aten.reshape.default, (x, [rows, channels, blocks[0], step, blocks[1], step]))
    depth = channels * step * step
    order: tuple[int, ...]  # of what becomes channels
    if step == 2:
        order = (5, 3, 1)
        x = _stacked(graph, node, x, order)
    else:  # runs of `step` values are copied at once
        order = (1, 3, 5)
        x = g.insert_call(graph, node, _aten.permute.default, (x, [0, 2, 4, *order]))
        x = g.insert_call(graph, node, _aten.reshape.default, (x, [rows, *blocks, depth]))
    x = g.insert_call(graph, node, _aten.permute.default, (x, [0, 3, 1, 2]))
    extra = [tap * step - size for tap, size in zip(taps, filters, strict=True)]
    folded = torch.nn.functional.pad(weight, (0, extra[1], 0, extra[0]))
    folded = folded.reshape(outputs, channels, taps[0], step, taps[1], step).permute(0, *order, 2, 4)
    folded = folded.reshape(outputs, depth, *taps).contiguous()
    constant = g.add_constant(graph_module, f"{call.weight_name}_folded", folded, node, [call.weight])
    replacement = call.replace(x=x, weight=constant, stride=[1, 1], padding=[0, 0])
    g.replace_and_erase(node, replacement.insert(node, f"{node.name}_folded"))


def _stacked(graph: fx.Graph, node: fx.Node, x: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """[N, C, H, 2, W, 2] -> [N, H, W, 2 * 2 * C]: one copy for each channel, in long runs; ATen's own takes ten times
    the instructions."""
    parts = [x]
    for dim in order:
        lists = [g.insert_call(graph, node, _aten.unbind.int, (part, dim)) for part in parts]
        parts = [
            g.insert_call(graph, node, operator.getitem, (whole, i))
            for whole in lists
            for i in range(len(whole.meta["val"]))
        ]
    return g.insert_call(graph, node, _aten.stack.default, (parts, -1))
