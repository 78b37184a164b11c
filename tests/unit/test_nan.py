"""NaN in, NaN out, of either sign: the portable twins, and every pass on what stands between layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from armopt.ir.records import Site
from armopt.kernels import post_ops, table
from tests import nan_cases
from tests.arm64.kernel_cases import Case
from tests.planning import programs
from tests.sampling import sampled


def test_a_linear_on_many_dimensions_fuses_its_relu() -> None:
    """It is no convolution on volumes."""
    kernel = table.get("conv1x1_fastmath")
    assert kernel.fuses(Site("layer", "linear", 16, 4, 8, (2, 2, 2, 2, 4), (8, 4), post_op="relu"))


@pytest.mark.parametrize("case", nan_cases.CASES, ids=str)
def test_twins_lose_no_nan(case: Case) -> None:
    program, inputs, wanted = nan_cases.prepared(case, "graviton3")
    (found,) = program.graph_module(*inputs)
    function = post_ops.UNARY.get(case.layer.post_op)
    infinite = torch.full((64,), torch.inf, dtype=found.dtype)
    if function is not None and function.apply(infinite).isnan().all():
        found = found.double().where(~wanted.isinf(), wanted)  # on some x86 cores PyTorch's gelu of infinity is NaN
    assert nan_cases.apart(wanted, found) == (0, 0)


class _Between(nn.Module):
    """A function between two layers in BF16."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(48, 64), nn.Linear(64, 64), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))  # type: ignore[no-any-return]


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f.__name__: f for f in (torch.relu, torch.sigmoid, torch.tanh, torch.abs, functional.gelu, functional.silu)},
    **{f.__name__: f for f in (functional.relu6, functional.hardtanh, functional.hardswish, functional.hardsigmoid)},
    **{f.__name__: f for f in (functional.leaky_relu, functional.elu)},
    "clamp": lambda x: x.clamp(0, 6),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    "threshold": lambda x: functional.threshold(x, 0.0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "max_pool1d": lambda x: functional.max_pool1d(x, 2).repeat(1, 2),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (64,)),
    "split": lambda x: torch.cat([part.relu() for part in x.split(32, -1)], -1),
}


@pytest.mark.parametrize("name", sampled(FUNCTIONS, 3))
def test_between_layers(name: str) -> None:
    model, x = _Between(FUNCTIONS[name]).eval(), nan_cases.special((64, 48), torch.float32)
    (program,) = programs(model, torch.randn(64, 48))
    (found,), expected = program.graph_module(x), model(x)
    assert nan_cases.apart(expected, found) == (0, 0)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.beside = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.one(x) + x)
        return torch.relu(self.norm(self.two(y)) + self.beside(functional.max_pool2d(y, 3, 1, 1)))


IMAGES = {
    "residual": _Residual,
    "pool": lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 8, 1)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.ReLU6(), nn.Conv2d(32, 32, 1), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.AvgPool2d(2)),
    "pixel": lambda: nn.Sequential(nn.Conv2d(32, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU()),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    model, x = IMAGES[name]().eval(), nan_cases.special((len(nan_cases.SPECIAL), 32, 8, 8), torch.float32)
    (program,) = programs(model, torch.randn_like(x))
    (found,), expected = program.graph_module(x), model(x)
    assert expected.isnan().any()
    assert nan_cases.apart(expected, found) == (0, 0)
