"""Programs whose layers own their primitives, for this machine's PyTorch."""

from __future__ import annotations

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
