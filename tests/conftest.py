"""Options and fixtures that all tests share."""

from __future__ import annotations

import functools
import gc
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from armopt.emulation.folder import NEWEST_TORCH

ARM64, E2E = (Path(__file__).parent / name for name in ("arm64", "e2e"))
#: An error of armopt's own is one here, also where a model would run without it; so it is in programs that tests start.
os.environ["ARMOPT_RAISE"] = "1"


gc.disable()  # while all is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/passes/golden/ anew instead of comparing with it"
    )
    parser.addoption("--full", action="store_true", help="also what is marked `full`, see CONTRIBUTING.md")
    parser.addoption(
        "--newest-torch",
        default=NEWEST_TORCH,
        metavar="VERSION",
        help="the release that `full` runs on emulated cores as the newest one",
    )
    parser.addoption(
        "--arm64", action="store_true", help="prepare the emulated Arm cores first; without, their tests may be skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    # In the background of a shell Ctrl-C is ignored, and would be by every program that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `full`, and puts the longest first, so that at the end no core waits for the other."""
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: (not item.path.is_relative_to(ARM64), not item.path.is_relative_to(E2E), item.path not in slow)
    )


def pytest_collection_finish() -> None:
    """Leaves what was imported out of Python's search for cycles: again and again through torch is a sixth of all."""
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Graphs and their weights hold each other: those of a file go with it."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a process whole files, in their order, and one process all tests on emulated cores, to start them once."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/arm64" if nodeid.startswith("tests/arm64/") else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How to run alone what failed."""
    failed = [report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, ())]
    if failed:
        terminalreporter.section("to run them alone")
        options = "--full " if config.getoption("--full") else ""  # without, what is marked `full` would be left out
        for nodeid in dict.fromkeys(failed):
            terminalreporter.line(f".venv/bin/python -m pytest {options}{shlex.quote(nodeid)}")


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


@pytest.fixture(scope="session")
def onnx_functions() -> Iterator[None]:
    """torch.onnx reads the source of its 500 functions once: it would for each export, and take a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


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
def pytorchs_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel owns its primitive: what a build without oneDNN's symbols does."""
    monkeypatch.setattr("armopt.kernels.onednn.primitives.api", lambda: "turned off by a test")


@pytest.fixture
def bf16_calls() -> None:
    """Skips where oneDNN can't pack BF16: on x86 without AVX-512. The emulated core runs the same calls anyway."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs BF16 on x86 with AVX-512 alone; this host has none")
