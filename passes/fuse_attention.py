"""Gives written-out attention to the one operation that has it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)


@dataclass(frozen=True)
class FuseAttention:
    """softmax(s q @ k^T + mask, -1) @ v -> scaled_dot_product_attention(q, k, v, mask, scale=s).

    The scores never lie in memory, and all of it can work in BF16. A mask may be several, added one after another, also
    where the scores have an extra dimension meanwhile, as windows of an image have. A row of the mask that hides every
    key becomes NaN, which is the softmax of such a row and would be 0 otherwise; not where constant masks have none.
    A constant mask that hides nothing and adds nothing is left out.
    Refuses products of other than four dimensions, scores or probabilities that are used elsewhere, and whatever else
    stands between product and softmax.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for softmax in g.calls_to(graph_module.graph, *_SOFTMAX):
            product = _reader(softmax)
            if product is None:
                continue
            found = _match(softmax, product)
            if isinstance(found, str):
                skipped.append(Skip(softmax.name, found))
                continue
            rewritten.append(product.name)
            _rewrite(graph_module, product, found)
        rewritten += _drop_masks(graph_module)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


@dataclass(frozen=True, slots=True)
class _Mask:
    """What is added to the scores, and what makes four dimensions of it.

    Attributes:
        node: The mask.
        expanded: Sizes to expand it to, as aten.expand has them; empty where it is as it should be.
        joined: Sizes to reshape it to then; empty where it has the right ones.
    """

    node: fx.Node
    expanded: tuple[Any, ...] = ()
    joined: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class _Attention:
    """What stands in front of a softmax."""

    query: fx.Node
    key: fx.Node
    scale: float
    masks: tuple[_Mask, ...]


def _reader(softmax: fx.Node) -> fx.Node | None:
    """The product that takes a softmax's result as its left side."""
    return next((u for u in softmax.users if u.target is _aten.matmul.default and u.args[0] is softmax), None)


def _match(softmax: fx.Node, product: fx.Node) -> _Attention | str:
    """The attention that a softmax and the product behind it are; or why they are none."""
    value: Any = product.args[1]
    if g.fake_value(softmax).dim() != 4 or g.fake_value(value).dim() != 4:
        return "not of four dimensions"
    if softmax.args[1] not in (-1, 3) or len(softmax.users) > 1:
        return "its probabilities are not along the keys, or used elsewhere"
    found = _scores(softmax.args[0])
    if isinstance(found, str):
        return found
    node, scale, masks = found
    query, key = node.args
    if len(node.users) > 1 or g.fake_value(node).dim() != 4:
        return "its product has other dimensions, or is used elsewhere"
    leading = g.symbolic_shape(g.fake_value(query).shape[:2])
    if not all(g.is_float32(x) and g.symbolic_shape(g.fake_value(x).shape[:2]) == leading for x in (query, key, value)):
        return "query, key and value are not FP32, or of other images or heads"
    if query.target is _aten.mul.Tensor and isinstance(query.args[1], (int, float)) and len(query.users) == 1:
        query, scale = query.args[0], scale * query.args[1]
    return _Attention(query, key, float(scale), tuple(masks))


def _scores(node: Any) -> tuple[Any, float, list[_Mask]] | str:
    """The product of activations that scores are made of, its scale, and what is added to it; or why there is none."""
    scale, masks = 1.0, []
    while node.target is not _aten.matmul.default:
        if len(node.users) > 1:
            return f"{node.name} is used elsewhere"
        operands = list(node.args[:2])
        if node.target is _aten.add.Tensor and node.kwargs.get("alpha", 1) == 1 and scale == 1:
            operands.sort(key=lambda operand: _product(operand) is None)
            mask = _as_mask(operands[1], operands[0]) if _product(operands[0]) and g.is_float32(operands[1]) else None
            if mask is None:
                return f"{node.name} adds no mask in FP32 of known sizes to scores"
            masks.append(mask)
        elif node.target in (_aten.mul.Tensor, _aten.div.Tensor) and isinstance(operands[1], (int, float)):
            scale *= operands[1] if node.target is _aten.mul.Tensor else 1 / operands[1]
        elif node.target is not _aten.reshape.default or not _keeps_scores(operands[0], node):
            return f"{node.target} stands between the product and the softmax"
        node = operands[0]
    return node, scale, masks


