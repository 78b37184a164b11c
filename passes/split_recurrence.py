"""Multiplies the input of a recurrent layer for all of its steps at once."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.calls import LinearCall
from armopt.ir.operations import RECURRENCE
from armopt.ir.records import PassResult, Skip
from armopt.kernels import aten

_aten = torch.ops.aten
_CELLS: Mapping[Any, str] = {
    _aten.lstm.input: "lstm",
    _aten.gru.input: "gru",
    _aten.rnn_tanh.input: "rnn_tanh",
    _aten.rnn_relu.input: "rnn_relu",
}


class _RefusedError(Exception):
    """The message is the reason."""


@dataclass(frozen=True)
class SplitRecurrence:
    """lstm(x, [h, c], weights) -> recurrence(linear(x, W_ih, b), W_hh, h, c), for each layer and direction; gru, rnn_*.

    Half of the multiplications or more become one product of all steps' rows, planned and packed as any Linear is; the
    steps do what needs the step before. Gates of an LSTM are stored in the order i, f, o, g, so that one sigmoid takes
    three. Refuses a projection of the state, dropout, weights that are no constants, and another dtype than FP32. (Of a
    PackedSequence, and of a number of steps that is dynamic, torch.export makes no graph.)
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        rewritten: list[str] = []
        skipped: list[Skip] = []
        made: dict[tuple[object, ...], torch.Tensor] = {}
        for node in g.calls_to(graph_module.graph, *_CELLS):
            try:
                stack = _Stack.of(graph_module, node, made)
            except _RefusedError as refusal:
                skipped.append(Skip(node.name, str(refusal)))
                continue
            rewritten.append(node.name)
            results = stack.convert()
            for user in list(node.users):
                index: Any = user.args[1]
                g.replace_and_erase(user, results[index])
            graph_module.graph.erase_node(node)
        g.remove_unused(graph_module)
        return PassResult(graph_module, bool(rewritten), tuple(rewritten), tuple(skipped))


@dataclass(frozen=True)
class _Stack:
    """A recurrent node: layers on top of each other, each in one direction or two.

    Attributes:
        graph_module: Its graph.
        node: The node.
        cell: Its cell, as the operation names it.
        x: [T, B, K], or [B, T, K] where the batch comes first.
        states: h, and c of an LSTM: [layers * directions, B, H].
        weights: For each layer and direction W_ih, W_hh and, if it has them, b_ih, b_hh.
        directions: One or two.
        batch_first: Whether the batch comes first.
        made: Constants by what they are made of: a layer that is used twice keeps one of each.
    """

    graph_module: fx.GraphModule
    node: fx.Node
    cell: str
    x: fx.Node
    states: list[fx.Node]
    weights: list[list[fx.Node]]
    directions: int
    batch_first: bool
    made: dict[tuple[object, ...], torch.Tensor]

    @staticmethod
    def of(graph_module: fx.GraphModule, node: fx.Node, made: dict[tuple[object, ...], torch.Tensor]) -> _Stack:
        """What a node says.

        Raises:
            _RefusedError: It can't be divided.
        """
        arguments: Any = node.args
        x, states, params, biases, layers, dropout, train, bidirectional, batch_first = arguments
        states = list(states) if isinstance(states, (list, tuple)) else [states]
        if train and dropout:
            raise _RefusedError("recurrent, with dropout")
        each = 4 if biases else 2
        directions = 2 if bidirectional else 1
        if len(params) != each * layers * directions:
            raise _RefusedError("recurrent, with a projection of its state")
        held = [g.find_constant(graph_module, param) for param in params]
        if any(tensor is None for tensor in held):
            raise _RefusedError("recurrent, and a weight is not a constant")
        if not all(g.is_float32(value) for value in (x, *states, *params)):
            raise _RefusedError("recurrent, on another dtype than FP32")
        groups = [list(params[i : i + each]) for i in range(0, len(params), each)]
        return _Stack(graph_module, node, _CELLS[node.target], x, states, groups, directions, bool(batch_first), made)

    def convert(self) -> list[fx.Node]:
        """What the node gives: y, h and, of an LSTM, c."""
        x, batch_first = self.x, self.batch_first
        h, c = [], []
        for first in range(0, len(self.weights), self.directions):
            results = []
            for i in range(first, first + self.directions):
                y, state = self._layer(x, i, batch_first)
                results.append(y)
                c.append(state)
                h.append(self._call(_aten.select.int, y, 0, 0 if self._is_backwards(i) else -1))
            x = results[0] if len(results) == 1 else self._call(_aten.cat.default, results, -1)
            batch_first = False
        y = self._call(_aten.transpose.int, x, 0, 1) if self.batch_first else x
        states = [h, c] if self.cell == "lstm" else [h]
        return [y, *(self._call(_aten.stack.default, each) for each in states)]

    def _layer(self, x: fx.Node, i: int, batch_first: bool) -> tuple[fx.Node, fx.Node]:
        """h of every step of one layer in one direction, and its last state."""
        own, state, *biases = self.weights[i]
        apart = (
            1 if self.cell == "gru" else len(biases)
        )  # what a GRU's reset gate scales is no part of its input's share
        linear = LinearCall(
            x=x,
            weight=self._stored(own),
            bias=self._stored(*biases[:apart]) if biases else None,
            kernel=aten.LINEAR.name,
        ).insert(self.node, f"{self.node.name}_{i}")
        gates = self._call(_aten.transpose.int, linear, 0, 1) if batch_first else linear
        h, *c = [self._call(_aten.select.int, each, 0, i) for each in self.states]
        steps = self._call(
            RECURRENCE,
            gates,
            self._stored(state, transposed=True),
            self._stored(*biases[apart:]) if biases[apart:] else None,
            h,
            c[0] if c else None,
            self.cell,
            self._is_backwards(i),
            name=f"{self.node.name}_{i}_steps",
        )
        return self._call(operator.getitem, steps, 0), self._call(operator.getitem, steps, 1)

    def _is_backwards(self, i: int) -> bool:
        return i % self.directions == 1

    def _stored(self, *sources: fx.Node, transposed: bool = False) -> fx.Node:
        """A constant, or the sum of several, its gates in the order of the operation."""
        key = (self.cell, transposed, *(source.target for source in sources))
        if key not in self.made:
            held = torch.stack([self._in_order(g.constant(self.graph_module, each)) for each in sources]).sum(0)
            self.made[key] = held.t().contiguous() if transposed else held
        made_of = sources if len(sources) == 1 else ()
        return g.add_constant(self.graph_module, f"{sources[0].target}_gates", self.made[key], self.node, made_of)

    def _in_order(self, held: torch.Tensor) -> torch.Tensor:
        if self.cell != "lstm":
            return held
        i, f, cell, o = held.chunk(4)
        return torch.cat([i, f, o, cell])

    def _call(self, target: Any, *args: Any, name: str | None = None) -> fx.Node:
        return g.insert_call(self.graph_module.graph, self.node, target, args, name=name)
