from __future__ import annotations

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, Forward2, noise, run_pass, until
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from armopt.ir.calls import call_of, layers
from armopt.ir.operations import CONV, LINEAR
from armopt.passes import Pass, pipeline
from armopt.passes.fuse_pointwise import FusePointwise

BEFORE = until(FusePointwise)


def _linear(function: object, **parts: nn.Module) -> nn.Module:
    return Forward(function, fc=nn.Linear(4, 4), **parts)  # type: ignore[arg-type]


class TestFusePointwise(Contract):
    folder = "fuse_pointwise"
    # The twin runs the same ATen operations one after another. aten.clamp and aten.hardtanh agree exactly.
    tolerance = 0.0

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FusePointwise()

    cases = (
        Case(
            "conv_relu",
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            (noise(1, 3, 6, 6),),
            absent=("aten.relu.default",),
            rewritten=1,
        ),
        Case(
            "residual",
            zoo_models.residual,
            (noise(1, 16, 12, 12),),
            absent=("aten.relu.default", "aten.add.Tensor"),
            rewritten=6,
        ),
        Case(
            "add_linear_on_the_right",
            lambda: _linear(lambda s, x: x + s.fc(x)),
            (noise(2, 4),),
            absent=("aten.add.Tensor",),
        ),
        Case(
            "add_two_layers",
            lambda: _linear(lambda s, x: s.fc(x) + s.gate(x), gate=nn.Linear(4, 4)),
            (noise(2, 4),),
            absent=("aten.add.Tensor",),
            rewritten=1,
        ),
        Case(
            "add_after_a_post_op",
            lambda: _linear(lambda s, x: s.fc(x).relu() + s.gate(x), gate=nn.Linear(4, 4)),
            (noise(2, 4),),
            absent=("aten.add.Tensor", "aten.relu.default"),
            rewritten=2,
        ),
        Case("used_twice", zoo_models.shared_weights, (noise(2, 64),), absent=("aten.silu.default",)),
        Case(
            "dynamic_batch",
            lambda: _linear(lambda s, x: (s.fc(x) + x).relu()),
            (noise(2, 4),),
            batch=(1, 4),
            absent=("aten.relu.default", "aten.add.Tensor"),
            rewritten=2,
        ),
        Case(
            "layer_used_elsewhere",
            lambda: _linear(lambda s, x: (y := s.fc(x)).relu() * y),
            (noise(2, 4),),
            skips=("fc is used by 2 nodes",),
            rewritten=0,
        ),
        Case(
            "second_function",
            lambda: _linear(lambda s, x: s.fc(x).relu().sigmoid()),
            (noise(2, 4),),
            skips=("fc has relu fused already",),
            rewritten=1,
        ),
        Case(
            "gelu_behind_add",
            lambda: _linear(lambda s, x: F.gelu(s.fc(x) + x)),
            (noise(2, 4),),
            skips=("fc has add fused already",),
            rewritten=1,
        ),
        Case(
            "added_to_itself",
            lambda: _linear(lambda s, x: (y := s.fc(x)) + y),
            (noise(2, 4),),
            skips=("fc and fc: used elsewhere, or with a post-op already",),
            rewritten=0,
        ),
        Case(
            "add_after_its_own_post_op",
            lambda: _linear(lambda s, x: s.fc(x).relu() + x),
            (noise(2, 4),),
            skips=("fc: used elsewhere, or with a post-op already",),
            rewritten=1,
        ),
        Case(
            "scaled_addition",
            lambda: _linear(lambda s, x: torch.add(s.fc(x), x, alpha=2)),
            (noise(2, 4),),
            skips=("the addition is scaled",),
            rewritten=0,
        ),
        Case(
            "adds_a_number",
            lambda: _linear(lambda s, x: s.fc(x) + 1.5),
            (noise(2, 4),),
            skips=("adds a number",),
            rewritten=0,
        ),
        Case(
            "addition_broadcasts",
            lambda: _linear(lambda s, x: s.fc(x) + x[:1]),
            (noise(2, 4),),
            skips=("the addition broadcasts or converts",),
            rewritten=0,
        ),
        Case(
            "layer_broadcasts",
            lambda: _linear(lambda s, x: s.fc(x[:1]) + x),
            (noise(2, 4),),
            skips=("the addition broadcasts or converts",),
            rewritten=0,
        ),
        Case(
            "addition_converts",
            lambda: _linear(lambda s, x: s.fc(x) + x.double()),
            (noise(2, 4),),
            skips=("the addition broadcasts or converts",),
            rewritten=0,
        ),
    )


FUNCTIONS = {
    "relu": F.relu,
    "relu ": lambda x: x.clamp_min(0),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": nn.ReLU6(),
    "relu6 ": lambda x: x.clamp(0, 6),
    "relu6  ": lambda x: F.hardtanh(x, 0.0, 6.0),
}


def test_functional_relu6_is_fused() -> None:
    result = run_pass(FusePointwise(), lambda: _linear(lambda s, x: F.relu6(s.fc(x))), noise(2, 4), before=BEFORE)
    assert result.modified


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_and_layer(name: str) -> None:
    function, x = FUNCTIONS[name], 4 * noise(2, 3, 5, 5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.fc(function(self.conv(x))))

    result = run_pass(FusePointwise(), Model, x, before=BEFORE)
    layers = [node for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert [node.target for node in layers] == [CONV, LINEAR]
    assert {call_of(node).post_op for node in layers} == {name.strip()}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(0, 5),
        F.hardtanh,
        lambda x: x.clamp_min(1),
        lambda x: x.clamp_max(6),
        F.elu,
    ],
)
def test_what_is_no_post_op_is_left_alone(function: object) -> None:
    model = lambda: _linear(lambda s, x: function(s.fc(x)))  # type: ignore[operator]  # noqa: E731
    result = run_pass(FusePointwise(), model, noise(2, 4), before=BEFORE)
    assert (result.modified, result.skipped) == (False, ())


def test_the_later_of_two_layers_takes_the_other() -> None:
    """The first one's result is there when the second runs; the other way round it would not be."""
    model = lambda: Forward2(lambda s, x, y: s.a(x) + s.b(y.relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))  # noqa: E731
    result = run_pass(FusePointwise(), model, noise(2, 4), noise(2, 4), before=BEFORE)
    added = [node.name for node in layers(result.graph_module.graph) if call_of(node).post_op == "add"]
    assert added == ["b"]
