"""Pointwise functions behind layers, by code that oneDNN generates."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from armopt.bundle.program import Program
from armopt.kernels import table
from armopt.kernels.onednn import pointwise, primitives
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime import bind, own
from tests.own_programs import found_api, random
from tests.planning import programs

MODULES: dict[str, nn.Module] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}
APART = (own.Form.APART,)
#: Whose layer is small, so that BLAS multiplies; whose is in BF16; a convolution in FP32.
LAYERS = {
    "blas_fp32": (nn.Linear(32, 24), (4, 32), "graviton2"),
    "conv1x1_bf16": (nn.Linear(64, 48), (128, 64), "graviton3"),
    "conv_fp32": (nn.Conv2d(16, 24, 1), (2, 16, 9, 9), "graviton2"),
}


@pytest.fixture(autouse=True)
def api() -> primitives.Api:
    return found_api()


def program(layer: str, function: str) -> tuple[Program, nn.Module, torch.Tensor]:
    first, shape, target = LAYERS[layer]
    last = nn.Conv2d(24, 8, 1) if isinstance(first, nn.Conv2d) else nn.Linear(first.out_features, 8)
    model = nn.Sequential(first, MODULES[function], last).eval()
    policy = ThresholdPolicy(64 if target == "graviton3" else 1000)
    return programs(model, random(*shape), target=target, policy=policy)[0], model, random(*shape)


def called(module: torch.fx.GraphModule, function: str) -> bool:
    """Whether PyTorch's operation is called."""
    return any(function.removesuffix("_tanh") in str(node.target) for node in module.graph.nodes)


@pytest.fixture
def only_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as part of the primitive, as x86 has it in BF16, and not by PyTorch."""
    monkeypatch.setattr(own, "forms", lambda kernel, site: (own.Form.BEHIND,) if site.post_op in MODULES else APART)


@pytest.mark.usefixtures("only_behind")
@pytest.mark.parametrize("function", sorted(MODULES))
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_a_function_runs_behind_its_layer(layer: str, function: str) -> None:
    """Nothing of PyTorch's is called, numbers are right, and a NaN stays one: in every call, whatever came before."""
    bundled, model, x = program(layer, function)
    module, entries = bind.Binder(False).bind(bundled)
    assert all(entry.implementation for entry in entries) or layer == "blas_fp32"
    assert entries[0].kernel.startswith(layer)
    assert not called(module, function)
    near = {"rtol": 3e-2, "atol": 3e-2} if "bf16" in layer else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        expected = model(x)
    found = module(x)[0]
    torch.testing.assert_close(found, expected, **near)
    x.flatten()[5] = math.nan
    with torch.no_grad():
        assert torch.equal(module(x)[0].isnan(), model(x).isnan())
    x.flatten()[5] = random(*x.shape).flatten()[5]
    assert torch.equal(module(x)[0], found)


@pytest.mark.usefixtures("only_behind")
@pytest.mark.parametrize("layer", ["blas_fp32", "conv1x1_bf16"])
def test_an_output_is_written_where_the_caller_wants_it(layer: str) -> None:
    first, shape, target = LAYERS[layer]
    model = nn.Sequential(first, nn.GELU()).eval()
    x, policy = random(*shape), ThresholdPolicy(64 if target == "graviton3" else 1000)
    module, _ = bind.Binder(False).bind(programs(model, x, target=target, policy=policy)[0])
    found = module(x)[0]
    lent = torch.full_like(found, torch.nan)
    assert module(x, out=[lent])[0] is lent
    assert torch.equal(lent, found)


@pytest.mark.parametrize("layer", ["blas_fp32", "conv_fp32"])
def test_of_what_onednn_has_no_code_pytorch_runs_it(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled, _, x = program(layer, "silu")
    generated = bind.Binder(False).bind(bundled)[0](x)[0]
    monkeypatch.setattr(pointwise, "FUNCTIONS", frozenset())
    module, _ = bind.Binder(False).bind(bundled)
    assert called(module, "silu")
    torch.testing.assert_close(module(x)[0], generated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["blas_fp32", "conv_fp32"])
def test_threads_of_python_have_a_function_each(layer: str) -> None:
    bundled, model, x = program(layer, "gelu")
    module, _ = bind.Binder(False).bind(bundled)
    inputs = [x + i for i in range(8)]
    with torch.no_grad():
        expected = [model(each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(lambda each: module(each)[0], inputs), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_function_with_wrong_numbers_is_left_to_pytorch(api: primitives.Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build whose silu is a sigmoid."""
    assert pointwise.takes("silu", torch.float32)
    monkeypatch.setitem(primitives.ELTWISE, "silu", primitives.ELTWISE["sigmoid"])
    pointwise.is_right.cache_clear()
    try:
        assert not pointwise.takes("silu", torch.float32)
    finally:
        pointwise.is_right.cache_clear()


def test_silu_is_made_of_a_tanh_of_wide_vectors_where_onednns_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half the weight and bias, and apart even from a layer that would take it."""
    bundled, model, x = program("conv_fp32", "silu")
    kernel, site = table.get("conv_fp32"), next(iter(bundled.sites.values()))
    depthwise = replace(site, groups=16, weight=(16, 1, 1, 1), n=16)
    monkeypatch.setattr(pointwise, "SHORT_SILU", (99, 0))
    results = []
    for wide in (True, False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda wide=wide: "SVE256" if wide else "SVE128")
        assert kernel.scale(site) == (0.5 if wide else 1)
        assert kernel.fuses(depthwise) == (not wide)
        module, _ = bind.Binder(False).bind(bundled)
        assert [called(module, "tanh"), called(module, "silu")] == [wide, False]
        results.append(module(x)[0])
    with torch.no_grad():
        for found in results:
            torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)
