"""Products that are no nn.Linear, in bundles and in torch.compile: in BF16 as those are, and right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.bundle import reader

THRESHOLD = "threshold=1"  # a packed kernel whatever the size: models here are small


class Function(nn.Module):
    """A function of the inputs and of weights by number."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        scaled = (torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(each) for each in scaled)

    def forward(self, x: Tensor) -> Any:
        # not *self.weights, which divides the graph under Dynamo before torch 2.11
        return self.function(x, *[self.weights[i] for i in range(len(self.weights))])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def check_bundle(model: nn.Module, x: Tensor, folder: Path, *, batch: tuple[int, ...] = ()) -> None:
    """A bundle gives the module's numbers, with all its weights in BF16 and nothing of it said to be left."""
    model = model.eval()
    made = armopt.optimize(
        model, (x,), output=folder / "bundle", target="graviton3", policy=THRESHOLD, batch=batch
    ).require()
    assert [row for each in made.manifest.not_in_bf16 for row in each.products] == []
    assert made.manifest.accuracy.cosine > 0.9999
    programs = reader.read(folder / "bundle").programs
    weights = {name: t for each in programs for name, t in each.graph_module.named_buffers() if t.dim() > 1}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    parameters = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sum(tensor.numel() for tensor in weights.values()) <= parameters
    _check_call(model, armopt.load(folder / "bundle"), x)


def check_compiled(model: nn.Module, x: Tensor) -> None:
    """armopt.compile gives the module's numbers and leaves nothing."""
    model = model.eval()
    compiled = armopt.compile(model, (x,), target="graviton3", policy=THRESHOLD)
    _check_call(model, compiled, x)
    said = armopt.explain(compiled)
    assert [row for each in said.not_in_bf16 for row in each.products] == []


def _check_call(model: nn.Module, other: Callable[..., Tensor], x: Tensor) -> None:
    with torch.no_grad():
        expected, found = model(x), other(x)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """As Flax, T5X and Keras write it."""
    query, key, value = (torch.einsum("bsd,dhk->bshk", x, w) for w in (q, k, v))
    scores = torch.einsum("bqhk,bthk->bhqt", query, key).softmax(-1)
    return torch.einsum("bshk,hkd->bsd", torch.einsum("bhqt,bthk->bqhk", scores, value), o)


CONTRACTIONS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "attention": (
        lambda: Function(attention, *[(32, 2, 16)] * 3, (2, 16, 32)),
        noise(2, 5, 32),
    ),
    "einsums": (
        lambda: Function(
            lambda x, a, b, c: torch.einsum(
                "dn,ed->en", torch.einsum("bd,de->be", torch.einsum("bd,ed->be", x, a), b), c
            ),
            (16, 32),
            (16, 16),
            (8, 4),
        ),
        noise(4, 32),
    ),
    "batches": (
        lambda: Function(
            lambda x, a, b, c: torch.baddbmm(c, torch.bmm(x.expand(2, 3, 512), a), b),
            (2, 512, 520),
            (2, 520, 512),
            (512,),
        ),
        noise(3, 512),
    ),
    "tensordots": (
        lambda: Function(
            lambda x, a, b: torch.tensordot(torch.tensordot(x, a, 1), b, ([1, 3], [0, 1])), (32, 2, 16), (5, 16, 8)
        ),
        noise(3, 5, 32),
    ),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_with_a_weight_are_linears(name: str, tmp_path: Path) -> None:
    build, x = CONTRACTIONS[name]
    check_bundle(build(), x, tmp_path)


def test_contractions_at_several_batch_sizes(tmp_path: Path) -> None:
    build, x = CONTRACTIONS["attention"]
    check_bundle(build(), x, tmp_path, batch=(1, 4))


class Pair(nn.Module):
    """A bilinear layer on two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(16, 24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., :16], x[..., 16:])


def test_a_bilinear_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_bundle(Pair(), noise(2, 3, 40), tmp_path)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["attention", "batches", "bilinear"])
def test_contractions_are_linears_under_compile(name: str) -> None:
    build, x = {**CONTRACTIONS, "bilinear": (Pair, noise(2, 3, 40))}[name]
    torch.manual_seed(0)
    check_compiled(build(), x)
