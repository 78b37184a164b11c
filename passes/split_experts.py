"""Gives each expert of a mixture a Linear of its own, on the rows that chose it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.operations import JOIN_ROWS, SPLIT_ROWS
from armopt.ir.records import PassResult, Skip
from armopt.passes._contraction import READERS, Contraction

_aten = torch.ops.aten
#: x [rows, K], W [experts, K, N], the end of each expert's rows. The first is transformers' own.
_GROUPED = ("transformers::grouped_mm_fallback", "aten::_grouped_mm")
_CUTS = (_aten.narrow.default, _aten.slice.Tensor)


class _RefusedError(Exception):
    """What stays; the message is the reason."""


@dataclass(frozen=True)
class SplitExperts:
    """grouped_mm(x, W, ends) -> join_rows(linear(part, W[i].T) for each part of split_rows(x, ends)).

    bmm(W[ids], x) and other contractions of x with matrices that data chooses become the same on rows sorted by their
    ids, which are put in order again behind it. What only works on single rows stays sorted between two such products
    of the same ids. Refuses matrices that are no constant, another dtype than FP32, and a contraction that is not one
    matrix for each row.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        splitter = _Splitter(graph_module)
        rewritten: list[str] = []
        skipped: list[Skip] = []
        for node in list(graph_module.graph.nodes):
            try:
                result = splitter.split(node)
            except _RefusedError as refusal:
                skipped.append(Skip(node.name, str(refusal)))
                continue
            if result is not None:
                rewritten.append(node.name)
                g.replace_and_erase(node, result)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


@dataclass(frozen=True, slots=True)
class _Sort:
    """Rows sorted by expert.

    Attributes:
        order: The row that comes first, second, ….
        ends: Where the rows of each expert end.
        inverse: Where each row went.
    """

    order: fx.Node
    ends: fx.Node
    inverse: fx.Node


@dataclass(frozen=True, slots=True)
class _Gathered:
    """An operand that is a matrix of a constant for each of some ids.

    Attributes:
        weight: The constant.
        gather: The node that takes matrices of it.
        ids: Which.
        term: A letter for each dimension of what is gathered: those of the ids, then two of the matrix.
    """

    weight: fx.Node
    gather: fx.Node
    ids: fx.Node
    term: str

    @property
    def batch(self) -> str:
        """The letters of the ids."""
        return self.term[:-2]


