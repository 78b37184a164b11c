from __future__ import annotations

import pytest
import torch
from harness import Case, Contract, Forward, noise, run_pass, until
from torch import Tensor, fx, nn

from armopt.passes import Pass
from armopt.passes.canonicalise_linear import CanonicaliseLinear
from armopt.passes.restore_rows import RestoreRows


def flat(layer: nn.Linear, x: Tensor) -> Tensor:
    """As Hugging Face's Conv1D multiplies."""
    y = torch.addmm(layer.bias, x.view(-1, x.size(-1)), layer.weight.t())
    return y.view(*x.size()[:-1], layer.out_features)


class TestRestoreRows(Contract):
    folder = "restore_rows"
    tolerance = 1e-5  # FP32 sums in another order

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        for step in until(RestoreRows):
            graph_module = step(graph_module).graph_module
        return graph_module

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return RestoreRows()

    cases = (
        Case(
            "flattened",
            lambda: Forward(lambda s, x: flat(s.fc, x) + x, fc=nn.Linear(4, 4)),
            (noise(2, 3, 4),),
            absent=("aten.reshape.default", "aten.view.default"),
            rewritten=1,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: flat(s.fc, x), fc=nn.Linear(4, 5)),
            (noise(2, 3, 4),),
            batch=(1, 4),
            absent=("aten.reshape.default", "aten.view.default"),
        ),
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.fc(x.reshape(6, 4)).reshape(3, 2, 5),  # other dimensions than it had
        lambda s, x: (lambda y: y.reshape(2, 3, 5) + y.sum())(s.fc(x.reshape(6, 4))),  # used elsewhere
        lambda s, x: s.fc(x.reshape(3, 2, 4)).reshape(6, 5),
        lambda s, x: s.fc(x.reshape(2, 3, 4)[:, 1:]).reshape(2, 2, 5),
    ],
)
def test_what_is_left(forward) -> None:  # type: ignore[no-untyped-def]
    before = CanonicaliseLinear()
    result = run_pass(RestoreRows(), lambda: Forward(forward, fc=nn.Linear(4, 5)), noise(2, 3, 4), before=(before,))
    assert result.modified is False
