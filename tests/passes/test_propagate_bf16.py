from __future__ import annotations

import pytest
import torch
import zoo_models
from harness import Case, Contract, Forward, Forward2, check_metadata, noise, plan_for, run_pass, storages
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from armopt import passes
from armopt.passes import PREPARE, Pass, pipeline
from armopt.passes.propagate_bf16 import PropagateBf16

CAST = "aten._to_copy.default"


def lowered(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Everything in front of the pass; each layer in BF16 that can be."""
    graph_module, _ = pipeline.run(graph_module, PREPARE)
    plan = plan_for("graviton3", graph_module, rows=1)
    return pipeline.run(graph_module, passes.lower(plan, {})[:-1])[0]


def _between(function: object) -> nn.Module:
    return Forward(lambda s, x: s.b(function(s.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3))  # type: ignore[operator]


def _projections(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(8, 8) for name in names}


def _attend(*qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TestPropagateBf16(Contract):
    folder = "propagate_bf16"
    # Exact for casts that cancel and functions that move values. Gelu, silu and hardswish round once more: 2^-9 of a
    # value, which the next layer averages.
    tolerance = 2**-7

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return lowered(graph_module)

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return PropagateBf16()

    cases = (
        Case(
            "chain", lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (noise(4, 8),), ops={CAST: 2}
        ),
        Case(
            "experts",
            lambda: Forward2(
                lambda s, x, ids: torch.bmm(torch.bmm(x.unsqueeze(1), s.a[ids]).tanh(), s.b[ids]),
                a=nn.Parameter(noise(2, 8, 6)),
                b=nn.Parameter(noise(2, 6, 4)),
            ),
            (noise(3, 8), torch.tensor([1, 0, 1])),
            ops={CAST: 4, "armopt.split_rows.default": 2, "armopt.join_rows.default": 2},
        ),
        Case("pool", lambda: _between(lambda y: F.max_pool2d(y, 2)), (noise(1, 3, 12, 12),), ops={CAST: 2}),
        Case("residual", zoo_models.residual, (noise(1, 16, 12, 12),), ops={CAST: 2}),
        Case(
            "exact_chain",
            lambda: Forward(
                lambda s, x: s.b(s.a(x).transpose(1, 2).reshape(4, 8)[:, :4]), a=nn.Linear(4, 8), b=nn.Linear(4, 3)
            ),
            (noise(2, 2, 4),),
            ops={CAST: 2},
        ),
        Case(
            "rounds_once",
            lambda: Forward(lambda s, x: s.b(F.gelu((s.a(x) + x).relu())), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
            (noise(2, 4),),
            ops={CAST: 2},
        ),
        Case(
            "also_read_in_fp32",
            lambda: Forward(
                lambda s, x: (s.b(y := s.a(x).reshape(2, 8)), y.sin()), a=nn.Linear(4, 4), b=nn.Linear(8, 3)
            ),
            (noise(2, 2, 4),),
            ops={CAST: 4},
            skips=("its result is read in FP32",),
        ),
        Case(
            "softmax_stays_in_fp32",
            lambda: Forward(lambda s, x: s.b(s.a(x).softmax(-1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)),
            (noise(2, 4),),
            ops={CAST: 4},
            rewritten=0,
        ),
        Case(
            "one_input_for_two",
            lambda: Forward(
                lambda s, x: s.a(x).relu().sin() + s.b(x).relu().cos(), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
            ),
            (noise(2, 4),),
            ops={CAST: 3},
            rewritten=1,
        ),
        Case(
            "attention",
            lambda: Forward(lambda s, x: s.out(_attend(s.q(x), s.k(x), s.v(x))), **_projections("q", "k", "v", "out")),
            (noise(2, 5, 8),),
            ops={CAST: 2},
        ),
        Case(
            "attention_to_a_key_in_fp32",
            lambda: Forward(lambda s, x: s.out(_attend(s.q(x), x.sin(), s.v(x))), **_projections("q", "v", "out")),
            (noise(2, 5, 8),),
            skips=("another operand is in FP32",),
        ),
        Case("nothing_in_bf16", lambda: nn.Conv2d(4, 4, 3, groups=4), (noise(1, 4, 5, 5),), ops={CAST: 0}, rewritten=0),
        Case(
            "casts_of_the_model",
            lambda: Forward(lambda s, x: s.a(x.bfloat16().float()).bfloat16().float(), a=nn.Linear(4, 4)),
            (noise(2, 4),),
        ),
    )


EXACT = {
    "relu": F.relu,
    "hardtanh": lambda y: F.hardtanh(y, -0.3, 0.7),
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "pad": lambda y: F.pad(y, (1, 1), value=0.1),
    "max_pool": lambda y: F.max_pool2d(y, 3, 2, 1),
    "slice": lambda y: y[:, :, 1:],
    "squeeze": lambda y: y.unsqueeze(0).squeeze(0),
    "channel_shuffle": lambda y: F.channel_shuffle(y, 2),
    "expand": lambda y: y[:, :, :1].expand(-1, -1, 6, -1),
}


@pytest.mark.parametrize("name", EXACT)
def test_functions_that_move_values_are_exact(name: str) -> None:
    """The same bits with and without the pass: silu in front keeps the function from being fused."""
    x = noise(1, 3, 10, 10)
    found = []

    def step(graph_module: fx.GraphModule) -> object:
        found.append(graph_module(x)[0])
        return PropagateBf16()(graph_module)

    model = lambda: _between(lambda y: EXACT[name](F.silu(y)))  # noqa: E731
    result = run_pass(step, model, x, before=(_Lower(),))  # type: ignore[arg-type]
    assert result.modified
    assert torch.equal(result.graph_module(x)[0], found[0])
    check_metadata(result.graph_module, (x,))


class _Lower:
    def __call__(self, graph_module: fx.GraphModule) -> object:
        from armopt.ir.records import PassResult

        return PassResult(lowered(graph_module), True)


def test_a_function_read_in_fp32_is_refused() -> None:
    """Its FP32 value is more than its BF16 one; the pass leaves it in FP32."""

    def model():
        return Forward(lambda s, x: (s.b(y := F.silu(s.a(x).reshape(2, 8))), y), a=nn.Linear(4, 4), b=nn.Linear(8, 3))

    result = run_pass(PropagateBf16(), model, noise(2, 2, 4), before=(_Lower(),))
    silu = next(node for node in result.graph_module.graph.nodes if "silu" in str(node.target))
    assert silu.meta["val"].dtype == torch.float32
    assert [str(each.reason) for each in result.skipped] == ["its result is read in FP32"]


class TestAllPasses:
    """All passes together keep what is shared."""

    @pytest.mark.parametrize(
        ("model", "x", "kinds"),
        [
            (zoo_models.shared_weights, noise(2, 64), 3),
            (
                lambda: Forward(lambda s, x: s.conv(s.conv(x)), conv=nn.Conv2d(3, 3, 3, bias=False)),
                noise(1, 3, 8, 8),
                1,
            ),
            (
                lambda: Forward(lambda s, x: (s.t(x.long()), s.t(x.long()) @ s.t.weight.T), t=nn.Embedding(9, 4)),
                torch.ones(2),
                2,
            ),
        ],
        ids=["linear", "conv", "tied embedding: FP32 for the table, BF16 for the product"],
    )
    def test_shared_weights_stay_shared(self, model: object, x: torch.Tensor, kinds: int) -> None:
        result = run_pass(PropagateBf16(), model, x, before=(_Lower(),))  # type: ignore[arg-type]
        assert storages(result.graph_module) == kinds == len(list(result.graph_module.buffers()))
