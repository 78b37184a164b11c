"""A fixed sample of the zoo: optimize, load, compare with the module in FP32. The whole: benchmarks/coverage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import armopt
from armopt import accuracy
from tests import zoo_models
from tests.sampling import only

TORCHVISION = ("resnet18", "mobilenet_v3_small", "squeezenet1_1", "convnext_tiny", "lraspp_mobilenet_v3_large")
#: Long, and each with a smaller relative above or among the models of the tests.
LONG = (
    *("shufflenet_v2_x0_5", "efficientnet_b0", "densenet121", "regnet_y_400mf", "swin_t", "vit_b_16"),
    "deeplabv3_mobilenet_v3_large",
)
#: BF16 against FP32 on random weights. Most reach 0.9999; each of a net's many roundings is a relative error of 2^-9.
LEAST_COSINE = 0.999

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")]


def compare(expected: Any, found: Any, path: str = "") -> None:
    """The same structure, the same constants, tensors of the same shape and dtype that point the same way."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), path
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), path
        assert not found.requires_grad
        result = accuracy.compare(path, expected, found)
        assert result.finite, path
        assert result.similarity >= LEAST_COSINE, path
    elif isinstance(expected, Mapping):
        assert isinstance(found, Mapping), path
        assert list(found) == list(expected), path
        for key in expected:
            compare(expected[key], found[key], f"{path}.{key}")
    elif dataclasses.is_dataclass(expected) or hasattr(expected, "_fields"):
        assert type(found).__name__ == type(expected).__name__, path
        names = getattr(expected, "_fields", None) or [field.name for field in dataclasses.fields(expected)]
        for name in names:
            compare(getattr(expected, name), getattr(found, name), f"{path}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), path
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            compare(a, b, f"{path}[{i}]")
    else:
        assert found == expected, path


@pytest.mark.parametrize(
    "name", only([*TORCHVISION, *zoo_models.MODELS, *LONG], [*TORCHVISION[:3], *list(zoo_models.MODELS)[::3]])
)
def test_optimizes_loads_and_agrees(name: str, tmp_path: Path) -> None:
    model, args, kwargs = zoo_models.build(name)
    written = armopt.optimize(model, kwargs or args, output=tmp_path / "b", target="graviton3").manifest
    loaded = armopt.load(tmp_path / "b")
    with torch.no_grad():
        expected = model(*args, **kwargs)
        other = dict(reversed(kwargs.items()))
    compare(expected, loaded(*args, **kwargs))
    compare(expected, loaded(*args, **other))  # the order of names means nothing
    nodes = written.plan[0].nodes
    assert nodes
    assert all(node.reason for node in nodes)
    refused = {skip.node for skip in written.refused}
    assert all(node.node in refused for node in nodes if node.kernel.startswith("aten_"))