def _product(node: Any) -> fx.Node | None:
    """The product of activations that scores are made of in a way that the pass looks through."""
    through = (_aten.add.Tensor, _aten.reshape.default, _aten.mul.Tensor, _aten.div.Tensor)
    if not isinstance(node, fx.Node) or node.target is _aten.matmul.default:
        return node if isinstance(node, fx.Node) else None
    operands = node.args[:2] if node.target in through else ()
    return next((found for operand in operands if (found := _product(operand))), None)


def _keeps_scores(before: Any, after: fx.Node) -> bool:
    """Whether a reshape leaves heads, rows and keys, and only parts or joins what is in front of them."""
    shapes = g.symbolic_shape(g.fake_value(before).shape), g.symbolic_shape(g.fake_value(after).shape)
    return all(len(shape) >= 4 for shape in shapes) and shapes[0][-3:] == shapes[1][-3:]


def _as_mask(mask: fx.Node, scores: fx.Node) -> _Mask | None:
    """A mask that is full along rows and keys, and along what the scores have in front of their heads where that
    becomes one dimension later; None where a size is not known."""
    sizes, rank = _sizes(scores), g.fake_value(scores).dim()
    missing = rank - g.fake_value(mask).dim()
    shape = [1] * missing + list(g.fake_value(mask).shape)
    filled = [*range(rank - 3 if rank > 4 else 0), rank - 2, rank - 1]
    wanted: list[Any] = [1] * missing + [-1] * (rank - missing)
    for i in filled:
        if g.is_fixed(shape[i]) and shape[i] == 1 and not (isinstance(sizes[i], int) and sizes[i] == 1):
            wanted[i] = sizes[i]
    expanded = tuple(wanted) if missing or any(size != -1 for size in wanted) else ()
    joined = (-1, shape[rank - 3], *sizes[-2:]) if rank > 4 else ()
    known = all(isinstance(size, (int, fx.Node)) for size in (*expanded, *joined))
    return _Mask(mask, expanded, joined) if known else None


def _sizes(scores: fx.Node) -> list[Any]:
    """The sizes of scores, numbers where they are; else nodes, where a reshape has them so."""
    sizes: list[Any] = list(g.fake_value(scores).shape)
    node: Any = scores
    while node.target in (_aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor):
        node = next(operand for operand in node.args[:2] if _product(operand))
    given = node.args[1] if node.target is _aten.reshape.default else [None] * len(sizes)
    return [
        int(size) if g.is_fixed(size) else said if isinstance(said, fx.Node) else size
        for size, said in zip(sizes, given, strict=True)
    ]


def _rewrite(graph_module: fx.GraphModule, product: fx.Node, found: _Attention) -> None:
    graph = graph_module.graph

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return g.insert_call(graph, product, target, args, kwargs)

    key: Any = found.key
    swapped = key.target is _aten.transpose.int and set(key.args[1:]) in ({-2, -1}, {2, 3})
    key = key.args[0] if swapped else call(_aten.transpose.int, key, -2, -1)
    total = None
    for each in found.masks:
        mask = call(_aten.expand.default, each.node, list(each.expanded)) if each.expanded else each.node
        mask = call(_aten.reshape.default, mask, list(each.joined)) if each.joined else mask
        total = mask if total is None else call(_aten.add.Tensor, total, mask)
    if total is not None and _may_hide_a_row(graph_module, found.masks):
        # 0, and NaN where the largest value of a row is infinite
        top = call(_aten.amax.default, total, [-1], True)
        total = call(_aten.add.Tensor, total, call(_aten.sub.Tensor, top, top))
    arguments = (found.query, key, product.args[1], total, 0.0, False)
    g.replace_and_erase(product, call(_ATTENTION, *arguments, scale=found.scale))


def _may_hide_a_row(graph_module: fx.GraphModule, masks: tuple[_Mask, ...]) -> bool:
    """Whether the sum of some masks may be minus infinity along a whole row."""
    values = [g.find_constant(graph_module, mask.node) for mask in masks]
    if len(values) == 1 and values[0] is not None and values[0].numel():
        return not bool(values[0].amax(-1).isfinite().all())
    return not all(value is not None and bool(value.isfinite().all()) for value in values)


def _drop_masks(graph_module: fx.GraphModule) -> list[str]:
    """Takes constant masks that change no score from attention; returns the names of the nodes."""
    dropped = []
    for node in g.calls_to(graph_module.graph, _ATTENTION):
        place: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        mask = g.find_constant(graph_module, place)
        if mask is None or not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all()):
            continue
        if len(node.args) > 3:
            node.update_arg(3, None)
        else:
            node.update_kwarg("attn_mask", None)
        dropped.append(node.name)
    return dropped
