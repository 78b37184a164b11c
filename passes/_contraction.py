"""Reads contractions, however they are written, as sums of products in Einstein's notation."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Contraction:
    """A sum of products in Einstein's notation: a letter for each dimension of the operands and of the result."""

    operands: tuple[fx.Node, ...]
    terms: tuple[str, ...]
    result: str
    bias: fx.Node | None = None


def _einsum(node: fx.Node) -> Contraction:
    text: Any = node.args[0]
    operands: Any = tuple(node.args[1])  # type: ignore[arg-type]
    left, arrow, result = text.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in text]
    hidden = [g.fake_value(x).dim() - len(t.replace("...", "")) for x, t in zip(operands, terms, strict=True)]
    spread = "".join(free[: max((n for n, t in zip(hidden, terms, strict=True) if "..." in t), default=0)])
    terms = [t.replace("...", spread[len(spread) - n :]) for n, t in zip(hidden, terms, strict=True)]
    if not arrow:
        letters = sorted("".join(left.replace("...", "").split(",")))
        result = "..." + "".join(letter for letter in letters if letters.count(letter) == 1)
    return Contraction(operands, tuple(terms), result.replace("...", spread))


def _tensordot(node: fx.Node) -> Contraction:
    x, other, x_dims, other_dims = _nodes(node)
    letters = _letters(x)
    taken = iter(string.ascii_letters[len(letters) :])
    pairs = {dim % g.fake_value(other).dim(): letters[i] for i, dim in zip(x_dims, other_dims, strict=True)}
    term = "".join(pairs[dim] if dim in pairs else next(taken) for dim in range(g.fake_value(other).dim()))
    summed = set(pairs.values())
    return Contraction((x, other), (letters, term), "".join(c for c in letters + term if c not in summed))


def _inner(node: fx.Node) -> Contraction | None:
    x, other = _nodes(node)
    if min(g.fake_value(x).dim(), g.fake_value(other).dim()) == 0:
        return None
    one, two = _letters(x), _letters(other, after=_letters(x))[:-1]
    return Contraction((x, other), (one, two + one[-1]), one[:-1] + two)


def _product(node: fx.Node) -> Contraction | None:
    """matmul, mm and mv but for x @ V, which CanonicaliseLinear takes."""
    x, other = _nodes(node)
    if other.op == "get_attr" and g.fake_value(other).dim() == 2:
        return None
    rows, columns = g.fake_value(x).dim(), g.fake_value(other).dim()
    spread = string.ascii_lowercase[: max(rows, columns, 2) - 2]
    one = spread[len(spread) - (rows - 2) :] + "XY" if rows > 1 else "Y"
    two = spread[len(spread) - (columns - 2) :] + "YZ" if columns > 1 else "Y"
    return Contraction((x, other), (one, two), spread + "X" * (rows > 1) + "Z" * (columns > 1))


def _batched(node: fx.Node) -> Contraction:
    x, other = _nodes(node)
    return Contraction((x, other), ("BXY", "BYZ"), "BXZ")


def _batched_sum(node: fx.Node) -> Contraction | None:
    """baddbmm; what is scaled stays."""
    bias, x, other = _nodes(node)
    return None if node.kwargs else Contraction((x, other), ("BXY", "BYZ"), "BXZ", bias)


def _bilinear(node: fx.Node) -> Contraction:
    x, other, weight, bias = (*_nodes(node), None)[:4]
    spread = _letters(x)[:-1]
    return Contraction((x, weight, other), (spread + "X", "OXY", spread + "Y"), spread + "O", bias)


#: By operation; None where CanonicaliseLinear takes it, or where something is scaled.
READERS: Mapping[Any, Callable[[fx.Node], Contraction | None]] = {
    _aten.einsum.default: _einsum,
    _aten.tensordot.default: _tensordot,
    _aten.inner.default: _inner,
    _aten.matmul.default: _product,
    _aten.mm.default: _product,
    _aten.mv.default: _product,
    _aten.bmm.default: _batched,
    _aten.baddbmm.default: _batched_sum,
    _aten.bilinear.default: _bilinear,
}


def _nodes(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def _letters(node: fx.Node, after: str = "") -> str:
    return string.ascii_letters[len(after) : len(after) + g.fake_value(node).dim()]
