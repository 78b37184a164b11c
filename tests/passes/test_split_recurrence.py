from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, Contract, Forward, noise, run_pass, until
from torch import Tensor, fx, nn

from armopt import capture
from armopt.ir import graph as g
from armopt.kernels import recurrence
from armopt.onnx_export import recurrence as standard_recurrence
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.split_recurrence import SplitRecurrence

LINEAR, RECURRENCE = "armopt.linear.default", "armopt.recurrence.default"


def whole(layer: nn.Module) -> nn.Module:
    """All that a recurrent layer gives."""

    def run(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        y, states = s.layer(x)
        return (y, *states) if isinstance(states, tuple) else (y, states)

    return Forward(run, layer=layer)


class WithStates(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, (h, c) = self.layer(x, (h, c))
        return y, h, c


class TestSplitRecurrence(Contract):
    folder = "split_recurrence"
    tolerance = 2**-19  # the same sums in another order, through the steps

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(SplitRecurrence))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return SplitRecurrence()

    cases = (
        Case(
            "lstm",
            lambda: whole(nn.LSTM(4, 5)),
            (noise(3, 2, 4),),
            ops={LINEAR: 1, RECURRENCE: 1},
            absent=("aten.lstm.input",),
            rewritten=1,
        ),
        Case(
            "lstm_of_two_layers_and_directions",
            lambda: whole(nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True)),
            (noise(2, 3, 4),),
            batch=(2, 3),
            ops={LINEAR: 4, RECURRENCE: 4, "aten.cat.default": 2},
            rewritten=1,
        ),
        Case(
            "lstm_with_states",
            lambda: WithStates(nn.LSTM(4, 5, 2, bias=False, bidirectional=True)),
            (noise(3, 2, 4), noise(4, 2, 5, seed=2), noise(4, 2, 5, seed=3)),
            rewritten=1,
        ),
        Case("gru", lambda: whole(nn.GRU(4, 5, 2, bidirectional=True)), (noise(3, 2, 4),), rewritten=1),
        Case("gru_without_bias", lambda: whole(nn.GRU(4, 5, bias=False)), (noise(3, 2, 4),), rewritten=1),
        Case("rnn", lambda: whole(nn.RNN(4, 5, 2)), (noise(3, 2, 4),), rewritten=1),
        Case("rnn_with_relu", lambda: whole(nn.RNN(4, 5, nonlinearity="relu")), (noise(3, 2, 4),), rewritten=1),
        Case("unbatched", lambda: whole(nn.LSTM(4, 5)), (noise(3, 4),), rewritten=1),
        Case(
            "output_alone",
            lambda: Forward(lambda s, x: s.layer(x)[0], layer=nn.GRU(4, 5, batch_first=True)),
            (noise(2, 3, 4),),
            absent=("aten.stack.default",),
            rewritten=1,
        ),
        Case(
            "projection",
            lambda: whole(nn.LSTM(4, 5, proj_size=3)),
            (noise(3, 2, 4),),
            skips=("recurrent, with a projection of its state",),
        ),
        Case(
            "double",
            lambda: Forward(
                lambda s, x: torch.gru(x.double(), s.h, [s.a, s.b], False, 1, 0.0, False, False, False)[0].float(),
                h=noise(1, 2, 5).double(),
                a=noise(15, 4, seed=2).double(),
                b=noise(15, 5, seed=3).double(),
            ),
            (noise(3, 2, 4),),
            skips=("recurrent, on another dtype than FP32",),
        ),
        Case(
            "weight_by_input",
            lambda: Forward(
                lambda s, x: torch.gru(x, s.h, [x[0, 0, 0] * s.a, s.b], False, 1, 0.0, False, False, False)[0],
                h=noise(1, 2, 5),
                a=noise(15, 4, seed=2),
                b=noise(15, 5, seed=3),
            ),
            (noise(3, 2, 4),),
            skips=("recurrent, and a weight is not a constant",),
        ),
    )


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_operation_takes_any_number_of_steps(build: Callable[..., nn.Module]) -> None:
    """torch.export fixes that number; the operation doesn't need to."""
    model = whole(build(4, 5, bidirectional=True)).eval()
    captured = capture.module(model, (noise(3, 2, 4),), source="here")
    graph_module = pipeline.run(g.copy(captured.graph_module), PREPARE)[0]
    for steps in (1, 3, 40):
        x = noise(steps, 2, 4)
        for found, expected in zip(graph_module(x), model(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert found.stride() == expected.stride()


def test_dropout_stays() -> None:
    layer = nn.GRU(4, 5, 2, dropout=0.5)
    result = run_pass(
        SplitRecurrence(), lambda: Forward(lambda s, x: s.layer.train()(x)[0], layer=layer), noise(3, 2, 4)
    )
    assert [skip.reason for skip in result.skipped] == ["recurrent, with dropout"]


def test_a_layer_used_twice_keeps_one_of_each_weight() -> None:
    model = Forward(lambda s, x: s.layer(s.layer(x)[0])[0], layer=nn.GRU(4, 4)).eval()
    captured = capture.module(model, (noise(3, 2, 4),), source="here")
    graph_module = pipeline.run(g.copy(captured.graph_module), PREPARE)[0]
    assert len([name for name, _ in graph_module.named_buffers() if "weight" in name]) == 2


def test_an_unknown_cell_is_an_error() -> None:
    x, weight, h = noise(3, 2, 20), noise(5, 20), noise(2, 5)
    with pytest.raises(ValueError, match="cell 'mlp'"):
        torch.ops.armopt.recurrence(x, weight, None, h, None, "mlp", False)
    with pytest.raises(ValueError, match="cell 'gru' and a second state"):
        torch.ops.armopt.recurrence(x, weight, None, h, h, "gru", False)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)])
def test_onnx_gets_the_same_steps(cell: str, gates: int, backwards: bool) -> None:
    x, weight, h = noise(4, 2, 5 * gates), noise(5, 5 * gates, seed=2), noise(2, 5, seed=3)
    c = noise(2, 5, seed=4) if cell == "lstm" else None
    bias = noise(15, seed=5) if cell == "gru" else None
    for both in zip(
        recurrence.run(x, weight, bias, h, c, cell, backwards),
        standard_recurrence.run(x, weight, bias, h, c, cell, backwards),
        strict=True,
    ):
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"gates": torch.zeros(3, 2, 15)},
        {"weight": torch.zeros(4, 12)},
        {"h": torch.zeros(2, 5)},
        {"h": torch.zeros(3, 4)},
        {"c": None},
        {"c": torch.zeros(1, 3)},
        {"bias": torch.zeros(1)},
        {"cell": "gru"},
        {"cell": "none"},
        {"gates": torch.zeros(2, 16)},
    ],
)
def test_a_recurrence_of_other_sizes_gives_no_memory_as_it_was_found(changed: dict[str, Any]) -> None:
    fits = {
        "gates": torch.zeros(3, 2, 16),
        "weight": torch.zeros(4, 16),
        "bias": None,
        "h": torch.zeros(2, 4),
        "c": torch.zeros(2, 4),
        "cell": "lstm",
        "backwards": False,
    }
    torch.ops.armopt.recurrence.default(*fits.values())
    with pytest.raises(ValueError, match=r"recurrence|a state of"):
        torch.ops.armopt.recurrence.default(*(fits | changed).values())
