"""Takes contractions with a constant, however they are written, for the Linear that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.records import PassResult, Skip
from armopt.passes._contraction import READERS, Contraction

_aten = torch.ops.aten


#: Matrices by the constant that they hold and by how it is read.
_Made = dict[tuple[object, ...], torch.Tensor]


class _RefusedError(Exception):
    """What is no Linear; the message is the reason."""


@dataclass(frozen=True)
class CanonicaliseContraction:
    """einsum, tensordot, inner, bilinear, mv(W, x), mm(W, x), matmul(W, x) -> linear(x', W') between permutations.

    x' has what is summed last, and W' is [what W alone has, what is summed]. Of three and more operands, as a bilinear
    layer has them, those in front of the constant and those behind it are contracted by an einsum of their own, in
    their order. What has another matrix for each of a batch (bmm, baddbmm) becomes a stack of Linears. Refuses what has
    no constant or several, another dtype than FP32, a diagonal, a constant that is a vector, and a batch of matrices
    that are so small, or so many, that their calls would cost more than they save.

    Attributes:
        least: Values of a matrix of a batch. From 512 x 512 a packed call takes 0.4 of the instructions of its share of
            bmm; at 256 x 512 1.1 to 1.4 times as many (4 to 128 rows, Graviton3, torch 2.13).
        most: Matrices of a batch.
    """

    least: int = 512 * 512
    most: int = 256

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        made: _Made = {}
        for node in g.calls_to(graph_module.graph, *READERS):
            try:
                contraction = READERS[node.target](node)
                if contraction is None:
                    continue
                _check(graph_module, contraction)
                result = _rewritten(graph_module, node, contraction, self, made)
            except _RefusedError as refusal:
                skipped.append(Skip(node.name, str(refusal)))
                continue
            rewritten.append(node.name)
            g.replace_and_erase(node, result)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


def _check(graph_module: fx.GraphModule, contraction: Contraction) -> None:
    """Refuses what is not a product with one constant."""
    held = [g.find_constant(graph_module, operand) for operand in contraction.operands]
    constants = [tensor for tensor in held if tensor is not None]
    if not constants:
        raise _RefusedError("the weight is not a constant")
    if len(constants) > 1 or len(held) < 2:
        raise _RefusedError(f"{len(constants)} of its {len(held)} operands are constants")
    if any(not g.is_float32(operand) for operand in contraction.operands):
        raise _RefusedError("works on another dtype than FP32")
    if any(len(set(term)) < len(term) for term in contraction.terms):
        raise _RefusedError("takes a diagonal")
    if min(constants[0].shape, default=0) == 0:
        raise _RefusedError("an empty or scalar operand")


def _rewritten(
    graph_module: fx.GraphModule,
    node: fx.Node,
    contraction: Contraction,
    bounds: CanonicaliseContraction,
    made: _Made,
) -> fx.Node:
    """The result, where the step that meets the constant is a Linear: pairs from left to right."""
    operands, terms = list(contraction.operands), list(contraction.terms)
    at = next(i for i, operand in enumerate(operands) if operand.op == "get_attr")
    if at > 1:
        kept = _kept(terms[:at], "".join(terms[at:]) + contraction.result)
        before = f"{','.join(terms[:at])}->{kept}"
        x = g.insert_call(node.graph, node, _aten.einsum.default, (before, operands[:at]))
        operands[:at], terms[:at] = [x], [kept]
        at = 1
    last = len(operands) == 2
    kept = contraction.result if last else _kept(terms[:2], "".join(terms[2:]) + contraction.result)
    pair = _Pair(operands[1 - at], terms[1 - at], operands[at], terms[at], kept)
    pair.check(bounds)
    y = _linear(graph_module, node, pair, made)
    if not last:
        behind = f"{','.join([kept, *terms[2:]])}->{contraction.result}"
        y = g.insert_call(node.graph, node, _aten.einsum.default, (behind, [y, *operands[2:]]))
    if contraction.bias is not None:
        y = g.insert_call(node.graph, node, _aten.add.Tensor, (y, contraction.bias))
    return y


def _kept(terms: Sequence[str], needed: str) -> str:
    """The letters of some operands that the rest needs, each once."""
    return "".join(letter for letter in dict.fromkeys("".join(terms)) if letter in needed)


@dataclass(frozen=True, slots=True)
class _Pair:
    """An input and a constant to be contracted, by letters."""

    x: fx.Node
    x_term: str
    weight: fx.Node
    weight_term: str
    result: str

    @property
    def sizes(self) -> dict[str, int]:
        """Of the constant."""
        return dict(zip(self.weight_term, g.fake_value(self.weight).shape, strict=True))

    @property
    def gone(self) -> str:
        """What the input alone sums over, and its dimensions of 1 of which the constant has more."""
        sizes, own = self.sizes, g.symbolic_shape(g.fake_value(self.x).shape)
        broadcast = [c for c, size in zip(self.x_term, own, strict=True) if size == 1 and sizes.get(c, 1) != 1]
        return "".join(c for c in self.x_term if c in broadcast or c not in self.weight_term + self.result)

    @property
    def kept(self) -> str:
        """The input's term without these."""
        return "".join(c for c in self.x_term if c not in self.gone)

    @property
    def batch(self) -> str:
        """What both have and keep: there is another matrix for each."""
        return "".join(c for c in self.result if c in self.kept and c in self.weight_term)

    @property
    def summed(self) -> str:
        """What both are summed over, in the order of the input."""
        return "".join(c for c in self.kept if c in self.weight_term and c not in self.result)

    @property
    def outputs(self) -> str:
        """What the constant alone has of the result, in the order of the result."""
        return "".join(c for c in self.result if c in self.weight_term and c not in self.kept)

    def check(self, bounds: CanonicaliseContraction) -> None:
        """Refuses what is no Linear."""
        sizes = self.sizes
        own = dict(zip(self.x_term, g.symbolic_shape(g.fake_value(self.x).shape), strict=True))
        if unequal := [c for c in self.kept if own[c] != sizes.get(c, own[c])]:
            raise _RefusedError(f"its sizes {own[unequal[0]]} and {sizes[unequal[0]]} are not known to be equal")
        if not self.summed:
            raise _RefusedError("it sums over nothing that both operands have")
        if not self.outputs:
            raise _RefusedError("the weight is a vector")
        count = math.prod(sizes[c] for c in self.batch)
        values = math.prod(sizes[c] for c in self.outputs + self.summed)
        if self.batch and (values < bounds.least or count > bounds.most):
            raise _RefusedError(f"{count} matrices of {values} values: their calls would cost more than they save")