@dataclass(slots=True)
class _Splitter:
    """What is shared by the products of one graph."""

    graph_module: fx.GraphModule
    _matrices: dict[tuple[str, bool], list[torch.Tensor]] = field(default_factory=dict)
    _ends: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _sorts: dict[tuple[fx.Node, int], _Sort] = field(default_factory=dict)
    #: Rows in the order of the model -> the same in the order of their experts.
    _sorted: dict[tuple[fx.Node, _Sort], fx.Node] = field(default_factory=dict)

    def split(self, node: fx.Node) -> fx.Node | None:
        """What replaces a node; None where it is no product of experts.

        Raises:
            _RefusedError: It is one, and stays.
        """
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if node.target._schema.name in _GROUPED:
            return self._grouped(node)
        contraction = READERS[node.target](node) if node.target in READERS else None
        if contraction is None:
            return None
        found = ((i, _gathered(self.graph_module, contraction, i)) for i in range(len(contraction.operands)))
        at, gathered = next(((i, each) for i, each in found if each is not None), (0, None))
        return None if gathered is None else self._chosen(node, contraction, at, gathered)

    def _grouped(self, node: fx.Node) -> fx.Node:
        """A product whose rows are sorted already."""
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given: Any = dict(zip(names, node.args, strict=False)) | node.kwargs
        x, weight, ends, *more = (given.get(name) for name in names)
        if ends is None or any(each is not None for each in more) or g.fake_value(x).dim() != 2:
            raise _RefusedError("groups something other than rows, or adds a bias or gives another dtype")
        self._check(x, weight)
        return self._linears(node, x, self._wide(node, ends), weight, transposed=True)

    def _wide(self, node: fx.Node, ends: fx.Node) -> fx.Node:
        """Ends in int64, converted once."""
        if g.fake_value(ends).dtype == torch.int64:
            return ends
        if ends not in self._ends:
            self._ends[ends] = g.insert_call(node.graph, node, _aten._to_copy.default, (ends,), {"dtype": torch.int64})
        return self._ends[ends]

    def _chosen(self, node: fx.Node, contraction: Contraction, at: int, gathered: _Gathered) -> fx.Node:
        """A product with a matrix for each id."""
        if len(contraction.operands) != 2:
            raise _RefusedError(f"a product of {len(contraction.operands)} operands, of which data chooses one")
        x, term, batch = contraction.operands[1 - at], contraction.terms[1 - at], gathered.batch
        self._check(x, gathered.weight)
        summed, outputs = _roles(contraction, term, gathered)
        sizes = dict(zip(term, g.symbolic_shape(g.fake_value(x).shape), strict=True))
        single = [c for c in term if c not in batch + summed and sizes[c] == 1]
        rows = "".join(c for c in term if c not in [*batch, summed, *single])
        for letter in single:
            x, term = self._without(node, x, term.index(letter)), term.replace(letter, "")
        x = self._flat(node, x, term, gathered, rows + summed)
        sort = self._sort(node, gathered)
        joined = self._linears(
            node, self._in_order(node, x, sort), sort.ends, gathered.weight, transposed=gathered.term[-2] == summed
        )
        y = g.insert_call(node.graph, node, _aten.index_select.default, (joined, 0, sort.inverse))
        self._sorted[y, sort] = joined
        if len(batch) > 1:
            y = g.insert_call(node.graph, node, _aten.unflatten.int, (y, 0, _unflattened(gathered.ids)))
        return self._arranged(node, y, batch + rows + outputs, single, contraction)

    def _check(self, x: fx.Node, weight: Any) -> None:
        held = g.find_constant(self.graph_module, weight)
        if held is None:
            raise _RefusedError("the weight is not a constant")
        if held.dim() != 3 or min(held.shape) == 0:
            raise _RefusedError(f"its weight is {'x'.join(map(str, held.shape))}, not a matrix for each expert")
        if held.dtype != torch.float32 or not g.is_float32(x):
            raise _RefusedError("works on another dtype than FP32")

    def _without(self, node: fx.Node, x: fx.Node, dim: int) -> fx.Node:
        """A tensor without a dimension of one."""
        source: Any = x.args[0]
        if x.target is _aten.unsqueeze.default and int(x.args[1]) % g.fake_value(x).dim() == dim:  # type: ignore[arg-type]
            return source  # type: ignore[no-any-return]
        return g.insert_call(node.graph, node, _aten.squeeze.dim, (x, dim))

    def _flat(self, node: fx.Node, x: fx.Node, term: str, gathered: _Gathered, last: str) -> fx.Node:
        """The input as [one row for each id, …]."""
        graph, batch, ids = node.graph, gathered.batch, g.fake_value(gathered.ids)
        order = "".join(c for c in batch if c in term) + last
        if order != term:
            x = g.insert_call(graph, node, _aten.permute.default, (x, [term.index(c) for c in order]))
        for i, letter in enumerate(batch):
            if letter not in term:
                x = g.insert_call(graph, node, _aten.unsqueeze.default, (x, i))
        wanted, own = g.symbolic_shape(ids.shape), g.symbolic_shape(g.fake_value(x).shape)
        if wanted != own[: len(batch)]:
            if any(size != 1 and size != other for size, other in zip(own, wanted, strict=False)):
                raise _RefusedError(f"its input has {own[: len(batch)]} rows, and chooses {wanted} matrices")
            spread = [
                -1 if a == b else self._size(node, gathered.ids, i, a)
                for i, (a, b) in enumerate(zip(wanted, own, strict=False))
            ]
            x = g.insert_call(graph, node, _aten.expand.default, (x, [*spread, *(-1 for _ in last)]))
        if len(batch) > 1:
            x = g.insert_call(graph, node, _aten.flatten.using_ints, (x, 0, len(batch) - 1))
        return x

    def _size(self, node: fx.Node, ids: fx.Node, dim: int, size: int | str) -> int | fx.Node:
        return size if isinstance(size, int) else g.insert_call(node.graph, node, _aten.sym_size.int, (ids, dim))

    def _sort(self, node: fx.Node, gathered: _Gathered) -> _Sort:
        """The order of the rows by their ids; each set of ids is sorted once."""
        graph, ids = node.graph, gathered.ids
        count = g.fake_value(gathered.weight).shape[0]
        if (ids, count) not in self._sorts:
            experts = g.add_constant(self.graph_module, f"experts_{count}", torch.arange(count), node)
            # as the model does: negative ids count from the end, and others than there are matrices are an error
            args = fx.map_arg(gathered.gather.args, lambda each: experts if each is gathered.weight else each)
            chosen = g.insert_call(graph, node, gathered.gather.target, args)  # type: ignore[arg-type]
            if len(gathered.batch) > 1:
                chosen = g.insert_call(graph, node, _aten.flatten.using_ints, (chosen,))
            column = g.add_constant(self.graph_module, f"experts_{count}_column", torch.arange(count)[:, None], node)
            until = g.insert_call(graph, node, _aten.le.Tensor, (chosen, column))
            ends = g.insert_call(graph, node, _aten.sum.dim_IntList, (until, [1]))
            order = g.insert_call(graph, node, _aten.argsort.default, (chosen,))
            inverse = g.insert_call(graph, node, _aten.argsort.default, (order,))
            self._sorts[ids, count] = _Sort(order, ends, inverse)
        return self._sorts[ids, count]

    def _in_order(self, node: fx.Node, x: fx.Node, sort: _Sort) -> fx.Node:
        """The rows of a tensor in the order of their experts."""
        found = self._kept_in_order(node, x, sort)
        if found is None:
            found = g.insert_call(node.graph, node, _aten.index_select.default, (x, 0, sort.order))
            self._sorted[x, sort] = found
        return found

    def _kept_in_order(self, node: fx.Node, x: fx.Node, sort: _Sort) -> fx.Node | None:
        """The value computed in sorted order by operations on single rows; None where rows never were in that order."""
        if (x, sort) in self._sorted:
            return self._sorted[x, sort]
        if not _works_on_rows(x):
            return None
        rows = [each for each in x.all_input_nodes if _has_rows_of(x, each)]
        if all(self._kept_in_order(node, each, sort) is None for each in rows):
            return None
        made = {each: self._in_order(node, each, sort) for each in rows}
        args, kwargs = fx.map_arg((x.args, dict(x.kwargs)), lambda each: made.get(each, each))
        target: Any = x.target
        self._sorted[x, sort] = g.insert_call(node.graph, node, target, args, kwargs)
        return self._sorted[x, sort]

    def _linears(self, node: fx.Node, x: fx.Node, ends: fx.Node, weight: fx.Node, *, transposed: bool) -> fx.Node:
        """Each part of sorted rows by its own matrix; `transposed` where these are [K, N]."""
        graph = node.graph
        parts = g.insert_call(graph, node, SPLIT_ROWS, (x, ends))
        made = []
        for i, matrix in enumerate(self._constants(node, weight, transposed)):
            part = g.insert_call(graph, node, operator.getitem, (parts, i))
            made.append(g.insert_call(graph, node, _aten.linear.default, (part, matrix)))
        return g.insert_call(graph, node, JOIN_ROWS, (made, x))

    def _constants(self, node: fx.Node, weight: fx.Node, transposed: bool) -> Iterator[fx.Node]:
        """The matrices [N, K], each made once."""
        name, key = str(weight.target), (str(weight.target), transposed)
        if key not in self._matrices:
            held = g.constant(self.graph_module, weight)
            self._matrices[key] = [(each.t() if transposed else each).contiguous() for each in held]
        (name,) = sources if len(sources := g.source_constants(weight)) == 1 else (name,)
        for i, matrix in enumerate(self._matrices[key]):
            yield g.add_constant(self.graph_module, f"{name}_{i}_weight", matrix, node, [weight])

    def _arranged(
        self, node: fx.Node, y: fx.Node, term: str, single: Sequence[str], contraction: Contraction
    ) -> fx.Node:
        """The result with its dimensions in order, those of one and a bias added."""
        graph, result = node.graph, contraction.result
        order = "".join(c for c in result if c not in single)
        if order != term:
            y = g.insert_call(graph, node, _aten.permute.default, (y, [term.index(c) for c in order]))
        for i, letter in enumerate(result):
            if letter in single:
                flat, y = y, g.insert_call(graph, node, _aten.unsqueeze.default, (y, i))
                for user in list(node.users):
                    if len(single) == 1 and contraction.bias is None and _squeezes(user, i, len(result)):
                        g.replace_and_erase(user, flat)
        if contraction.bias is not None:
            y = g.insert_call(graph, node, _aten.add.Tensor, (y, contraction.bias))
        return y


