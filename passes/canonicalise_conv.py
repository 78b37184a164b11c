"""Gives every convolution with a constant weight one form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten

_aten = torch.ops.aten
_FORWARD = {_aten.conv1d.default: 1, _aten.conv2d.default: 2, _aten.conv3d.default: 3}
_STRING_PADDING = {_aten.conv1d.padding: 1, _aten.conv2d.padding: 2, _aten.conv3d.padding: 3}
_TRANSPOSED = {
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
}
_GENERAL = _aten.convolution.default


class _RefusedError(Exception):
    """The message is the reason."""


@dataclass(frozen=True)
class CanonicaliseConv:
    """conv1d, conv2d, conv3d, conv_transpose*d and convolution -> armopt.conv.

    Refuses a weight or bias that is no constant, another dtype than FP32, an input without a batch dimension, and
    padding that differs between the two sides or depends on the input.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten, skipped = [], []
        for node in g.calls_to(graph_module.graph, *_FORWARD, *_STRING_PADDING, *_TRANSPOSED, _GENERAL):
            try:
                call = _call(graph_module, node)
            except _RefusedError as refusal:
                skipped.append(Skip(node.name, str(refusal)))
                continue
            layer_name = re.sub(r"_?weight(_t)?$", "", call.weight_name) or node.name
            rewritten.append(node.name)
            g.replace_and_erase(node, call.insert(node, layer_name))
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _call(graph_module: fx.GraphModule, node: fx.Node) -> ConvCall[fx.Node]:
    arguments: Any = node.normalized_arguments(graph_module, normalize_to_only_use_kwargs=True)
    if arguments is None:
        raise _RefusedError("its arguments don't fit the schema")
    given = arguments.kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    tensor = g.find_constant(graph_module, weight)
    if tensor is None:
        raise _RefusedError("the weight is not a constant")
    if bias is not None and g.find_constant(graph_module, bias) is None:
        raise _RefusedError("the bias is not a constant")
    if not (g.is_float32(x) and tensor.dtype == torch.float32):
        raise _RefusedError(f"works on {g.fake_value(x).dtype} and {tensor.dtype}, not FP32".replace("torch.", ""))
    spatial = tensor.dim() - 2
    if g.fake_value(x).dim() != spatial + 2:
        raise _RefusedError("the input has no batch dimension")
    stride, dilation = _spread(given["stride"], spatial), _spread(given["dilation"], spatial)
    if node.target in _STRING_PADDING:
        padding = _same_padding(given["padding"], tensor.shape[2:], dilation)
    else:
        padding = _spread(given["padding"], spatial)
        if any(isinstance(size, fx.Node) for size in padding):
            raise _RefusedError("its padding depends on the input")
    return ConvCall(
        x=x,
        weight=weight,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=node.target in _TRANSPOSED or bool(given.get("transposed", False)),
        output_padding=_spread(given.get("output_padding") or [0], spatial),
        groups=given["groups"],
        kernel=aten.CONV.name,
    )


def _spread(values: Any, spatial: int) -> list[int]:
    """One value for each spatial dimension: in ATen a list of one value holds for all of them."""
    listed = [values] if isinstance(values, int) else list(values)
    return listed * spatial if len(listed) == 1 else listed


def _same_padding(padding: str, kernel: torch.Size, dilation: list[int]) -> list[int]:
    if padding == "valid":
        return [0] * len(dilation)
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        raise _RefusedError("padding='same' with an even kernel pads one side more")
    return [total // 2 for total in totals]
