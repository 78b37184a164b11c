"""Programs whose layers own their primitives, for this machine's PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from armopt.bundle.program import Program
from armopt.kernels.onednn import primitives
from armopt.plan.threshold_policy import ThresholdPolicy
from tests.planning import programs


def found_api() -> primitives.Api:
    """oneDNN's functions; skips the test, loudly, where this build lets nobody have them."""
    found = primitives.api()
    if isinstance(found, str):
        pytest.skip(f"NOT TESTED: {found}")
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lowered(model: torch.nn.Module, *inputs: torch.Tensor) -> Program:
    """A model in FP32, each layer packed."""
    return programs(model.eval(), *inputs, target="graviton2", policy=ThresholdPolicy(1))[0]


def wrong_at_once(call: Callable[..., Any], inputs: Sequence[Sequence[torch.Tensor]], times: int = 50) -> list[int]:
    """Which inputs gave another first result than alone, where each of four threads calls with all of them in turn."""
    expected = [call(*each)[0] for each in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        for at in range(first, first + times):
            i = at % len(inputs)
            if not torch.equal(call(*inputs[i])[0], expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong
