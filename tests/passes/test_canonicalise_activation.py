from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Case, Contract, Forward, noise, run_pass, until
from torch import Tensor, fx, nn

from armopt.passes import Pass
from armopt.passes.canonicalise_activation import CanonicaliseActivation

Formula = Callable[[Tensor], Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """As Hugging Face's NewGELUActivation has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """As FastGELUActivation has it."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class TestCanonicaliseActivation(Contract):
    folder = "canonicalise_activation"
    # the same function by another formula: a few of FP32's last bits of the largest value
    tolerance = 2e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        for step in until(CanonicaliseActivation):
            graph_module = step(graph_module).graph_module
        return graph_module

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return CanonicaliseActivation()

    cases = (
        Case(
            "gelu_behind_a_layer",
            lambda: Forward(lambda s, x: gelu_new(s.fc(x)), fc=nn.Linear(4, 3)),
            (noise(2, 4),),
            ops={"aten.gelu.default": 1},
            absent=("aten.tanh.default", "aten.pow.Tensor_Scalar"),
        ),
        Case(
            "silu_and_hardswish_with_a_dynamic_batch",
            lambda: Forward(lambda s, x: x / (1 + torch.exp(-x)) + x * nn.functional.relu6(x + 3) / 6),
            (noise(2, 4),),
            batch=(1, 4),
            ops={"aten.silu.default": 1, "aten.hardswish.default": 1},
        ),
        Case(
            "gated",
            lambda: Forward(lambda s, x: s.fc(x) * torch.sigmoid(x) + x * torch.sigmoid(1.702 * x), fc=nn.Linear(4, 4)),
            (noise(2, 4),),
            rewritten=0,
        ),
    )


@pytest.mark.parametrize(
    ("formula", "wanted"),
    [
        (gelu_new, "gelu_tanh"),
        (gelu_fast, "gelu_tanh"),
        (gelu, "gelu"),
        (lambda x: (x / 2) * (1 + torch.erf(x * 0.7071067811865475)), "gelu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: torch.sigmoid(x).mul(x), "silu"),
        (lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1), "hardswish"),
        (lambda x: x * nn.functional.hardsigmoid(x), "hardswish"),
        (lambda x: x * torch.sigmoid(1.702 * x), ""),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421)), ""),  # another function from the sixth digit on
        (lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))), ""),
        (lambda x: x * torch.tanh(x), ""),
        (lambda x: x * torch.sigmoid(x.flip(0)), ""),
        (lambda x: x * torch.sigmoid(x[:1]), ""),
        (lambda x: (x.double() * torch.sigmoid(x.double())).float(), ""),
    ],
)
def test_a_formula_is_known_by_its_values(formula: Formula, wanted: str) -> None:
    # something pointwise in front, in which the formula could be lost
    result = run_pass(CanonicaliseActivation(), lambda: Forward(lambda s, x: formula(x * 2 + 1)), noise(3, 4))
    names = [
        node.target.overloadpacket.__name__ + ("_tanh" if node.kwargs.get("approximate") == "tanh" else "")
        for node in result.graph_module.graph.nodes
        if node.op == "call_function" and node.target.overloadpacket.__name__ in ("gelu", "silu", "hardswish")
    ]
    assert names == ([wanted] if wanted else [])
    assert result.modified is bool(wanted)


def test_a_number_that_is_written_to_is_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            y = x / (self.one + torch.exp(-x))
            self.one.add_(1)
            return y

    assert run_pass(CanonicaliseActivation(), Net, noise(3)).modified is False
