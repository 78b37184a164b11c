from __future__ import annotations

import torch
import zoo_models
from harness import Case, Contract, Forward, noise, plan_for, run_pass, storages
from torch import fx, nn

from armopt import capture
from armopt.ir import graph as g
from armopt.ir.calls import call_of
from armopt.ir.operations import LINEAR
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.pack_linear import PackLinear

LINEAR_NAME, CAST = "armopt.linear.default", "aten._to_copy.default"


def _pack(graph_module: fx.GraphModule, target: str = "graviton3", rows: int = 4) -> PackLinear:
    decisions = {d.node: d for d in plan_for(target, graph_module, rows).decisions}
    return PackLinear(decisions, {})


class TestPackLinear(Contract):
    folder = "pack_linear"
    # BF16 keeps 8 bits: x, W and the result are each off by at most 2^-9 of it; sums of K terms average that out.
    # The largest of a few dozen errors stays below 2^-6 of the largest value.
    tolerance = 2**-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, PREPARE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return _pack(graph_module)

    cases = (
        Case("packed", lambda: nn.Linear(16, 8), (noise(8, 16),), ops={LINEAR_NAME: 1, CAST: 2}, rewritten=1),
        Case(
            "blas_below_the_threshold",
            lambda: nn.Linear(16, 8),
            (noise(2, 16),),
            ops={LINEAR_NAME: 1, CAST: 0},
            rewritten=1,
        ),
        Case(
            "three_dimensions", lambda: nn.Linear(16, 8, bias=False), (noise(2, 5, 16),), ops={LINEAR_NAME: 1, CAST: 2}
        ),
        Case("one_dimension", lambda: nn.Linear(16, 8), (noise(16),), ops={LINEAR_NAME: 1, CAST: 0}),
        Case(
            "residual",
            lambda: Forward(lambda s, x: (s.fc(x) + x).relu(), fc=nn.Linear(8, 8)),
            (noise(8, 8),),
            ops={LINEAR_NAME: 1, CAST: 3},
        ),
        Case("shared_layer", zoo_models.shared_weights, (noise(8, 64),), ops={LINEAR_NAME: 3, CAST: 6}, rewritten=3),
        Case("one_feature", lambda: nn.Linear(16, 1), (noise(8, 16),), ops={LINEAR_NAME: 1, CAST: 0}, rewritten=1),
        Case("no_conv", lambda: nn.Conv2d(3, 4, 1), (noise(1, 3, 4, 4),), ops={LINEAR_NAME: 0, CAST: 0}, rewritten=0),
    )


def _prepared(model: object, *inputs: torch.Tensor, batch: tuple[int, ...] = ()) -> fx.GraphModule:
    captured = capture.module(model().eval(), inputs, batch=batch)  # type: ignore[operator]
    return pipeline.run(g.copy(captured.graph_module), PREPARE)[0]


def test_the_products_are_of_bf16_operands() -> None:
    x, model = noise(8, 16), nn.Linear(16, 8)
    graph_module = _prepared(lambda: model, x)
    (found,) = _pack(graph_module)(graph_module).graph_module(x)
    with torch.no_grad():
        exact = x.bfloat16().double() @ model.weight.bfloat16().double().T + model.bias.bfloat16().double()
        plain = model(x)
    # one rounding to BF16 of a sum in FP32: half a unit of 8 bits
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    assert not torch.equal(found, plain)


def test_a_target_without_bf16_stays_in_fp32() -> None:
    x = noise(8, 16)
    graph_module = _prepared(lambda: nn.Linear(16, 8), x)
    expected = graph_module(x)[0]
    result = _pack(graph_module, "graviton2")(graph_module)
    assert result.modified
    assert torch.equal(result.graph_module(x)[0], expected)
    assert {t.dtype for t in result.graph_module.buffers()} == {torch.float32}


def test_shared_weights_are_rounded_once() -> None:
    graph_module = _prepared(zoo_models.shared_weights, noise(8, 64))
    result = _pack(graph_module)(graph_module)
    assert len(result.rewritten) == 3
    assert storages(result.graph_module) == 3  # one weight in BF16, two biases
    assert len([t for t in result.graph_module.buffers() if t.dtype == torch.bfloat16]) == 1


def test_plans_share_the_rounded_weights() -> None:
    """One dictionary for all buckets: the same memory in each program."""
    prepared = _prepared(lambda: nn.Linear(16, 8), noise(8, 16))
    rounded: dict[str, torch.Tensor] = {}
    held = set()
    for rows in (4, 64):
        graph_module = g.copy(prepared)
        decisions = {d.node: d for d in plan_for("graviton3", graph_module, rows).decisions}
        result = PackLinear(decisions, rounded)(graph_module)
        held |= {t.data_ptr() for t in result.graph_module.buffers() if t.dtype == torch.bfloat16}
    assert len(held) == len(rounded) == 1


def test_node_names_stay() -> None:
    """Plans, reports and bundles name nodes: packing must not rename them."""
    graph_module = _prepared(zoo_models.shared_weights, noise(8, 64))
    before = [node.name for node in graph_module.graph.nodes if node.target is LINEAR]
    result = _pack(graph_module)(graph_module)
    assert [node.name for node in result.graph_module.graph.nodes if node.target is LINEAR] == before


def test_a_dynamic_batch_keeps_its_symbol() -> None:
    graph_module = _prepared(lambda: nn.Linear(16, 8), noise(4, 16), batch=(1, 8))
    decisions = {d.node: d for d in plan_for("graviton3", graph_module, 1).decisions}
    result = PackLinear(decisions, {})(graph_module)
    layer = next(node for node in result.graph_module.graph.nodes if node.target is LINEAR)
    assert call_of(layer).kernel == "conv1x1_bf16"
    assert isinstance(layer.meta["val"].shape[0], torch.SymInt)
    assert [tuple(result.graph_module(noise(n, 16))[0].shape) for n in (1, 5)] == [(1, 8), (5, 8)]


def test_a_node_without_a_decision_is_left_alone() -> None:
    result = run_pass(PackLinear({}), lambda: nn.Linear(16, 8), noise(8, 16), before=PREPARE)
    assert (result.modified, result.skipped) == (False, ())


def test_what_the_plan_refuses_is_skipped_with_its_reason() -> None:
    from dataclasses import replace

    graph_module = _prepared(lambda: nn.Linear(16, 8), noise(8, 16))
    (decision,) = plan_for("graviton3", graph_module).decisions
    refused = replace(decision, kernel="aten_linear", reason="an empty product")
    result = PackLinear({refused.node: refused})(graph_module)
    assert [(s.node, s.reason) for s in result.skipped] == [(refused.node, "an empty product")]
