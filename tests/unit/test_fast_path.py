"""PyTorch's fused transformer operations, and what is said where a backend plans nothing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.dynamo.process import PROCESS
from armopt.errors import ArmoptWarning
from tests.sampling import sampled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 7, 16, generator=GENERATOR)
PADDED = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [5]])


def encoder(layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
@pytest.mark.parametrize("named", [{}, {"src_key_padding_mask": PADDED}])
@pytest.mark.parametrize("way", sampled(["compile", "backend"], 2))
def test_an_encoder_is_planned_layer_by_layer(options: Any, named: Any, way: str) -> None:
    model = encoder(**options)
    made: Any = armopt.compile(model, target="graviton2")
    if way == "backend":
        made = torch.compile(model, backend="armopt", options={"target": "graviton2"})
    with torch.no_grad():
        expected = model(X, **named)
        found = made(X, **named)
    assert torch.backends.mha.get_fastpath_enabled()
    explained = armopt.explain(model)
    assert len(explained.layers) == 8  # qkv, out, and two of the feed-forward: twice
    assert explained.left_alone == ()
    kept = ~PADDED if named else torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=0)  # FP32 sums in another order


class Padded(nn.Module):
    """An encoder among others, given only what keys are padding."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, norm), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))  # type: ignore[no-any-return]


#: Of the last two PyTorch makes no nested tensor: padding is not at the end of all rows.
MASKS = [
    torch.arange(7) >= torch.tensor([[7], [5]]),
    torch.arange(7) >= torch.tensor([[0], [7]]),
    torch.arange(7) < torch.tensor([[0], [2]]),
    torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 1]]).bool(),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(16, bias=True)], ids=["bare", "norm"])
@pytest.mark.parametrize("way", ["compile", "bundle"])
def test_padded_rows_are_those_of_eager_mode(norm: nn.Module | None, way: str, tmp_path: Path) -> None:
    model = Padded(norm).eval()
    if norm is not None:
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    before = [dict(part.__dict__) for part in model.modules()]
    if way == "compile":
        made: Any = armopt.compile(model, (X, MASKS[0]), target="graviton2")
    else:
        result = armopt.optimize(model, (X, MASKS[0]), target="graviton2", output=tmp_path / "bundle")
        assert result.passed
        made = armopt.load(tmp_path / "bundle")
    assert [part.__dict__.keys() for part in model.modules()] == [each.keys() for each in before]
    for mask in MASKS:
        with torch.no_grad():
            torch.testing.assert_close(made(X, mask), model(X, mask), atol=1e-4, rtol=0)  # FP32 sums in another order


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_compiled_encoder_can_be_copied() -> None:
    model = Padded().eval()
    made = copy.deepcopy(armopt.compile(model, target="graviton2"))
    assert made.encoder.forward.original.args[0] is made.encoder  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(made(X, MASKS[0]), model(X, MASKS[0]), atol=1e-4, rtol=0)


def test_the_backend_says_that_padded_rows_are_others() -> None:
    (message,) = said(Padded(), X, MASKS[0])
    assert "nn.TransformerEncoder gives values in padded rows" in message
    assert "armopt.compile" in message


@pytest.mark.parametrize("mask", [PADDED | True, torch.eye(7).bool()[None].expand(8, 7, 7) | True])
def test_rows_in_which_nothing_takes_part_are_nan_as_in_the_operation(mask: Tensor) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    named = {"src_key_padding_mask" if mask.dim() == 2 else "src_mask": mask}
    with torch.no_grad():
        expected = layer(X, **named)
        found = torch.compile(layer, backend="armopt", options={"target": "graviton2"})(X, **named)
    assert expected.isnan().all()
    assert found.isnan().all()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_alone_and_its_weights(need_weights: bool, average: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    run = torch.compile(model, backend="armopt", options={"target": "graviton2"})
    asked = {"key_padding_mask": PADDED, "need_weights": need_weights, "average_attn_weights": average}
    with torch.no_grad():
        expected, found = model(X, X, X, **asked), run(X, X, X, **asked)
    assert len(armopt.explain(model).layers) == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Pair(nn.Module):
    """A product that armopt has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(X), 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.reshape(len(X), -1, 16), self.weight)


def said(model: nn.Module, *inputs: Tensor, times: int = 2) -> list[str]:
    """Warnings of armopt's backend over some calls."""
    PROCESS.said.clear()
    run = torch.compile(model.eval(), backend="armopt", options={"target": "graviton3"})
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(times):
            run(*inputs)
    return [str(each.message) for each in found if issubclass(each.category, ArmoptWarning)]


def test_a_graph_in_which_nothing_is_planned_is_said_once() -> None:
    (message,) = said(Pair(), X)
    assert "nothing was planned" in message
    assert "bmm" in message


def test_so_is_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (message,) = said(nn.Linear(16, 16), X)
    assert "outside of torch.autocast" in message


def test_where_something_is_planned_nothing_is_said() -> None:
    assert said(nn.Sequential(nn.Linear(16, 16), Pair()), X) == []
