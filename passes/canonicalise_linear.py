"""Gives every product with a constant weight one form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import LinearCall
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten

_aten = torch.ops.aten
_FORMS = (_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default)


class _RefusedError(Exception):
    """A form that is no Linear; the message is the reason."""


@dataclass(frozen=True)
class CanonicaliseLinear:
    """linear(x, W, b), addmm(b, x, V), mm(x, V), matmul(x, V) -> armopt.linear(x, W, b) with W = V.T of shape [N, K].

    What addmm scales is scaled beforehand: W by alpha, b by beta. Refuses a weight or bias that is no constant, another
    dtype than FP32, and a bias that is not one value per output feature.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten, skipped = [], []
        transposed: dict[tuple[str, float], torch.Tensor] = {}
        for node in g.calls_to(graph_module.graph, *_FORMS):
            try:
                x, weight, bias, is_transposed = _operands(graph_module, node)
            except _RefusedError as refusal:
                skipped.append(Skip(node.name, str(refusal)))
                continue
            if is_transposed:
                name, alpha = str(weight.target), _scale(node, "alpha")
                if (name, alpha) not in transposed:
                    stored = getattr(graph_module, name).detach().t().contiguous()
                    transposed[name, alpha] = stored if alpha == 1 else stored * alpha
                weight = g.add_constant(graph_module, f"{name}_t", transposed[name, alpha], node, [weight])
            if bias is not None and (beta := _scale(node, "beta")) != 1:
                scaled = g.constant(graph_module, bias) * beta
                bias = g.add_constant(graph_module, f"{bias.target}_scaled", scaled, node, [bias]) if beta else None
            layer_name = re.sub(r"_?weight(_matrix|_t)?$", "", str(weight.target)) or node.name
            call = LinearCall(x=x, weight=weight, bias=bias, kernel=aten.LINEAR.name)
            rewritten.append(node.name)
            g.replace_and_erase(node, call.insert(node, layer_name))
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _operands(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool]:
    """Input, weight, bias, and whether the weight is [K, N]."""
    bias: Any = None
    x: Any
    weight: Any
    if node.target is _aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target is _aten.addmm.default:
        bias, x, weight = node.args
    else:
        x, weight = node.args
    tensor = g.find_constant(graph_module, weight)
    if tensor is None:
        raise _RefusedError("the weight is not a constant")
    if tensor.dim() != 2:
        raise _RefusedError(f"the weight has {tensor.dim()} dimensions")
    if not (g.is_float32(x) and tensor.dtype == torch.float32):
        raise _RefusedError(f"works on {_dtype(x)} and {tensor.dtype}, not FP32".replace("torch.", ""))
    if g.fake_value(x).dim() < 1 or min(tensor.shape) == 0:
        raise _RefusedError("an empty or scalar operand")
    if bias is not None:
        features = tensor.shape[0] if node.target is _aten.linear.default else tensor.shape[1]
        _check_bias(g.find_constant(graph_module, bias), features)
    return x, weight, bias, node.target is not _aten.linear.default


def _scale(node: fx.Node, name: str) -> float:
    """By what addmm scales its product (alpha) or its bias (beta)."""
    value: Any = node.kwargs.get(name, 1)
    return float(value)


def _check_bias(values: torch.Tensor | None, features: int) -> None:
    if values is None:
        raise _RefusedError("the bias is not a constant")
    if values.shape != (features,) or values.dtype != torch.float32:
        raise _RefusedError(f"the bias has shape {tuple(values.shape)}, not one FP32 value per output feature")


def _dtype(node: Any) -> str:
    return str(g.fake_value(node).dtype) if isinstance(node, fx.Node) else type(node).__name__
