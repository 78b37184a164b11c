"""The two operations' arguments by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx, nn

from armopt import capture, passes
from armopt.ir import calls
from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LinearCall, call_from, call_of
from armopt.passes import pipeline


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5, bias=False))
    captured = capture.module(model.eval(), (torch.zeros(1, 3, 6, 6),))
    return pipeline.run(g.copy(captured.graph_module), passes.PREPARE)[0]


@pytest.mark.parametrize("kind", [LinearCall, ConvCall])
def test_the_fields_are_the_schemas_arguments(kind: type[LinearCall[fx.Node]] | type[ConvCall[fx.Node]]) -> None:
    names = {argument.name for argument in kind.operation._schema.arguments}
    assert {field.name for field in dataclasses.fields(kind)} == names


def test_arguments_by_name(prepared: fx.GraphModule) -> None:
    conv, linear = calls.layers(prepared.graph)
    found = ConvCall.of(conv)
    assert (found.stride, found.padding, found.dilation, found.groups) == ([2, 2], [1, 1], [1, 1], 1)
    assert (found.post_op, found.other, found.kernel, found.weight_name) == ("relu", None, "aten_conv", "_0_weight")
    assert (LinearCall.of(linear).bias, LinearCall.of(linear).block) == (None, 0)
    for node, kind in ((conv, ConvCall), (linear, LinearCall)):
        call = call_of(node)
        assert isinstance(call, kind)
        assert call.args == node.args
        assert call_from(node.target, node.args) == call


def test_a_changed_call_is_inserted_with_true_metadata(prepared: fx.GraphModule) -> None:
    graph_module = g.copy(prepared)
    node = next(iter(calls.layers(graph_module.graph)))
    call = ConvCall.of(node)
    made = call.replace(stride=[1, 1], post_op="none").insert(node, "again")
    assert (made.name, g.fake_value(made).shape, g.fake_value(node).shape) == ("again", (1, 4, 6, 6), (1, 4, 3, 3))
    assert ConvCall.of(made) == call.replace(stride=[1, 1], post_op="none")
    assert call.post_op == "relu"


def test_a_call_on_tensors_runs() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    call = LinearCall(x=x, weight=weight, bias=None, kernel="aten_linear")
    assert torch.equal(call.run(), x @ weight.T)
