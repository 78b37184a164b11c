from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Case, Contract, Forward, Forward2, noise, seeded, until
from torch import Tensor, fx, nn

from armopt import capture
from armopt.passes import Pass, pipeline
from armopt.passes.fuse_attention import FuseAttention

ATTENTION = "aten.scaled_dot_product_attention.default"
Scores = Callable[[Forward, Tensor, Tensor], Tensor]


def _attention(scores: Scores, dim: int = -1, also: bool = False, **parts: Tensor) -> Callable[[], Forward]:
    """Attention of two heads written out, with scores of query and key as given."""

    def forward(s: Forward, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (s.q, s.k, s.v))
        probabilities = scores(s, q, k).softmax(dim)
        y = (probabilities @ v).transpose(1, 2).flatten(2)
        return (y, probabilities) if also else y

    return lambda: Forward(forward, **{name: nn.Linear(8, 8) for name in "qkv"}, **parts)


def _masked_by_an_input() -> Forward2:
    def forward(s: Forward2, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (s.q, s.k, s.v))
        return ((q @ k.transpose(-2, -1) + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)

    return Forward2(forward, **{name: nn.Linear(8, 8) for name in "qkv"})


def _windows(s: Forward, q: Tensor, k: Tensor) -> Tensor:
    """Two windows of an image, each with its own mask, as Swin has them."""
    scores = (q * 0.3) @ k.transpose(-2, -1) + s.bias
    return (scores.view(scores.shape[0] // 2, 2, 2, 5, 5) + s.mask[:, None][None]).view(-1, 2, 5, 5)


class TestFuseAttention(Contract):
    folder = "fuse_attention"
    tolerance = 2**-19  # a softmax over five scores, by another formula

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, until(FuseAttention))[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return FuseAttention()

    cases = (
        Case(
            "plain",
            _attention(lambda s, q, k: q @ k.transpose(-2, -1)),
            (noise(2, 5, 8),),
            ops={ATTENTION: 1},
            absent=("aten.matmul.default", "aten.softmax.int"),
            rewritten=1,
        ),
        Case(
            "scaled_and_masked",
            _attention(lambda s, q, k: s.mask + q @ k.permute(0, 1, 3, 2) / 2.0, mask=noise(2, 1, 1, 5)),
            (noise(2, 5, 8),),
            ops={ATTENTION: 1},
            absent=("aten.matmul.default", "aten.div.Tensor"),
            rewritten=1,
        ),
        Case(
            "windows",
            _attention(_windows, bias=noise(1, 2, 5, 5), mask=noise(2, 5, 5)),
            (noise(2, 5, 8),),
            ops={ATTENTION: 1, "aten.mul.Tensor": 0},
            rewritten=1,
        ),
        Case(
            "masked_by_an_input",
            _masked_by_an_input,
            (noise(2, 5, 8), noise(2, 1, 5, 5)),
            ops={ATTENTION: 1, "aten.amax.default": 1},
            rewritten=1,
        ),
        Case(
            "causal",
            _attention(lambda s, q, k: q @ k.transpose(-2, -1) + s.mask, mask=torch.full((5, 5), -math.inf).triu(1)),
            (noise(2, 5, 8),),
            ops={ATTENTION: 1, "aten.amax.default": 0},
            rewritten=1,
        ),
        Case(
            "windows_dynamic_batch",
            _attention(
                lambda s, q, k: ((q @ k.transpose(-2, -1)).view(q.shape[0], 1, 2, 5, 5) + s.mask).view(
                    q.shape[0], 2, 5, 5
                ),
                mask=noise(1, 1, 1, 5, 5),
            ),
            (noise(2, 5, 8),),
            batch=(2, 6),
            ops={ATTENTION: 1},
            rewritten=1,
        ),
        Case(
            "probabilities_used_elsewhere",
            _attention(lambda s, q, k: q @ k.transpose(-2, -1), also=True),
            (noise(2, 5, 8),),
            ops={ATTENTION: 0},
            skips=("its probabilities are not along the keys, or used elsewhere",),
        ),
        Case(
            "softmax_over_queries",
            _attention(lambda s, q, k: q @ k.transpose(-2, -1), dim=-2),
            (noise(2, 5, 8),),
            skips=("its probabilities are not along the keys, or used elsewhere",),
        ),
        Case(
            "clamped",
            _attention(lambda s, q, k: (q @ k.transpose(-2, -1)).clamp(-1, 1)),
            (noise(2, 5, 8),),
            skips=("aten.clamp.default stands between the product and the softmax",),
        ),
        Case(
            "scaled_mask",
            _attention(lambda s, q, k: (q @ k.transpose(-2, -1) + s.mask) * 0.5, mask=noise(5, 5)),
            (noise(2, 5, 8),),
            skips=("aten.add.Tensor stands between the product and the softmax",),
        ),
        Case(
            "three_dimensions",
            lambda: Forward(lambda s, x: (x @ x.transpose(1, 2)).softmax(-1) @ x),
            (noise(2, 5, 8),),
            skips=("not of four dimensions",),
        ),
        Case(
            "product_in_bf16",
            _attention(lambda s, q, k: (q.bfloat16() @ k.bfloat16().transpose(-2, -1)).float()),
            (noise(2, 5, 8),),
            skips=("aten._to_copy.default stands between the product and the softmax",),
        ),
        Case(
            "one_key_for_all_heads",
            _attention(lambda s, q, k: q @ k[:, :1].transpose(-2, -1)),
            (noise(2, 5, 8),),
            skips=("query, key and value are not FP32, or of other images or heads",),
        ),
    )


@pytest.mark.parametrize("hidden", [-math.inf, math.nan, math.inf])
def test_a_row_without_a_key_is_nan(hidden: float) -> None:
    """As its softmax is; a mask that hides nothing, or some keys, changes nothing."""
    model, x, mask = seeded(_masked_by_an_input), noise(2, 5, 8), torch.zeros(2, 1, 5, 5)
    captured = capture.module(model, (x, mask), batch=(), source="masked")
    fused = pipeline.run(captured.graph_module, (*until(FuseAttention), FuseAttention()))[0]
    mask[0, 0, 3], mask[1, 0, :, 2] = hidden, -math.inf
    (found,), expected = fused(x, mask), model(x, mask)
    assert expected.isnan().flatten(2).any(2).sum() == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.linear, self.mask = nn.Linear(4, 4), nn.Buffer(mask)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return nn.functional.scaled_dot_product_attention(y, y, y, self.mask)


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (torch.ones(1, 1, 5, 5, dtype=torch.bool), False),
        (torch.zeros(5, 5), False),
        (torch.ones(5, 5, dtype=torch.bool).tril(), True),
        (torch.full((5, 5), 0.5), True),
    ],
)
def test_a_constant_mask_that_changes_nothing_is_left_out(mask: Tensor, kept: bool) -> None:
    x = noise(2, 2, 5, 4)
    captured = capture.module(_Masked(mask).eval(), (x,), batch=(), source="masked")
    fused = pipeline.run(captured.graph_module, (*until(FuseAttention), FuseAttention()))[0]
    (node,) = fused.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert (node.args[3] is not None) == kept
    torch.testing.assert_close(fused(x)[0], captured.graph_module(x)[0], rtol=1e-5, atol=1e-6)
