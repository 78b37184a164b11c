from __future__ import annotations

import pytest
import torch
from harness import Case, Contract, Forward, noise, run_pass, until
from torch import fx, nn

from armopt import capture
from armopt.ir import graph as g
from armopt.passes import Pass
from armopt.passes.remove_identities import RemoveIdentities

_pad = nn.functional.pad


class TestRemoveIdentities(Contract):
    folder = "remove_identities"
    tolerance = 0.0  # nothing is computed

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return graph_module

    def make(self, graph_module: fx.GraphModule) -> Pass:
        assert until(RemoveIdentities) == ()
        return RemoveIdentities()

    cases = (
        Case(
            "copies",
            lambda: Forward(lambda s, x: (x.clone().detach().contiguous() * 2).clone() + x.t().contiguous().t()),
            (noise(3, 3),),
            absent=("aten.clone.default", "aten.contiguous.default", "aten.detach.default"),
        ),
        Case(
            "casts_to_the_same_dtype",
            lambda: Forward(lambda s, x: x.float().to(torch.float32) + 1),
            (noise(2, 3),),
            absent=("aten._to_copy.default", "aten.to.dtype", "aten._assert_tensor_metadata.default"),
        ),
        Case(
            "casts_that_change_the_dtype",
            lambda: Forward(lambda s, x: (x.double() + 1).float() * x.bool()),
            (noise(2, 3),),
        ),
        Case(
            "returned_copy_of_an_input",
            lambda: Forward(lambda s, x: (x.clone(), (x + 1).clone())),
            (noise(2, 3),),
            rewritten=1,
        ),
        Case(
            "padding",
            lambda: Forward(lambda s, x: _pad(_pad(x, (0, 0, 0, 0)) * 2, (0, 1))),
            (noise(2, 3),),
            ops={"aten.pad.default": 1},
            rewritten=1,
        ),
        Case(
            "joined_with_nothing",
            lambda: Forward(lambda s, x: torch.cat([torch.cat([torch.tensor([]), x], -2), x[:, :0], x + 1], -2)),
            (noise(2, 3, 4),),
            ops={"aten.cat.default": 1},
            rewritten=2,  # the other is a copy of the constant
        ),
        Case(
            "joined_with_nothing_and_returned",
            lambda: Forward(lambda s, x: (torch.cat([x[:0], x]), torch.cat([x[:0]]))),
            (noise(2, 3),),
            ops={"aten.cat.default": 2},
            rewritten=0,
        ),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: s.fc(x.contiguous().clone()), fc=nn.Linear(4, 3)),
            (noise(2, 4),),
            batch=(1, 4),
            absent=("aten.clone.default", "aten.contiguous.default"),
        ),
    )


def test_dropout_is_nothing_where_nothing_is_trained() -> None:
    """torch.export makes it a copy, or from 2.15 on nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d(0.3))
    result = run_pass(RemoveIdentities(), lambda: model, noise(2, 3, 4, 4))
    called = [node.target for node in result.graph_module.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.conv2d.default, torch.ops.aten.relu.default]


def test_dropout_in_training_is_left_alone() -> None:
    result = run_pass(RemoveIdentities(), lambda: Forward(lambda s, x: nn.functional.dropout(x, 0.5, True)), noise(4))
    assert [node.target for node in result.graph_module.graph.nodes if node.op == "call_function"] != []
    assert result.modified is False


def test_a_copy_of_an_input_that_is_returned_stays_a_copy() -> None:
    x = noise(2, 3)
    result = run_pass(RemoveIdentities(), lambda: Forward(lambda s, x: x.clone().clone()), x)
    (y,) = result.graph_module(x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    "model",
    [
        lambda: Forward(lambda s, x: x[0].clone()),
        lambda: Forward(lambda s, x: x.view(-1).contiguous().clone()),
        lambda: Forward(lambda s, x: (x + 1, s.table[1:].clone()), table=noise(3, 3)),
    ],
    ids=["row of the input", "view of the input", "rows of a weight"],
)
def test_a_copy_of_a_view_that_is_returned_stays_a_copy(model: object) -> None:
    x = noise(2, 3)
    result = run_pass(RemoveIdentities(), model, x)  # type: ignore[arg-type]
    held = {t.untyped_storage().data_ptr() for t in (x, *result.graph_module.buffers())}
    assert all(y.untyped_storage().data_ptr() not in held for y in result.graph_module(x))


def test_a_copy_of_a_buffer_that_is_written_to_keeps_the_old_values() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.state[0].clone()
            self.state.add_(x)
            return old

    captured = capture.module(Counter(), (torch.ones(2, 2),))
    result = RemoveIdentities()(g.copy(captured.graph_module))
    (old,) = result.graph_module(torch.ones(2, 2))
    assert old.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "model",
    [
        lambda: Forward(lambda s, x: x.t().contiguous().as_strided((2, 2), (1, 1))),
        lambda: Forward(lambda s, x: torch.view_as_real(torch.view_as_complex(x.t().contiguous()) * 2)),
    ],
    ids=["as_strided", "view_as_complex"],
)
def test_a_copy_whose_reader_depends_on_its_strides_stays(model: object) -> None:
    x = noise(2, 6)
    captured = capture.module(model(), (x,))  # type: ignore[operator]
    (expected,) = captured.graph_module(x)
    result = RemoveIdentities()(g.copy(captured.graph_module))
    (found,) = result.graph_module(x)
    assert torch.equal(found, expected)
