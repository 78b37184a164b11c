from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from armopt import capture, passes
from armopt.ir import graph as g
from armopt.ir.records import Site
from armopt.kernels import sites
from armopt.passes import pipeline


def find(model: nn.Module, *shape: int, batch: tuple[int, ...] = (), at: int = 0) -> tuple[Site, ...]:
    captured = capture.module(model.eval(), (torch.zeros(shape),), batch=batch)
    prepared, _ = pipeline.run(g.copy(captured.graph_module), passes.PREPARE)
    return sites.find(prepared, captured.values({"batch": at}) if at else {})


def test_a_linear() -> None:
    (site,) = find(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), 2, 5, 16)
    assert (site.op, site.m, site.k, site.n, site.shape, site.weight) == ("linear", 10, 16, 8, (2, 5, 16), (8, 16))
    assert (site.post_op, site.weight_key, site.groups) == ("relu", "_0_weight", 1)


def test_a_vector() -> None:
    (site,) = find(nn.Linear(16, 8), 16)
    assert (site.m, site.shape) == (1, (16,))


def test_a_dynamic_batch_at_a_bucket() -> None:
    (site,) = find(nn.Linear(16, 8), 2, 16, batch=(1, 8), at=32)
    assert (site.m, site.shape) == (32, (32, 16))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), {"m": 32, "k": 36, "n": 6, "stride": (2, 2)}),
        (nn.Conv1d(4, 6, 3, dilation=2), (1, 4, 9), {"m": 5, "k": 12, "n": 6, "dilation": (2,)}),
        (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 4, 4), {"m": 24, "k": 12, "n": 3}),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), {"m": 9, "k": 9, "n": 8, "groups": 4}),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2),
            (1, 4, 5, 5),
            {"m": 169, "k": 36, "n": 6, "transposed": True},
        ),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), {"m": 49, "k": 18, "n": 6, "groups": 2}),
    ],
)
def test_convolutions(model: nn.Module, shape: tuple[int, ...], expected: dict[str, Any]) -> None:
    (site,) = find(model, *shape)
    assert {name: getattr(site, name) for name in expected} == expected
    assert site.m * site.n == model(torch.zeros(shape)).numel()


def test_layers_come_in_order_and_share_their_key() -> None:
    conv = nn.Conv2d(3, 3, 1)
    found = find(nn.Sequential(conv, nn.Conv2d(3, 3, 3), conv), 1, 3, 8, 8)
    assert [site.weight_key for site in found] == ["_0_weight", "_1_weight", "_0_weight"]
    assert len({site.node for site in found}) == 3


class _Attention(nn.Module):
    def __init__(self, *, cached: bool) -> None:
        super().__init__()
        self.qkv, self.cached = nn.Linear(16, 48), cached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.cached:
            k = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_attention_is_counted_for_the_layer_of_its_query() -> None:
    (site,) = find(_Attention(cached=False), 3, 5, 16)
    assert site.attended == (6, 6 * 25, 6 * 25 * 16)
    assert not any(other.attended[0] for other in find(nn.Linear(16, 8), 2, 16))


def test_attention_to_a_key_of_no_layer_is_not() -> None:
    """A key from the cache is in FP32, so all of it is."""
    (site,) = find(_Attention(cached=True), 3, 5, 16)
    assert site.attended == (0, 0, 0)