def _gathered(graph_module: fx.GraphModule, contraction: Contraction, at: int) -> _Gathered | None:
    """An operand that is gathered from a constant, looking through permutations."""
    node, term = _before_permutations(contraction.operands[at], list(contraction.terms[at]))
    given: Any = node.args
    ids: Any = None
    if node.target is _aten.index.Tensor and len(given[1]) == 1:
        ids = given[1][0]
    elif node.target is _aten.index_select.default and given[1] == 0:
        ids = given[2]
    weight: Any = given[0] if given else None
    if not isinstance(ids, fx.Node) or g.find_constant(graph_module, weight) is None:
        return None
    if g.fake_value(weight).dim() != 3 or g.fake_value(ids).dtype not in (torch.int64, torch.int32):
        return None
    return _Gathered(weight, node, ids, "".join(term))


def _before_permutations(node: fx.Node, term: list[str]) -> tuple[fx.Node, list[str]]:
    """What permutations were made of, and its term."""
    while node.target in (_aten.transpose.int, _aten.permute.default):
        source, *dims = node.args
        places: Any = list(range(len(term)))
        if node.target is _aten.permute.default:
            places = [int(dim) % len(term) for dim in dims[0]]  # type: ignore[union-attr,arg-type]
        else:
            one, other = (int(dim) % len(term) for dim in dims)  # type: ignore[arg-type]
            places[one], places[other] = other, one
        term = [term[places.index(i)] for i in range(len(term))]
        assert isinstance(source, fx.Node)
        node = source
    return node, term


