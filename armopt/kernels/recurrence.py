"""The recurrence of an LSTM, a GRU or an RNN, whose input was multiplied for all steps before.

The Compute Library has none, and oneDNN's LSTM on aarch64 is its reference: 73 million instructions for 32 steps of 256
features, which take this and the product in front of it 8 million. Each step's product has as few rows as the batch:
BLAS takes it, in FP32 on every build, because the weight is [K, N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from armopt.ir.operations import LIBRARY

_Tensor = torch.Tensor


def run(
    gates: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    h: _Tensor,
    c: _Tensor | None,
    cell: str,
    backwards: bool,
) -> tuple[_Tensor, _Tensor]:
    """All steps of one layer in one direction, in plain PyTorch.

    What a step works on lies in memory that all steps share, so that it takes six or seven calls: each costs as much as
    the arithmetic of a hundred values.

    Args:
        gates: [T, B, G * H], the input's share of each gate, biases included; of an LSTM in the order i, f, o, g.
        weight: [H, G * H], gates in that order.
        bias: [G * H], of a GRU alone: the reset gate scales it with the state's share.
        h: [B, H], before the first step.
        c: [B, H], the cell state before the first step, of an LSTM alone.
        cell: One of `CELLS`.
        backwards: Whether the last step is the first.

    Returns:
        h of every step [T, B, H], and what c, or without one h, is after the last [B, H].

    Raises:
        ValueError: There is no such cell, or it takes other states or sizes.
    """
    _check(gates, weight, bias, h, c, cell)
    if h.shape[0] != gates.shape[1]:
        raise ValueError(f"a state of {h.shape[0]} rows for {gates.shape[1]}")
    result = gates.new_empty((*gates.shape[:2], weight.shape[0]))
    order = slice(None, None, -1 if backwards else 1)
    steps = [part.unbind()[order] for part in (gates, result)]
    last = CELLS[cell](*steps, weight, bias, h, c)
    return result, last.clone()


def _check(gates: _Tensor, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: _Tensor | None, cell: str) -> None:
    """Refuses what would not fill all results: their memory is taken as it is found."""
    if cell not in CELLS or (c is None) == (cell == "lstm"):
        raise ValueError(f"a recurrence with the cell {cell!r}{'' if c is None else ' and a second state'}")
    size = weight.shape[0]
    width = _GATES[cell] * size
    states = [h] if c is None else [h, c]
    rows = [(each, size) for each in states] + [(gates, width), (weight, width)]
    if gates.dim() != 3 or any(each.dim() != 2 for each in (weight, *states)):
        raise ValueError("a recurrence of other dimensions")
    if any(each.shape[-1] != last for each, last in rows) or (bias is not None and bias.shape != (width,)):
        raise ValueError(f"a recurrence whose sizes don't fit its weight, {size} states")


def _lstm(gates: Any, results: Any, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: _Tensor) -> _Tensor:
    size = weight.shape[0]
    sums = h.new_empty((h.shape[0], 4 * size))
    sigmoids, new = sums[:, : 3 * size], sums[:, 3 * size :]
    i, f, o = sigmoids.chunk(3, 1)
    c = c.clone()
    for gate, result in zip(gates, results, strict=True):
        torch.addmm(gate, h, weight, out=sums)
        sigmoids.sigmoid_()
        c.mul_(f).addcmul_(i, new.tanh_())
        h = torch.tanh(c, out=result).mul_(o)
    return c


def _gru(gates: Any, results: Any, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: None) -> _Tensor:
    size = weight.shape[0]
    sums = h.new_empty((h.shape[0], 3 * size))
    sigmoids, new = sums[:, : 2 * size], sums[:, 2 * size :]
    r, z = sigmoids.chunk(2, 1)
    for gate, result in zip(gates, results, strict=True):
        if bias is None:
            torch.mm(h, weight, out=sums)
        else:
            torch.addmm(bias, h, weight, out=sums)
        of_gates, of_new = gate.split((2 * size, size), 1)
        sigmoids.add_(of_gates).sigmoid_()
        new.mul_(r).add_(of_new).tanh_()
        h = torch.lerp(new, h, z, out=result)
    return h


def _tanh(gates: Any, results: Any, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: None) -> _Tensor:
    for gate, result in zip(gates, results, strict=True):
        h = torch.addmm(gate, h, weight, out=result).tanh_()
    return h


def _relu(gates: Any, results: Any, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: None) -> _Tensor:
    for gate, result in zip(gates, results, strict=True):
        h = torch.addmm(gate, h, weight, out=result).relu_()
    return h


#: By the name that the operation takes: fill the results of all steps, and give the last state.
CELLS: Mapping[str, Callable[..., _Tensor]] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _tanh, "rnn_relu": _relu}
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _fake(
    gates: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    h: _Tensor,
    c: _Tensor | None,
    cell: str,
    backwards: bool,
) -> tuple[_Tensor, _Tensor]:
    _check(gates, weight, bias, h, c, cell)
    size = (gates.shape[1], weight.shape[0])
    return gates.new_empty((gates.shape[0], *size)), gates.new_empty(size)


LIBRARY.impl("recurrence", run, "CPU")
torch.library.register_fake("armopt::recurrence", _fake, lib=LIBRARY)
