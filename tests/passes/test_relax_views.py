from __future__ import annotations

import torch
from harness import Case, Contract, Forward, noise, run_pass, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.relax_views import RelaxViews


class TestRelaxViews(Contract):
    folder = "relax_views"
    tolerance = 0.0  # nothing is computed

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(RelaxViews))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return RelaxViews()

    cases = (
        Case(
            "view",
            lambda: Forward(lambda s, x: s.conv(x).view(2, -1).view(2, 4, 16), conv=nn.Conv2d(3, 4, 1)),
            (noise(2, 3, 4, 4),),
            ops={"aten.reshape.default": 2},
            absent=("aten.view.default",),
            rewritten=2,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: s.fc(x).view(x.shape[0], 2, 4), fc=nn.Linear(4, 8)),
            (noise(2, 4),),
            batch=(1, 4),
            absent=("aten.view.default",),
            rewritten=1,
        ),
        Case("nothing_to_do", lambda: Forward(lambda s, x: x.relu().t()), (noise(2, 3),), rewritten=0),
    )


def test_a_view_of_another_dtype_stays() -> None:
    result = run_pass(RelaxViews(), lambda: Forward(lambda s, x: x.view(torch.int32)), noise(4))
    assert result.modified is False


def test_it_lets_a_view_stand_behind_channels_last() -> None:
    """The pass's reason: the same view on a channels_last tensor fails."""
    x = noise(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    model = lambda: Forward(lambda s, x: (x * 2).view(2, -1))  # noqa: E731
    result = run_pass(RelaxViews(), model, noise(2, 3, 4, 4))
    assert torch.equal(result.graph_module(x)[0], (x * 2).reshape(2, -1))
