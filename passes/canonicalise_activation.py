"""Gives activation functions that are written out the one operation that does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult

_aten = torch.ops.aten
_ARITHMETIC = (
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.rsub.Scalar, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default),
    *(_aten.pow.Tensor_Scalar, _aten.square.default, _aten.reciprocal.default),
)
#: One of them is in each formula.
_CURVES = (
    *(_aten.tanh.default, _aten.erf.default, _aten.sigmoid.default, _aten.exp.default, _aten.clamp.default),
    *(_aten.relu6.default, _aten.hardtanh.default, _aten.hardsigmoid.default),
)
_ENDS = (_aten.mul.Tensor, _aten.div.Tensor)
#: No formula has more operations.
_MOST = 16
_FUNCTIONS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (_aten.gelu.default, {}),
    (_aten.gelu.default, {"approximate": "tanh"}),
    (_aten.silu.default, {}),
    (_aten.hardswish.default, {}),
)


@dataclass(frozen=True)
class CanonicaliseActivation:
    """0.5 * x * (1 + tanh(0.797885 * (x + 0.044715 * x ** 3))), x * sigmoid(x), … -> gelu(x), silu(x), hardswish(x).

    A formula is known by its values, so that it does not matter how it is written: on a thousand numbers in FP64 it
    gives what the operation gives, within a tenth of FP32's last bit, and NaN and infinity where that does. Refuses
    functions of more than one tensor, and tensors that are not in FP32.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten = []
        written, numbers = g.written_nodes(graph_module.graph), _numbers(graph_module)
        order = {node: at for at, node in enumerate(graph_module.graph.nodes)}
        for end in g.calls_to(graph_module.graph, *_ENDS):
            found = _match(end, numbers, order)
            if found is not None and found[0] not in written:
                x, (target, named) = found
                rewritten.append(end.name)
                g.replace_and_erase(end, g.insert_call(graph_module.graph, end, target, (x,), named))
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten))


def _numbers(graph_module: fx.GraphModule) -> dict[fx.Node, torch.Tensor]:
    """The constants that are one number for all values, in FP64."""
    written = g.written_constants(graph_module.graph)
    constants = {node: g.find_constant(graph_module, node) for node in graph_module.graph.find_nodes(op="get_attr")}
    return {
        node: value.detach().double()
        for node, value in constants.items()
        if value is not None and value.dim() == 0 and str(node.target) not in written
    }


def _match(
    end: fx.Node, numbers: Mapping[fx.Node, torch.Tensor], order: Mapping[fx.Node, int]
) -> tuple[fx.Node, tuple[Any, dict[str, Any]]] | None:
    """The input of a formula, and the operation that it is."""
    for x, formula in _formulas(end, numbers, order):
        if not any(node.target in _CURVES for node in formula):
            continue
        values = _values(x, formula, numbers)
        for function in _FUNCTIONS:
            if _agree(values, function[0](_samples(), **function[1])):
                return x, function
    return None


def _formulas(
    end: fx.Node, numbers: Mapping[fx.Node, torch.Tensor], order: Mapping[fx.Node, int]
) -> Iterator[tuple[fx.Node, Sequence[fx.Node]]]:
    """Every node of which alone `end` is a function, the nearest first; with the operations between, in order."""
    formula: list[fx.Node] = []
    reached = {end}
    while reached and len(formula) < _MOST:
        node = max(reached, key=lambda each: order.get(each, -1))
        if node.target not in (*_ARITHMETIC, *_CURVES) or not _is_alike(node, end):
            return
        reached.remove(node)
        formula.insert(0, node)
        reached |= {source for source in node.all_input_nodes if source not in numbers}
        if len(reached) == 1:
            (x,) = reached
            if _is_alike(x, end):
                yield x, formula


def _is_alike(node: fx.Node, end: fx.Node) -> bool:
    """Whether a node is in FP32 and of the same shape: a function of single values then."""
    return g.is_float32(node) and _shape(node) == _shape(end)


def _shape(node: fx.Node) -> Any:
    return g.symbolic_shape(g.fake_value(node).shape)


def _values(x: fx.Node, formula: Sequence[fx.Node], numbers: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """A formula of the samples."""
    known = {**numbers, x: _samples()}
    for node in formula:
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        known[node] = target(*fx.map_arg(node.args, known.__getitem__), **fx.map_arg(node.kwargs, known.__getitem__))
    return known[formula[-1]]


def _samples() -> torch.Tensor:
    rest = [0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, 1e4, -1e4, float("inf"), -float("inf"), float("nan")]
    return torch.cat([torch.linspace(-12, 12, 1001, dtype=torch.float64), torch.tensor(rest, dtype=torch.float64)])


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    # constants are often written with ten digits
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-8, atol=1e-9, equal_nan=True)