def _roles(contraction: Contraction, term: str, gathered: _Gathered) -> tuple[str, str]:
    """The letter that is summed over and the one that the matrix brings in."""
    matrix = gathered.term[-2:]
    both = [*gathered.term, *(c for c in term if c not in gathered.term)]
    summed, outputs = [c for c in matrix if c in term], [c for c in matrix if c in contraction.result]
    kept = {c for c in both if c not in summed}
    repeated = any(len(set(each)) < len(each) for each in (term, gathered.term))
    if repeated or len(summed) != 1 or len(outputs) != 1 or summed == outputs or kept != set(contraction.result):
        raise _RefusedError("it is not one matrix of the chosen for each row")
    return summed[0], outputs[0]


def _works_on_rows(node: fx.Node) -> bool:
    """Whether each row of a node's result comes from the same row of its operands alone."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _CUTS:
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        source: Any = node.args[0]
        return bool(dim % g.fake_value(source).dim())
    return torch.Tag.pointwise in node.target.tags and not node.target._schema.is_mutable


def _has_rows_of(node: fx.Node, operand: fx.Node) -> bool:
    """Whether an operand has a row for each row of the result, not one for all."""
    one, other = node.meta.get("val"), operand.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor) or one.dim() != other.dim():
        return False
    return one.dim() > 0 and g.symbolic_shape(one.shape[:1]) == g.symbolic_shape(other.shape[:1])


def _squeezes(user: fx.Node, dim: int, dims: int) -> bool:
    return user.target is _aten.squeeze.dim and int(user.args[1]) % dims == dim  # type: ignore[arg-type]


def _unflattened(ids: fx.Node) -> list[int]:
    """The sizes of ids; one may be dynamic."""
    sizes = [size if isinstance(size, int) else -1 for size in g.symbolic_shape(g.fake_value(ids).shape)]
    if sizes.count(-1) > 1:
        raise _RefusedError("several sizes of its ids are dynamic")
    return sizes
