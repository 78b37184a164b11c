"""Networks built so that BF16 breaks them, each with the gate that it fails."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Trunk(nn.Module):
    """Layers that BF16 does no harm to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = layer(x).relu()
        return x


class CancelledBias(Trunk):
    """A bias of a thousand that the next layer takes away: in BF16 a thousand has steps of four."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 10)
        with torch.no_grad():
            self.up.bias.fill_(1000.0)
            self.down.bias.sub_(1000.0 * self.down.weight.sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(super().forward(x))).relu())


class ThinMargin(Trunk):
    """Pairs of classes that are 1e-3 apart, at scores of about one: in BF16 steps there are 4e-3 to 8e-3."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 8)
        with torch.no_grad():
            rows = (8 * self.head.weight[:4]).bfloat16().float()
            self.head.weight.copy_(rows.repeat_interleave(2, 0))
            self.head.bias.copy_(1e-3 * (torch.arange(8) % 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class Exponential(Trunk):
    """exp of scores of about eighty: an error of 2^-9 of those is one of a sixth."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 6)
        with torch.no_grad():
            self.head.weight.mul_(10)
            self.head.bias.fill_(70.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x)).exp()


class CancelledBiasConv(nn.Module):
    """The first of these with convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.up.bias.fill_(1000.0)
            self.down.bias.sub_(1000.0 * self.down.weight.sum((1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.stem(x).relu())).relu())


#: Gates besides the cosine of 0.99.
GATES: dict[type[nn.Module], tuple[str, ...]] = {
    CancelledBias: (),
    ThinMargin: ("top1>=0.995",),
    Exponential: ("cosine>=0.9995",),
    CancelledBiasConv: (),
}


def build(kind: type[nn.Module], seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network and its input; 256 rows, so that every layer is planned in BF16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().eval()
        x = torch.randn(4, 3, 12, 12) if kind is CancelledBiasConv else torch.randn(256, 32)
    return model, x
