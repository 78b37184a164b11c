"""Takes a convolution on volumes for the Linear or the convolution on images that it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LinearCall
from armopt.ir.operations import CONV
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten

_aten = torch.ops.aten
_END = 2**63 - 1
_TO_LAST, _TO_FIRST = [0, 2, 3, 4, 1], [0, 4, 1, 2, 3]
_IMAGE, _ROWS = [0, 3, 1, 2], [0, 2, 3, 1]
#: Channels from which those of a point are copied at once. Of fewer, as in a video, a row of a patch is, from `_LONG`
#: values on: 2.5 instructions a value for 16, 24 for 4, where a row of patches takes 8 (Graviton3).
_RUN, _LONG = 4, 8


@dataclass(frozen=True)
class ConvertVolumeConv:
    """conv(x [N, C, D, H, W], W [O, C, kt, kh, kw]) -> a Linear, or a convolution on images, between views.

    - Filters of one point, or of patches side by side, as video transformers have them
      -> linear(x [N, D', H', W', C * patch]).
    - Filters along time alone -> conv(x [N, C, D, H * W], W [O, C, kt, 1]).
    - All else -> conv(x [N * D', kt * C, H, W], W [O, kt * C, kh, kw]): the frames that a filter sees become channels.

    On aarch64 oneDNN has no BF16 for volumes. Stacking copies the input kt times, but the sum over time stays within
    one product, in FP32; a sum of kt convolutions would round each. The views copy nothing of activations that lie as
    channels_last_3d, as all these give them, and cancel between two layers. Refuses groups, and a transposed
    convolution that ConvertTransposedConv leaves.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        made = _Made()
        for node in g.calls_to(graph_module.graph, CONV):
            call = ConvCall.of(node)
            if len(call.stride) != 3:
                continue
            if call.groups != 1 or call.transposed:
                reason = (
                    "it is transposed" if call.groups == 1 else "it has groups: in BF16 oneDNN has a reference alone"
                )
                skipped.append(Skip(node.name, reason))
                continue
            rewritten.append(node.name)
            _Layer(graph_module, node, call, made).convert()
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


@dataclass(frozen=True)
class _Made:
    """What layers of a graph share: weights by name and form, views by what they are of and how."""

    weights: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    views: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """One convolution on volumes, and what is put in its place. A volume is [N, D, H, W, C]."""

    graph_module: fx.GraphModule
    node: fx.Node
    call: ConvCall[fx.Node]
    made: _Made

    def convert(self) -> None:
        """Puts the Linear or the convolution on images in its place."""
        weight = g.constant(self.graph_module, self.call.weight)
        filters, name = list(weight.shape[2:]), self.node.name
        volume = self._permuted(self.call.x, _TO_LAST)
        if max(filters) == 1 and not any(self.call.padding):
            layer, result = self._points(volume, weight)
        elif self._has_patches(filters):
            layer, result = self._patches(volume, weight)
        elif filters[1:] == list(self.call.stride[1:]) == [1, 1] and not any(self.call.padding[1:]):
            layer, result = self._columns(volume, weight)
        else:
            layer, result = self._frames(volume, weight)
        g.replace_and_erase(self.node, self._permuted(result, _TO_FIRST))
        layer.name = name

    def _has_patches(self, filters: Sequence[int]) -> bool:
        """Whether patches lie side by side, in a volume whose size is known."""
        plain = not any(self.call.padding) and max(self.call.dilation) == 1
        return plain and filters == list(self.call.stride) and all(map(g.is_fixed, g.fake_value(self.call.x).shape[2:]))

    def _points(self, volume: fx.Node, weight: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        for dim, step in enumerate(self.call.stride, 1):
            volume = self._sliced(volume, dim, 0, _END, step)
        return self._linear(volume, self._weight("points", weight.flatten(1)))

    def _patches(self, volume: fx.Node, weight: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        batch, *sizes, channels = g.fake_value(volume).shape
        split: list[int] = []
        for dim, (size, step) in enumerate(zip(map(int, sizes), self.call.stride, strict=True), 1):
            split += [size // step, step]
            volume = self._sliced(volume, dim, 0, size // step * step if size % step else _END)
        rows = int(batch) if g.is_fixed(batch) else -1
        patches = self._inserted(_aten.reshape.default, volume, [rows, *split, int(channels)])
        if channels >= _RUN:
            order, flat = [0, 1, 3, 5, 2, 4, 6, 7], weight.permute(0, 2, 3, 4, 1)
        elif weight.shape[-1] >= _LONG:
            order, flat = [0, 1, 3, 5, 7, 2, 4, 6], weight
        else:
            return self._planes(patches, weight)
        x = self._inserted(_aten.flatten.using_ints, self._inserted(_aten.permute.default, patches, order), 4)
        return self._linear(x, self._weight("rows", flat.flatten(1)))

    def _planes(self, patches: fx.Node, weight: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        """Each point of a patch is a channel, and channels come first: a whole row of patches is copied at once."""
        x = self._inserted(_aten.permute.default, patches, [0, 1, 7, 2, 4, 6, 3, 5])
        x = self._inserted(_aten.flatten.using_ints, x, 2, 5)
        rows = self._permuted(self._flattened(x, 0), _ROWS)
        flat = weight.flatten(1)[:, :, None, None]
        return self._conv(
            rows, self._weight("planes", flat), 0, x, **{name: [value] * 2 for name, value in _FLAT.items()}
        )

    def _linear(self, volume: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
        other = self.call.other
        linear = LinearCall(
            x=volume,
            weight=weight,
            bias=self.call.bias,
            other=None if other is None else self._permuted(other, _TO_LAST),
            post_op=self.call.post_op,
            kernel=aten.LINEAR.name,
        ).insert(self.node)
        return linear, linear

    def _columns(self, volume: fx.Node, weight: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        """Frames become columns: all points of a frame are one row of an image that has a row for each frame."""
        geometry = {name: [getattr(self.call, name)[0], rest] for name, rest in _FLAT.items()}
        x = self._flattened(volume, 2)
        return self._conv(x, self._weight("columns", weight.flatten(3)), 2, volume, **geometry)

    def _frames(self, volume: fx.Node, weight: torch.Tensor) -> tuple[fx.Node, fx.Node]:
        taps, step, pad, apart = weight.shape[2], self.call.stride[0], self.call.padding[0], self.call.dilation[0]
        if pad:
            volume = self._inserted(_aten.constant_pad_nd.default, volume, [0, 0, 0, 0, 0, 0, pad, pad])
        ends = [-(taps - 1 - tap) * apart or _END for tap in range(taps)]
        frames = [self._sliced(volume, 1, tap * apart, end, step) for tap, end in enumerate(ends)]
        stacked = frames[0] if taps == 1 else self._inserted(_aten.cat.default, frames, -1)
        flat = weight.transpose(1, 2).flatten(1, 2)
        geometry = {name: list(getattr(self.call, name))[1:] for name in _FLAT}
        return self._conv(self._flattened(stacked, 0), self._weight("frames", flat), 0, stacked, **geometry)

    def _conv(
        self, rows: fx.Node, weight: fx.Node, start: int, volume: fx.Node, **geometry: list[int]
    ) -> tuple[fx.Node, fx.Node]:
        """A convolution on images [N, H, W, C], of a volume whose dimensions from `start` on two by two are one."""
        other = self.call.other
        if other is not None:
            other = self._permuted(self._flattened(self._permuted(other, _TO_LAST), start), _IMAGE)
        conv = self.call.replace(
            x=self._permuted(rows, _IMAGE), weight=weight, other=other, output_padding=[0, 0], **geometry
        ).insert(self.node)
        return conv, self._split(self._permuted(conv, _ROWS), start, volume)

    # --- views, but for those that undo what is there ---------------------------------------------

    def _permuted(self, x: fx.Node, dims: list[int]) -> fx.Node:
        if x.target is _aten.permute.default:
            before: Any = x.args[1]
            if [before[dim] % len(dims) for dim in dims] == list(range(len(dims))):
                return x.args[0]  # type: ignore[return-value]
        return self._inserted(_aten.permute.default, x, dims)

    def _flattened(self, x: fx.Node, start: int) -> fx.Node:
        if x.target is _aten.unflatten.int and x.args[1] == start:
            return x.args[0]  # type: ignore[return-value]
        return self._inserted(_aten.flatten.using_ints, x, start, start + 1)

    def _split(self, rows: fx.Node, start: int, volume: fx.Node) -> fx.Node:
        """The opposite of :meth:`_flattened`, with the sizes that `volume` has there."""
        one, two = g.fake_value(volume).shape[start : start + 2]
        sizes: list[Any] = [int(one) if g.is_fixed(one) else -1, int(two) if g.is_fixed(two) else -1]
        if sizes == [-1, -1]:
            sizes[0] = self._inserted(_aten.sym_size.int, volume, start)
        return self._inserted(_aten.unflatten.int, rows, start, sizes)

    def _sliced(self, x: fx.Node, dim: int, start: int, end: int, step: int = 1) -> fx.Node:
        if (start, end, step) == (0, _END, 1):
            return x
        return self._inserted(_aten.slice.Tensor, x, dim, start, end, step)

    def _inserted(self, target: Any, x: Any, *args: Any) -> fx.Node:
        key = (target, *(x if isinstance(x, list) else [x]), str(args))
        if key not in self.made.views:
            self.made.views[key] = g.insert_call(self.graph_module.graph, self.node, target, (x, *args))
        return self.made.views[key]

    def _weight(self, form: str, value: torch.Tensor) -> fx.Node:
        name = self.call.weight_name
        held = self.made.weights.setdefault((name, form), value.contiguous())
        return g.add_constant(self.graph_module, f"{name}_{form}", held, self.node, [self.call.weight])


#: Geometry along the points of a frame that are one row.
_FLAT = {"stride": 1, "padding": 0, "dilation": 1}
