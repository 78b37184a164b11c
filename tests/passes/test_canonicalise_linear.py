from __future__ import annotations

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, Forward2, by_hand, noise, run_pass, storages, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.canonicalise_linear import CanonicaliseLinear

aten = torch.ops.aten
BEFORE = until(CanonicaliseLinear)
LINEAR = "armopt.linear.default"


class TestCanonicaliseLinear(Contract):
    folder = "canonicalise_linear"
    # The same FP32 products; BLAS may sum a transposed weight in another order: a few units of 2^-24 of the largest.
    tolerance = 1e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return CanonicaliseLinear()

    cases = (
        Case(
            "linear",
            lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3, bias=False)),
            (noise(2, 6),),
            ops={LINEAR: 2},
            absent=("aten.linear.default",),
            rewritten=2,
        ),
        Case("linear_3d", lambda: nn.Linear(6, 8), (noise(2, 5, 6),), ops={LINEAR: 1}),
        Case("linear_1d", lambda: nn.Linear(6, 8), (noise(6),), ops={LINEAR: 1}),
        Case("linear_empty_batch", lambda: nn.Linear(6, 8), (noise(0, 6),), ops={LINEAR: 1}),
        Case(
            "addmm_gpt2",
            lambda: Forward(
                lambda s, x: torch.addmm(s.bias, x.view(-1, x.size(-1)), s.weight).view(2, 3, 8),
                weight=nn.Parameter(noise(6, 8)),
                bias=nn.Parameter(noise(8)),
            ),
            (noise(2, 3, 6),),
            ops={LINEAR: 1},
            absent=("aten.addmm.default",),
        ),
        Case(
            "mm_and_matmul",
            lambda: Forward(
                lambda s, x: torch.mm(x, s.a) @ s.b, a=nn.Parameter(noise(6, 8)), b=nn.Parameter(noise(8, 3))
            ),
            (noise(2, 6),),
            ops={LINEAR: 2},
            absent=("aten.mm.default", "aten.matmul.default"),
        ),
        Case(
            "matmul_3d",
            lambda: Forward(lambda s, x: x @ s.w, w=nn.Parameter(noise(6, 8))),
            (noise(2, 5, 6),),
            ops={LINEAR: 1},
        ),
        Case(
            "matmul_1d",
            lambda: Forward(lambda s, x: x @ s.w, w=nn.Parameter(noise(6, 8))),
            (noise(6),),
            ops={LINEAR: 1},
        ),
        Case(
            "tied_embedding",
            lambda: Forward(lambda s, x: s.table(x.long()) @ s.table.weight.T, table=nn.Embedding(9, 4)),
            (torch.tensor([[1.0, 3.0, 8.0]]),),
            ops={LINEAR: 1, "aten.embedding.default": 1},
        ),
        Case("shared_layer", zoo_models.shared_weights, (noise(2, 64),), ops={LINEAR: 3}),
        Case(
            "dynamic_batch",
            lambda: Forward(lambda s, x: s.fc(x) @ s.w, fc=nn.Linear(4, 5), w=nn.Parameter(noise(5, 3))),
            (noise(2, 4),),
            batch=(1, 4),
            ops={LINEAR: 2},
        ),
        Case("matmul_forms", zoo_models.matmul_forms, (noise(2, 3, 32),), ops={LINEAR: 4}),
        Case(
            "product_of_activations",
            lambda: Forward(lambda s, x: x @ x.transpose(1, 2)),
            (noise(2, 3, 4),),
            skips=("the weight is not a constant",),
            rewritten=0,
        ),
        Case(
            "weight_on_the_left",
            lambda: Forward(lambda s, x: s.w @ x, w=nn.Parameter(noise(3, 4))),
            (noise(4, 5),),
            ops={LINEAR: 1},
            absent=("aten.matmul.default",),
            rewritten=1,
        ),
        Case(
            "batched_weight",
            lambda: Forward(lambda s, x: x @ s.w, w=nn.Parameter(noise(2, 4, 5))),
            (noise(2, 3, 4),),
            skips=("the weight has 3 dimensions",),
            rewritten=0,
        ),
        Case(
            "vector_weight",
            lambda: Forward(lambda s, x: x @ s.w, w=nn.Parameter(noise(4))),
            (noise(3, 4),),
            skips=("the weight has 1 dimensions",),
            rewritten=0,
        ),
        Case(
            "double",
            lambda: Forward(lambda s, x: (x.double() @ s.w).float(), w=noise(4, 5).double()),
            (noise(3, 4),),
            skips=("works on float64 and float64, not FP32",),
            rewritten=0,
        ),
        Case(
            "integers",
            lambda: Forward(lambda s, x: (x.long() @ s.w).float(), w=torch.arange(20).reshape(4, 5)),
            (noise(3, 4) * 4,),
            skips=("works on int64 and int64, not FP32",),
            rewritten=0,
        ),
        Case(
            "no_features",
            lambda: Forward(lambda s, x: x @ s.w + 1, w=nn.Parameter(torch.zeros(0, 5))),
            (noise(3, 0),),
            skips=("an empty or scalar operand",),
            rewritten=0,
        ),
        Case(
            "bias_of_another_shape",
            lambda: Forward(
                lambda s, x: torch.addmm(s.b, x, s.w), b=nn.Parameter(noise(3, 5)), w=nn.Parameter(noise(4, 5))
            ),
            (noise(3, 4),),
            skips=("the bias has shape (3, 5), not one FP32 value per output feature",),
            rewritten=0,
        ),
        Case(
            "scalar_bias",
            lambda: Forward(
                lambda s, x: torch.addmm(s.b, x, s.w), b=nn.Parameter(noise(1)), w=nn.Parameter(noise(4, 5))
            ),
            (noise(3, 4),),
            skips=("the bias has shape (1,), not one FP32 value per output feature",),
            rewritten=0,
        ),
        Case(
            "bias_from_the_input",
            lambda: Forward(lambda s, x: torch.addmm(x[0], x, s.w), w=nn.Parameter(noise(4, 4))),
            (noise(3, 4),),
            skips=("the bias is not a constant",),
            rewritten=0,
        ),
        Case(
            "scaled_addmm",
            lambda: Forward(
                lambda s, x: torch.addmm(s.b, x, s.w, alpha=0.5) + torch.addmm(s.b, x, s.w, beta=2),
                b=nn.Parameter(noise(5)),
                w=nn.Parameter(noise(4, 5)),
            ),
            (noise(3, 4),),
            ops={LINEAR: 2},
            absent=("aten.addmm.default",),
            rewritten=2,
        ),
    )


