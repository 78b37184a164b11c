"""Finds all that multiplies in a prepared graph, layers and all else, so that nothing can stay in FP32 unsaid.

What an operation multiplies is counted by running it on tensors without data: it comes apart into the few products that
PyTorch's own counter of flops knows. What does not come apart and reads a weight is listed without a count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, call_of, is_layer
from armopt.ir.operations import RECURRENCE
from armopt.ir.records import Bucket, Product, Skip

_aten = torch.ops.aten
#: Constants by name.
_Names = frozenset[str]

#: Products that PyTorch's counter does not know -> multiplications, from the arguments.
_FORMULAS: Mapping[Any, Callable[..., int]] = {
    _aten.mv: lambda a, x: a.numel(),
    _aten.addmv: lambda y, a, x, **_: a.numel(),
    _aten.dot: lambda a, b: a.numel(),
    _aten.vdot: lambda a, b: a.numel(),
    _aten.addbmm: lambda y, a, b, **_: a.numel() * b.shape[-1],
    _aten.addr: lambda y, a, b, **_: a.numel() * b.numel(),
    _aten._trilinear: lambda a, b, c, ea, eb, ec, *_: math.prod(
        map(max, zip(_unsqueezed(a.shape, ea), _unsqueezed(b.shape, eb), _unsqueezed(c.shape, ec), strict=True))
    ),
    _aten._grouped_mm: lambda a, b, *_, **__: a.numel() * b.shape[-1],
    RECURRENCE.overloadpacket: lambda gates, weight, *_: math.prod(gates.shape[:-1]) * weight.numel(),
    **dict.fromkeys((_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu), lambda x, *rest: _recurrent(x, rest)),
}
#: Products whose first argument is only added.
_ADDING = (_aten.addmm, _aten.baddbmm, _aten.addmv, _aten.addbmm, _aten.addr)
#: Select from a constant what data asks for: of several matrices some, which are weights still.
_SELECTING = (_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.embedding.default)
#: Read tables and multiply nothing, though nothing in PyTorch says so.
_HARMLESS = (_aten._embedding_bag, _aten._embedding_bag_forward_only, _aten.copy_, _aten.embedding_renorm_)
_HARMLESS_TAGS = (torch.Tag.pointwise, torch.Tag.core)
_RECURRENT = (_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu)


def _unsqueezed(shape: torch.Size, dims: Iterable[int]) -> list[int]:
    sizes = list(shape)
    for dimension in dims:
        sizes.insert(dimension, 1)
    return sizes


def _recurrent(x: torch.Tensor, rest: tuple[Any, ...]) -> int:
    """Every row of the input meets every matrix once."""
    matrices = sum(t.numel() for t in tree_leaves(rest) if isinstance(t, torch.Tensor) and t.dim() == 2)
    packed = isinstance(rest[0], torch.Tensor) and rest[0].dim() == 1  # as a PackedSequence: [rows, features]
    return matrices * (x.shape[0] if packed else math.prod(x.shape[:-1]))


def find(graph_module: fx.GraphModule, bucket: Bucket, skipped: Iterable[Skip] = ()) -> tuple[Product, ...]:
    """All nodes that multiply, at one bucket.

    Args:
        graph_module: Prepared: layers are armopt's operations.
        bucket: The sizes, by the graph's own symbols.
        skipped: What passes left alone, and why.
    """
    bucket = g.with_rows_of_parts(graph_module.graph, bucket)
    reasons: dict[str, str] = {}
    for skip in skipped:  # the first pass that left it alone knows most of it
        reasons.setdefault(skip.node, skip.reason)
    held: dict[fx.Node, _Names] = {}
    found: list[Product] = []
    for node in graph_module.graph.nodes:
        names = _constants_of(node, held)
        if names is not None:
            held[node] = names
        if node.op == "call_function" and (product := _product(graph_module, node, held, bucket, reasons)):
            found.append(product)
    return tuple(found)


def _constants_of(node: fx.Node, held: Mapping[fx.Node, _Names]) -> _Names | None:
    """The constants that a value is made of; None where it also depends on an input."""
    if node.op == "get_attr":
        return frozenset((str(node.target),))
    sources = node.all_input_nodes
    if node.target in _SELECTING and isinstance(node.args[0], fx.Node) and node.args[0] in held:
        return held[node.args[0]] if g.fake_value(node.args[0]).dim() > 2 else None
    if node.op != "call_function" or not all(source in held for source in sources):
        return None
    return frozenset().union(*(held[source] for source in sources))


def _product(
    graph_module: fx.GraphModule,
    node: fx.Node,
    held: Mapping[fx.Node, _Names],
    bucket: Bucket,
    reasons: Mapping[str, str],
) -> Product | None:
    """What one node multiplies; None where it does not, as far as can be known."""

    def size(names: _Names) -> int:
        tensors = [getattr(graph_module, name) for name in names]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    if is_layer(node):
        call = call_of(node)
        return Product(node.name, call.op.value, _of_layer(node, bucket), size(frozenset((call.weight_name,))), "")
    if not isinstance(node.target, torch._ops.OpOverload) or _is_harmless(node.target):
        return None
    counted = _count(node, held, bucket)
    if not counted.multiplications and not counted.unknown:
        return None
    name = str(node.target._schema.name).replace("::", ".")
    return Product(node.name, name, counted.multiplications, size(counted.weights), _reason(node, held, reasons))


def _reason(node: fx.Node, held: Mapping[fx.Node, _Names], reasons: Mapping[str, str]) -> str:
    """Why a product is no layer."""
    if node.name in reasons:
        return reasons[node.name]
    if node in held:
        return "depends on constants alone, and is not folded"
    if getattr(node.target, "overloadpacket", None) in _RECURRENT:
        return "recurrent: each step needs the one before, so PyTorch's own kernel runs it whole"
    if node.target is RECURRENCE:
        return "recurrent: each step needs the one before, and multiplies as few rows as the batch has: BLAS takes them"
    return "armopt has no kernel for this operation"


def _of_layer(node: fx.Node, bucket: Bucket) -> int:
    """Multiplications of a Linear or a convolution."""
    call = call_of(node)
    weight = math.prod(g.fake_value(call.weight).shape)
    if not isinstance(call, ConvCall):
        return math.prod(g.shape_at(g.fake_value(call.x).shape[:-1], bucket)) * weight
    places = g.shape_at(g.fake_value(call.x if call.transposed else node).shape, bucket)
    return places[0] * math.prod(places[2:]) * weight


@dataclass(slots=True)
class _Counted:
    """What was seen of one node.

    Attributes:
        multiplications: Of all products in it.
        weights: The constants among their factors.
        unknown: Whether something in it reads a weight and can't be counted.
    """

    multiplications: int = 0
    weights: _Names = frozenset()
    unknown: bool = False


def _count(node: fx.Node, held: Mapping[fx.Node, _Names], bucket: Bucket) -> _Counted:
    """Runs a node on tensors without data."""
    counter = _Counter()

    def value(source: fx.Node) -> Any:
        tensors = _concrete(source.meta.get("val"), bucket)
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                counter.mark(tensor, held.get(source))
        return tensors

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    target: Any = node.target
    try:
        with torch.no_grad(), counter:
            target(*args, **{name: each for name, each in kwargs.items() if name != "device"})
    except Exception:  # whatever it is: it can't be run without data
        counter.note_unknown((args, kwargs))
    return counter.counted


def _concrete(value: Any, bucket: Bucket) -> Any:
    """A value of a node at a bucket: tensors without data, and numbers."""
    if isinstance(value, (tuple, list)):
        return type(value)(_concrete(each, bucket) for each in value)
    if isinstance(value, torch.Tensor):
        return torch.empty(g.shape_at(value.shape, bucket), dtype=value.dtype, device="meta")
    return g.size_at(value, bucket) if isinstance(value, torch.SymInt) else value


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes operations apart and counts the products, following which tensors are made of constants alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = _Counted()
        self._made_of: dict[int, _Names] = {}
        self._alive: list[torch.Tensor] = []  # an id is a name for as long as its object lives

    def mark(self, tensor: torch.Tensor, names: _Names | None) -> None:
        """Notes the constants that a tensor is made of."""
        if names is not None:
            self._made_of[id(tensor)] = names
            self._alive.append(tensor)

    def note_unknown(self, arguments: Any) -> None:
        """Notes an operation that can't be counted, if it reads a matrix that is a weight."""
        matrices = [t for t in _tensors(arguments) if t.dim() > 1 and t.is_floating_point()]
        if names := self._names(matrices):
            self.counted.unknown = True
            self.counted.weights |= names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in _FORMULAS and packet not in flop_registry and not _is_harmless(func):
            parts = self._taken_apart(func, args, kwargs)
            if parts is not NotImplemented:
                return parts
            self.note_unknown((args, kwargs))
        result = func(*args, **kwargs)
        if packet in _FORMULAS or packet in flop_registry:
            self._add(packet, args, kwargs, result)
        inputs = _tensors((args, kwargs))
        if inputs and all(id(tensor) in self._made_of for tensor in inputs):
            for tensor in _tensors(result):
                self.mark(tensor, self._names(inputs))
        return result

    def _taken_apart(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation by way of others; NotImplemented where it has none."""
        with self:
            result = func.decompose(*args, **kwargs)
            if result is NotImplemented and func in _decompositions():
                result = _decompositions()[func](*args, **kwargs)
        return result

    def _add(self, packet: Any, args: Any, kwargs: Any, result: Any) -> None:
        if packet in _FORMULAS:
            self.counted.multiplications += int(_FORMULAS[packet](*args, **kwargs))
        else:
            self.counted.multiplications += int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
        factors = args[1:3] if packet in _ADDING else args[:2] if packet is _aten.convolution else args
        matrices = [tensor for tensor in _tensors(factors) if tensor.dim() > 0]
        self.counted.weights |= self._names(matrices)

    def _names(self, tensors: Iterable[torch.Tensor]) -> _Names:
        return frozenset().union(*(self._made_of.get(id(tensor), frozenset()) for tensor in tensors))


def _is_harmless(func: torch._ops.OpOverload) -> bool:
    """Whether an operation multiplies no matrices."""
    packet = func.overloadpacket
    if packet in _FORMULAS or packet in flop_registry:
        return False
    return func.is_view or packet in _HARMLESS or any(tag in func.tags for tag in _HARMLESS_TAGS)


@functools.cache
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    return torch._decomp.core_aten_decompositions()


def _tensors(arguments: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
