"""Running `armopt` as a user does, and looking at what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARMOPT = Path(sys.executable).with_name("armopt")

#: The user's own package: what the models' source is.
SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Convolution, norm, activation and two linears, on x [batch, 3, 16, 16]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16 * 16 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.hidden(y.flatten(1))))


class TwoInputs(nn.Module):
    """Inputs of one shape, so that only their names tell them apart, and not in order of the alphabet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(16, 32)

    def forward(self, tokens, context):
        y = torch.relu(self.first(tokens)) - torch.sigmoid(self.second(context))
        return {"result": y, "mean": y.mean(-1)}


class OfDtype(nn.Module):
    """A linear on parameters of another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8).to(dtype))

    def forward(self, x):
        return x.to(self.weight.dtype) @ self.weight


class Bessel(nn.Module):
    """An operation that ONNX lacks."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 32)

    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))


def net():
    torch.manual_seed(0)
    return Net().eval()


def two_inputs():
    torch.manual_seed(0)
    return TwoInputs().eval()


def bessel():
    return Bessel().eval()


def of_dtype(name):
    return OfDtype(getattr(torch, name))
'''


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Cli = Callable[..., Result]


def environment(**variables: str) -> dict[str, str]:
    """One thread, so that repeated runs agree to the bit and share two cores well."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | variables


def armopt(*args: object, cwd: Path, check: bool = True) -> Result:
    """The installed command in a process of its own."""
    done = subprocess.run(
        [str(ARMOPT), *map(str, args)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Models:
    """Model files, and the modules that they hold."""

    folder: Path
    net: nn.Module
    two: nn.Module
    x: Tensor
    tokens: Tensor
    context: Tensor

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder with its size, hidden ones too."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity in FP64."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return float(a @ b / (a.norm() * b.norm()))