def test_tied_weights_share_one_piece_of_memory() -> None:
    model = lambda: Forward(lambda s, x: s.table(x.long()) @ s.table.weight.T, table=nn.Embedding(9, 4))  # noqa: E731
    result = run_pass(CanonicaliseLinear(), model, torch.tensor([1.0, 8.0]), before=BEFORE)
    assert storages(result.graph_module) == 1
    assert len(list(result.graph_module.buffers())) == 1


def test_a_weight_used_in_both_directions_is_transposed_once() -> None:
    model = lambda: Forward(lambda s, x: (x @ s.w).relu() @ s.w + x @ s.w, w=nn.Parameter(noise(5, 5)))  # noqa: E731
    result = run_pass(CanonicaliseLinear(), model, noise(3, 5), before=BEFORE)
    assert len(result.rewritten) == 3
    assert storages(result.graph_module) == 1


def test_a_layer_used_twice_keeps_one_weight() -> None:
    result = run_pass(CanonicaliseLinear(), zoo_models.shared_weights, noise(2, 64), before=BEFORE)
    assert len(result.rewritten) == 3
    assert storages(result.graph_module) == 3  # one weight, two biases


def test_a_bias_of_another_dtype_is_refused() -> None:
    """torch.export never emits it: ATen refuses it at run time."""
    graph_module = by_hand(
        noise(2, 4),
        constants={"weight": noise(5, 4), "bias": noise(5)},
        build=lambda call, x, weight, bias: call(aten.linear.default, x, weight, bias),
    )
    graph_module.bias = graph_module.bias.double()
    result = CanonicaliseLinear()(graph_module)
    assert [s.reason for s in result.skipped] == ["the bias has shape (5,), not one FP32 value per output feature"]


def test_an_activation_of_another_dtype_is_refused() -> None:
    graph_module = by_hand(
        noise(2, 4),
        constants={"weight": noise(5, 4)},
        build=lambda call, x, weight: call(aten.linear.default, x, weight),
    )
    next(iter(graph_module.graph.nodes)).meta["val"] = next(iter(graph_module.graph.nodes)).meta["val"].half()
    result = CanonicaliseLinear()(graph_module)
    assert [s.reason for s in result.skipped] == ["works on float16 and float32, not FP32"]


def test_two_inputs_that_multiply_each_other_stay() -> None:
    result = run_pass(CanonicaliseLinear(), lambda: Forward2(lambda s, x, y: torch.mm(x, y)), noise(2, 3), noise(3, 2))
    assert [(s.node, s.reason) for s in result.skipped] == [("mm", "the weight is not a constant")]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_given_as_input_is_refused(name: str) -> None:
    parts = {"weight": nn.Parameter(noise(3, 4)), "bias": nn.Parameter(noise(3))}
    del parts[name]
    given = {"weight": noise(3, 4), "bias": noise(3)}[name]

    def function(s: Forward, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, *[y if each == name else getattr(s, each) for each in ("weight", "bias")])

    result = run_pass(CanonicaliseLinear(), lambda: Forward2(function, **parts), noise(2, 4), given)
    assert [s.reason for s in result.skipped] == [f"the {name} is not a constant"]