def _linear(graph_module: fx.GraphModule, node: fx.Node, pair: _Pair, made: _Made) -> fx.Node:
    """Inserts permute, flatten, linear, unflatten and permute, each only where it does something."""
    graph, x, kept, batch, sizes = graph_module.graph, pair.x, pair.kept, pair.batch, pair.sizes
    if gone := [pair.x_term.index(c) for c in pair.gone]:
        x = g.insert_call(graph, node, _aten.sum.dim_IntList, (x, gone))
    rows = "".join(c for c in kept if c not in pair.summed + batch)
    x = _permuted(graph, node, x, kept, batch + rows + pair.summed)
    if len(pair.summed) > 1:
        x = g.insert_call(graph, node, _aten.flatten.using_ints, (x, len(batch + rows), -1))
    if len(batch) > 1:
        x = g.insert_call(graph, node, _aten.flatten.using_ints, (x, 0, len(batch) - 1))
    y = _multiplied(graph_module, node, pair, x, made)
    if len(batch) > 1:
        y = g.insert_call(graph, node, _aten.unflatten.int, (y, 0, [sizes[c] for c in batch]))
    if len(pair.outputs) > 1:
        y = g.insert_call(graph, node, _aten.unflatten.int, (y, -1, [sizes[c] for c in pair.outputs]))
    return _permuted(graph, node, y, batch + rows + pair.outputs, pair.result)


def _multiplied(graph_module: fx.GraphModule, node: fx.Node, pair: _Pair, x: fx.Node, made: _Made) -> fx.Node:
    """The Linear, or one for each matrix of a batch, of [batch, rows…, summed] to [batch, rows…, outputs]."""
    graph = graph_module.graph
    if pair.batch:
        parts = []
        for i, matrix in enumerate(_matrices(graph_module, node, pair, made)):
            part = g.insert_call(graph, node, _aten.select.int, (x, 0, i))
            parts.append(g.insert_call(graph, node, _aten.linear.default, (part, matrix)))
        return g.insert_call(graph, node, _aten.stack.default, (parts,))
    if pair.weight_term == pair.summed + pair.outputs and len(pair.weight_term) == 2:
        return g.insert_call(graph, node, _aten.matmul.default, (x, pair.weight))
    return g.insert_call(graph, node, _aten.linear.default, (x, _matrix(graph_module, node, pair, made)))


def _matrix(graph_module: fx.GraphModule, node: fx.Node, pair: _Pair, made: _Made) -> fx.Node:
    """The constant as [outputs, summed]."""
    if pair.weight_term == pair.outputs + pair.summed and len(pair.weight_term) == 2:
        return pair.weight
    held = _arranged(graph_module, pair, made)
    return g.add_constant(graph_module, f"{pair.weight.target}_matrix", held, node, [pair.weight])


def _matrices(graph_module: fx.GraphModule, node: fx.Node, pair: _Pair, made: _Made) -> list[fx.Node]:
    """The constants [outputs, summed] of a batch."""
    held = _arranged(graph_module, pair, made)
    name = str(pair.weight.target)
    return [g.add_constant(graph_module, f"{name}_{i}", each, node, [pair.weight]) for i, each in enumerate(held)]


def _arranged(graph_module: fx.GraphModule, pair: _Pair, made: _Made) -> torch.Tensor:
    """The constant as [outputs, summed], or as [batch, outputs, summed]; made once for each way in which it is read."""
    order = pair.batch + pair.outputs + pair.summed
    key = (pair.weight.target, len(pair.batch), len(pair.outputs), *(order.find(c) for c in pair.weight_term))
    if key not in made:
        held = g.constant(graph_module, pair.weight)
        if alone := [i for i, c in enumerate(pair.weight_term) if c not in order]:
            held = held.sum(alone)
        term = [c for c in pair.weight_term if c in order]
        held = held.permute([term.index(c) for c in order])
        for first, letters in enumerate(each for each in (pair.batch, pair.outputs, pair.summed) if each):
            held = held.flatten(first, first + len(letters) - 1)
        made[key] = held.contiguous()
    return made[key]


def _permuted(graph: fx.Graph, node: fx.Node, x: fx.Node, term: str, order: str) -> fx.Node:
    if term == order:
        return x
    return g.insert_call(graph, node, _aten.permute.default, (x, [term.index(c) for c in order]))
