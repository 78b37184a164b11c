"""Random weights with which a model's outputs tell one input from another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import random_weights


class Scaled(nn.Module):
    """What initialisation leaves flat: a layer scale, a zero head, norms, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8, momentum=0.3)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.conv(x) * 1e4) * self.scale).mean((2, 3)))


class TestRandomize:
    @staticmethod
    def model() -> Scaled:
        torch.manual_seed(0)
        return Scaled()

    def test_outputs_become_telling(self) -> None:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert self.model().eval()(x).eq(0).all()
        model = random_weights.randomize(self.model(), [(1, 3, 8, 8)])
        assert not model.training
        assert not model.norm.training
        assert model.norm.momentum == 0.3
        assert model.norm.running_var.mean() > 1e6  # what a factor of 1e4 before it makes
        y = model(x)
        assert y.isfinite().all()
        assert 1e-2 < y.std() < 10
        assert not torch.allclose(y[0], y[1], rtol=1e-3)  # 1e-3: it depends on the input, not on rounding

    def test_seeded(self) -> None:
        one, again, other = (
            random_weights.randomize(self.model(), [(1, 3, 8, 8)], seed=seed).state_dict() for seed in (0, 0, 1)
        )
        assert all(one[name].equal(again[name]) for name in one)
        assert not one["head.weight"].equal(other["head.weight"])

    def test_leaves_drawn_weights_and_the_global_generator_alone(self) -> None:
        model, before = self.model(), self.model().conv.weight
        state = torch.get_rng_state()
        random_weights.randomize(model, [(1, 3, 8, 8)])
        assert model.conv.weight.equal(before)
        assert torch.get_rng_state().equal(state)
