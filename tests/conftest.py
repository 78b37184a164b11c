"""Options and fixtures that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/passes/golden/ anew instead of comparing with it"
    )


def pytest_configure(config: pytest.Config) -> None:
    # In the background of a shell Ctrl-C is ignored, and would be by every program that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Mlp(torch.nn.Module):
    """Two linears, one weight of which is used twice, and a batch norm: small, and with something for most passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.second = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.first(x)).relu()
        return {"logits": self.second(hidden) * scale, "hidden": hidden}


@pytest.fixture(scope="session")
def mlp() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mlp().eval()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def mlp_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 16, generator=generator), torch.randn(8, generator=generator)


@pytest.fixture(scope="session")
def mlp_bundle(
    mlp: torch.nn.Module, mlp_inputs: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle for graviton3 with buckets of 2 and 64; to be read only."""
    from armopt.compiler import optimize

    path = tmp_path_factory.mktemp("bundles") / "mlp"
    optimize.optimize(mlp, mlp_inputs, output=path, target="graviton3", batch=(2, 64))
    return path


@pytest.fixture(scope="session")
def host_bundle(
    mlp: torch.nn.Module, mlp_inputs: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same for this machine, so that its kernels run; to be read only."""
    from armopt.compiler import optimize

    path = tmp_path_factory.mktemp("bundles") / "host"
    optimize.optimize(mlp, mlp_inputs, output=path, target="host", batch=(2, 64))
    return path


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """A Dynamo that has compiled, counted and warned of nothing; afterwards too."""
    from torch._dynamo.utils import counters

    from armopt.dynamo.process import PROCESS

    torch._dynamo.reset()
    counters.clear()
    PROCESS.said.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def bf16_calls() -> None:
    """Skips where oneDNN can't pack BF16: on x86 without AVX-512. The emulated core runs the same calls anyway."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs BF16 on x86 with AVX-512 alone; this host has none")
