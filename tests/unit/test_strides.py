"""On this host's own kernels, whose convolutions give channels_last: whoever looks at strides sees the model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt.errors import ArmoptWarning
from armopt.ir import strides


class Seen(nn.Module):
    """Gives a convolution's image, rows that are read by their strides, and complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x).relu()
        z = self.second(y).contiguous()  # which is no copy where `x` is contiguous
        pairs = torch.view_as_complex(z.view(*z.shape[:-1], -1, 2))
        return y, z.as_strided((4, 8), (8, 1), 3).sum(1), pairs.abs()


class Constants(nn.Module):
    """Gives constants, and what lies in memory as they do. Bundles store each contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 16))
        self.register_buffer("turned", torch.randn(8, 16).t())
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        table: Tensor = self.table.t()  # type: ignore[operator]
        cube = (self.table * 2).view(4, 4, 8)  # type: ignore[operator]
        seen = (
            table,
            table[1:],
            table * 2,
            self.turned,
            self.turned + 1,
            cube[:, 1],
            cube[..., 2],
            cube.transpose(0, 2),
        )  # type: ignore[operator]
        return *seen, x[0, 0] * table, x[0, 0] + self.turned, self.first(x), table.as_strided((2, 3), (3, 1))  # type: ignore[return-value, operator]


def _bundle(model: nn.Module, x: Tensor, place: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    armopt.optimize(model, (x,), output=place, target="host")
    return armopt.load(place)  # type: ignore[return-value]


WAYS: dict[str, Callable[[nn.Module, Tensor, Path], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "bundle": _bundle,
    "compile": lambda model, x, place: armopt.compile(model, target="host"),
    "backend": lambda model, x, place: torch.compile(model, backend="armopt", options={"target": "host"}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_hosts_kernels_and_strides(way: str, memory_format: torch.memory_format, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Seen().eval()
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=memory_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        expected = model(x)
        found = WAYS[way](model, x, tmp_path / "bundle")(x)
    for one, other in zip(found, expected, strict=True):
        assert strides.are_equal(one, other)
        assert torch.allclose(one, other, atol=0.03 * float(other.abs().max()))  # BF16, where the host has it
    if memory_format == torch.contiguous_format:
        assert found[0].view(2, -1).shape == (2, 32 * 36)


class Weighing(nn.Module):
    """Attention and its weights: PyTorch's fast path, around which an export goes, gives contiguous ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, average_attn_weights=False)
        return y, weights


_VOLUME = torch.randn(3, 4, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("batch", [(), (1, 3)], ids=str)
@pytest.mark.parametrize(
    ("make", "x"),
    [(Weighing, torch.randn(3, 6, 32)), (lambda: nn.Conv3d(4, 8, 3), _VOLUME)],
    ids=["attention", "volume"],
)
def test_a_bundles_results_lie_as_the_models_do_where_an_export_sees_them_otherwise(
    make: Callable[[], nn.Module], x: Tensor, batch: tuple[int, ...], tmp_path: Path
) -> None:
    model = make().eval()
    armopt.optimize(model, (x,), output=tmp_path / "bundle", target="graviton3", batch=batch)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        found, expected = armopt.load(tmp_path / "bundle")(x), model(x)
    found, expected = ((each,) if isinstance(each, Tensor) else each for each in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert strides.are_equal(one, other)


@pytest.mark.parametrize(
    ("tensor", "dims"),
    [
        (torch.zeros(2, 3, 4), (0, 1, 2)),
        (torch.zeros(4, 2, 3).permute(1, 2, 0), (2, 0, 1)),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), (0, 2, 3, 1)),
        (torch.zeros(2, 3, 1, 1).contiguous(memory_format=torch.channels_last), (0, 1, 2, 3)),
        (torch.zeros(2, 6)[:, ::2], None),
        (torch.zeros(1, 3).expand(2, 3), None),
        (torch.zeros(2, 2).to_sparse(), None),
        (torch.zeros(()), ()),
    ],
)
def test_the_order_of_dimensions_in_memory(tensor: Tensor, dims: tuple[int, ...] | None) -> None:
    assert strides.order(tensor) == dims
    if dims is not None:
        same = torch.randn(tensor.shape)
        for target, more, kwargs in strides.calls(dims):
            same = target(same, *more, **kwargs)
        assert strides.are_equal(same, tensor)


@pytest.mark.parametrize("way", WAYS)
def test_constants_lie_as_in_the_model(way: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Constants().eval(), torch.randn(4, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        expected, found = model(x), WAYS[way](model, x, tmp_path / "bundle")(x)
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        assert torch.allclose(one, other, atol=0.03 * float(other.abs().max()))  # BF16, where the host has it
