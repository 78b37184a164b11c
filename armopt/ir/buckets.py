"""Sizes at which plans are made, and the one that a real size belongs to."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from armopt.ir.records import Bucket

_Planned = TypeVar("_Planned")
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """A size that follows from others, as ``2*batch + 1``; None where it holds anything else."""
    try:
        return _value(_parsed(expression).body, sizes)
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


@functools.cache
def _parsed(expression: str) -> ast.Expression:
    return ast.parse(expression, mode="eval")


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, sizes)
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    raise ValueError(f"no arithmetic on sizes: {ast.dump(node)}")


def distance(bucket: Bucket, values: Mapping[str, int]) -> float:
    """How far sizes are from a bucket: the sum of the logarithms of their ratios."""
    return sum(abs(math.log(max(1, values[name]) / max(1, size))) for name, size in bucket.items() if name in values)


def nearest(planned: Iterable[tuple[Bucket, _Planned]], values: Mapping[str, int]) -> _Planned:
    """What was planned for the bucket nearest to these sizes, by ratio."""
    return min(planned, key=lambda entry: distance(entry[0], values))[1]


def round_up(sizes: Sequence[int]) -> tuple[int, ...]:
    """The bucket of sizes: each up to a power of two."""
    return tuple(1 << max(0, size - 1).bit_length() for size in sizes)
