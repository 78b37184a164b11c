"""Small models whose shapes or paths depend on values, each with inputs; no way of running them may crash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from armopt.models import torchvision_ops


class Between(nn.Module):
    """A Linear before and one behind what depends on data: both are layers that armopt plans."""

    def __init__(self, step: Callable[..., Any], behind: bool = True) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.step = step
        self.behind = behind

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        made = self.step(self.before(x), *others)
        return self.after(made) if self.behind else made


class Experts(nn.Module):
    """A mixture of experts as transformers writes it: each expert works on the rows that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            result.index_add_(0, row, expert(x[row]) * weight[row, place, None])
        return result


class Images(nn.Module):
    """Convolutions on some images, or on a part of each."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.first, self.pixel = nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Conv2d(8, 8, 1)
        self.norm, self.up = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.rows = rows

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        count = n.item()
        torch._check(count >= 4)
        torch._check(count <= 12)
        x = x[x[:, 0, 0, 0] > 0] if self.rows else x[..., :count]
        y = self.norm(self.first(x)).relu()
        return self.up(y + self.pixel(y).relu())


class Checked(nn.Module):
    """A number out of a tensor, with what torch.export asks to be said of it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        count = n.item()
        torch._check(count >= 0)
        torch._check(count <= x.shape[0])
        return self.after(self.before(x)[:count])


class CheckedAll(nn.Module):
    """All values of a tensor are checked, as transformers' models of images and text check their placeholders."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        torch._check_tensor_all(x.abs() < 100)
        return y


class Ragged(nn.Module):
    """Rows of several sequences in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return torch.stack([self.inner(part).sum(0) for part in x.split(sizes.tolist())])


class Branch(nn.Module):
    """Python's if on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


class Cond(Branch):
    """torch.cond."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.first, self.second, (x,))


class While(nn.Module):
    """torch.while_loop."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def going(i: Tensor, y: Tensor) -> Tensor:
            return i < 3

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.inner(y)

        return torch._higher_order_ops.while_loop(going, step, (torch.zeros((), dtype=torch.int64), self.before(x)))[1]


def _assign(y: Tensor) -> Tensor:
    y = y.clone()
    y[y < 0] = 0.5
    return y


def _assign_values(y: Tensor) -> Tensor:
    y = y.clone()
    mask = y < 0
    y[mask] = y[mask] * 0.1
    return y


def _nms(y: Tensor) -> Tensor:
    torchvision_ops.ensure_torchvision()
    corner = y[:, :2].abs()
    boxes = torch.cat([corner, corner + y[:, 2:4].abs() + 0.1], 1)
    return y[torch.ops.torchvision.nms(boxes, y[:, 4], 0.5)]


def _unique(y: Tensor) -> Tensor:
    values, inverse = torch.unique((y * 2).round()[:, 0], return_inverse=True)
    return y + values[inverse][:, None]


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _x(rows: int = 6) -> Tensor:
    return torch.randn(rows, 8, generator=_seeded(rows))


_COUNTS = torch.tensor([2, 0, 1, 3, 0, 2])
_STEPS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], bool]] = {
    "mask": (lambda y: y[y[:, 0] > 0], (_x(),), True),
    "mask_empty": (lambda y: y[y[:, 0] > 1e6], (_x(),), True),
    "mask_given": (lambda y, m: y[m], (_x(), torch.tensor([True, False] * 3)), True),
    "masked_select": (lambda y: y.masked_select(y > 0).sum() + y, (_x(),), True),
    "nonzero": (lambda y: y[(y[:, 0] > 0).nonzero()[:, 0]], (_x(),), True),
    "nonzero_tuple": (lambda y: y[(y[:, 0] > 0).nonzero(as_tuple=True)[0]], (_x(),), True),
    "nonzero_empty": (lambda y: (y > 1e6).nonzero(), (_x(),), False),
    "argwhere": (lambda y: y[torch.argwhere(y[:, 0] > 0).squeeze(1)], (_x(),), True),
    "where": (lambda y: y[torch.where(y[:, 0] > 0)[0]], (_x(),), True),
    "repeat_interleave": (lambda y, n: torch.repeat_interleave(y, n, dim=0), (_x(), _COUNTS), True),
    "unique": (_unique, (_x(),), True),
    "bincount": (lambda y, n: y + torch.bincount(n).sum(), (_x(), _COUNTS), True),
    "assign": (_assign, (_x(),), True),
    "assign_values": (_assign_values, (_x(),), True),
    "nms": (_nms, (_x(),), True),
    "topk_item": (lambda y, k: y.topk(k.item(), dim=0).values, (_x(), torch.tensor(3)), True),
    "split_rows": (
        lambda y, n: torch.cat([p.relu() for p in y[n.argsort()].split(torch.bincount(n, minlength=4).tolist())]),
        (_x(), _COUNTS),
        True,
    ),
    "split_list": (lambda y, n: torch.cat([p.relu() for p in y.split(n.tolist())]), (_x(8), _COUNTS), True),
    "item_scale": (lambda y: y * y.max().item(), (_x(),), True),
    "item_bool": (lambda y: y + 1 if (y > 0).any().item() else y, (_x(),), True),
    "arange_item": (lambda y, n: y[torch.arange(n.item())], (_x(), torch.tensor(4)), True),
    "tail": (lambda y, n: y[n.item() :], (_x(), torch.tensor(4)), True),
    "ratio": (lambda y, n: y[: (n.item() - 3) // 1], (_x(), torch.tensor(5)), True),
    "zero_rows": (lambda y: y[y[:, 0] > 0], (torch.zeros(0, 8),), True),
    "number_out": (lambda y: (y, y.sum().item()), (_x(),), False),
    "count_out": (lambda y: y[y[:, 0] > 0].shape[0], (_x(),), False),
    "print_of_shape": (lambda y: y[y > 0].reshape(-1, 1) * torch.ones(1, 8), (_x(),), True),
}

#: Model and inputs by name. Models are made anew with the same weights at every call.
CASES: Mapping[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{
        name: ((lambda step=step, behind=behind: Between(step, behind)), inputs)
        for name, (step, inputs, behind) in _STEPS.items()
    },
    "experts": (Experts, (_x(),)),
    "check": (Checked, (_x(), torch.tensor(3))),
    "check_zero": (Checked, (_x(), torch.tensor(0))),
    "check_all": (CheckedAll, (_x(),)),
    "images": (lambda: Images(True), (torch.randn(4, 3, 12, 12, generator=_seeded()), torch.tensor(8))),
    "widths": (lambda: Images(False), (torch.randn(4, 3, 12, 12, generator=_seeded()), torch.tensor(8))),
    "ragged": (Ragged, (_x(8), _COUNTS)),
    "branch": (Branch, (_x(),)),
    "cond": (Cond, (_x(),)),
    "while": (While, (_x(),)),
}


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of :data:`CASES` and its inputs."""
    build, inputs = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval(), inputs
