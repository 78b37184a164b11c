"""Models of volumes and of sequences as bundles: right, and in BF16 where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planning import plan
from torch import Tensor, nn

import armopt
from armopt.ir.records import Remainder
from armopt.models import references, torchvision_inputs
from armopt.plan import remainder


def left(model: nn.Module, *inputs: Tensor) -> Remainder:
    """What is not in BF16 on graviton3."""
    _, planned = plan(model.eval(), *inputs, target="graviton3")
    return remainder.find(planned.plans[0])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


class Clip(nn.Module):
    """A stem, a residual block of space and time, a block of volumes, patches, and a head: small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 32, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(32))
        self.space = nn.Conv3d(32, 48, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(48)
        self.time = nn.Conv3d(48, 32, (3, 1, 1), padding=(1, 0, 0))
        self.volume = nn.Sequential(nn.Conv3d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm3d(64), nn.ReLU())
        self.patches = nn.Conv3d(64, 64, (1, 2, 2), (1, 2, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.time(self.norm(self.space(x)).relu()) + x).relu()
        y: Tensor = self.head(self.patches(self.volume(x)).mean((2, 3, 4)))
        return y


def test_a_model_of_volumes_is_in_bf16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Clip().eval(), torch.randn(2, 3, 4, 32, 32)
    found = left(model, x)
    assert found.products == ()
    armopt.optimize(model, (x,), output=tmp_path / "clip", target="graviton3", batch=(1, 2))
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        loaded = armopt.load(tmp_path / "clip")
    with torch.no_grad():
        for batch in (x, x[:1]):
            y, expected = loaded(batch), model(batch)
            assert y.stride() == expected.stride()
            assert cosine(y, expected) > 0.9999


class Sequences(nn.Module):
    """An LSTM or a GRU of two layers and directions, which gets its state."""

    def __init__(self, layer: nn.Module, states: int) -> None:
        super().__init__()
        self.layer = layer
        self.states = states

    def forward(self, x: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        y, after = self.layer(x, tuple(states.unbind()) if self.states == 2 else states[0])
        return (y, *after) if self.states == 2 else (y, after)


@pytest.mark.parametrize(("kind", "states"), [(nn.LSTM, 2), (nn.GRU, 1)])
def test_a_recurrent_layer_multiplies_its_input_in_bf16(kind: Any, states: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sequences(kind(64, 64, 2, bidirectional=True, batch_first=True), states).eval()
    x, before = torch.randn(4, 16, 64), torch.randn(states, 4, 4, 64)
    found = left(model, x, before)
    assert {row.op for row in found.products} == {"armopt.recurrence"}
    assert all("each step needs the one before" in row.reason for row in found.products)
    # of two layers of 64 and 128 inputs and 64 states
    assert found.share(sum(row.multiplications for row in found.products)) == pytest.approx(0.4)
    armopt.optimize(model, (x, before), output=tmp_path / "bundle", target="graviton3")
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        loaded = armopt.load(tmp_path / "bundle")
    with torch.no_grad():
        for found_output, expected in zip(loaded(x, before), model(x, before), strict=True):
            assert found_output.stride() == expected.stride()
            assert cosine(found_output, expected) > 0.9999


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "share"), [("r3d_18", 0.0), ("mc3_18", 0.0), ("r2plus1d_18", 0.0), ("s3d", 0.0), ("swin3d_t", 0.1)]
)
def test_torchvision_models_of_video_are_in_bf16(name: str, share: float, tmp_path: Path) -> None:
    """And right; `share` is what may stay in FP32: in swin3d tables of positions alone."""
    torch.manual_seed(0)
    model = references.resolve(f"torchvision:{name}")().eval()
    inputs = torchvision_inputs.example_inputs(f"torchvision:{name}", "smallest")
    found = left(model, *inputs)
    assert found.share(sum(row.multiplications for row in found.products)) <= share
    armopt.optimize(model, inputs, output=tmp_path / "bundle", target="graviton3")
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        loaded = armopt.load(tmp_path / "bundle")
    with torch.no_grad():
        assert cosine(loaded(*inputs), model(*inputs)) > 0.999
