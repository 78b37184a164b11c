from __future__ import annotations

import gc
import platform
import shutil
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import armopt
from armopt.errors import ArmoptWarning, InputError
from armopt.ir import buckets
from armopt.ir.records import Site
from armopt.kernels.base import Kernel
from armopt.runtime import bind
from armopt.runtime.model import Model

Pair = tuple[torch.Tensor, torch.Tensor]
#: The bundles are made on this machine: graviton3's are portable everywhere but on aarch64.
portable_only = pytest.mark.skipif(platform.machine() == "aarch64", reason="graviton3's own kernels run here")


def load(path: Path) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        return armopt.load(path)


@pytest.fixture(scope="module")
def model(mlp_bundle: Path) -> Model:
    return load(mlp_bundle)


def check(found: dict[str, torch.Tensor], mlp: nn.Module, inputs: Pair) -> None:
    with torch.no_grad():
        expected = mlp(*inputs)
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        # BF16 keeps 8 bits: three roundings a layer, two layers, and a batch norm that scales the first by up to 1.4
        assert (found[name] - expected[name]).abs().max() <= 2**-5 * expected[name].abs().max()


def test_it_takes_and_returns_what_the_model_does(model: Model, mlp: nn.Module, mlp_inputs: Pair) -> None:
    x, scale = mlp_inputs
    for found in (model(x, scale), model(x, scale=scale), model(x=x, scale=scale), model(scale=scale, x=x)):
        check(found, mlp, mlp_inputs)


def test_too_many_inputs_are_refused(model: Model) -> None:
    with pytest.raises(InputError):
        model(torch.zeros(2, 16), torch.zeros(8), torch.zeros(8))


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
def test_any_batch_runs(model: Model, mlp: nn.Module, mlp_inputs: Pair, rows: int) -> None:
    inputs = torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)), mlp_inputs[1]
    check(model(*inputs), mlp, inputs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "x and scale are missing.*captured with: x, scale"),
        ((torch.zeros(2, 16),), {}, "scale is missing"),
        ((torch.zeros(2, 16),), {"scale": torch.zeros(8), "other": torch.zeros(1)}, "the model takes no input other"),
        ((torch.zeros(2, 16), torch.zeros(8)), {"x": torch.zeros(2, 16)}, "x is given twice, by position and by name"),
        ((torch.zeros(2, 16).double(), torch.zeros(8)), {}, r"input x: expected float32, found float64.*\.to\(torch"),
        ((torch.zeros(2, 15), torch.zeros(8)), {}, "input x: expected shape batchx16, found 2x15"),
        ((torch.zeros(16), torch.zeros(8)), {}, "input x: expected shape batchx16, found 16"),
        ((torch.zeros(2, 16), torch.zeros(9)), {}, "input scale: expected shape 8, found 9"),
        ((torch.zeros(2, 16), 3.0), {}, "input scale: expected a tensor, found a float"),
        ((torch.zeros(2, 16), None), {}, "input scale: expected a tensor, found a NoneType"),
    ],
)
def test_what_does_not_fit_is_named(model: Model, args: tuple, kwargs: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        model(*args, **kwargs)


@pytest.mark.parametrize(("size", "bucket"), [(1, 2), (2, 2), (11, 2), (12, 64), (63, 64), (640, 64), (0, 2)], ids=str)
def test_the_nearest_bucket_by_ratio_runs(model: Model, size: int, bucket: int) -> None:
    """The geometric mean of 2 and 64 is 11.3."""
    assert model.bucket([torch.zeros(size, 16), torch.zeros(8)]) == {"batch": bucket}


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_distance_is_of_ratios(a: int, b: int) -> None:
    d = buckets.distance({"batch": a}, {"batch": b})
    assert d == pytest.approx(buckets.distance({"batch": b}, {"batch": a}))
    assert (d == 0) == (a == b)
    assert buckets.distance({"other": a}, {"batch": b}) == 0


def test_four_threads_get_the_same_results(model: Model, host_bundle: Path, mlp_inputs: Pair) -> None:
    for loaded in (model, load(host_bundle)):
        inputs = [(torch.randn(rows, 16), mlp_inputs[1]) for rows in (1, 2, 64, 70)]
        expected = [loaded(*each)["logits"] for each in inputs]
        wrong: list[int] = []

        def work(i: int, run: Any = loaded, inputs: Any = inputs, expected: Any = expected, wrong: Any = wrong) -> None:
            wrong.extend(i for _ in range(20) if not torch.equal(run(*inputs[i])["logits"], expected[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@portable_only
def test_portable_twins_are_said_once_per_load(mlp_bundle: Path, mlp_inputs: Pair) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = armopt.load(mlp_bundle)
        loaded(*mlp_inputs)
        loaded(*mlp_inputs)
    ours = [w for w in said if issubclass(w.category, ArmoptWarning)]
    assert len(ours) == 1
    assert "portable twins" in str(ours[0].message)
    assert "graviton3" in str(ours[0].message)
    assert ours[0].filename == __file__
    assert loaded.portable


def test_a_bundle_for_this_machine_runs_its_kernels(host_bundle: Path, mlp: nn.Module, mlp_inputs: Pair) -> None:
    loaded = load(host_bundle)
    assert not loaded.portable
    assert [len(entries) for entries in loaded.kernels] == [2, 2]
    check(loaded(*mlp_inputs), mlp, mlp_inputs)


def test_a_zip_loads(mlp_bundle: Path, mlp_inputs: Pair, model: Model, tmp_path: Path) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "mlp"), "zip", mlp_bundle))
    assert torch.equal(load(path)(*mlp_inputs)["logits"], model(*mlp_inputs)["logits"])


def test_results_carry_no_gradient_and_inputs_stay(model: Model, mlp_inputs: Pair) -> None:
    x, scale = (t.clone().requires_grad_() for t in mlp_inputs)
    found = model(x, scale)
    assert not found["logits"].requires_grad
    assert torch.equal(x, mlp_inputs[0])


def test_the_file_of_weights_leaves_memory(tmp_path: Path) -> None:
    """The norm's weights are kept as they are stored; one such tensor would hold all of the mapped file."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).eval()
    x = torch.randn(3, 64)
    armopt.optimize(model, (x,), output=tmp_path / "bundle", target="host")
    gc.disable()  # without waiting for Python to look for cycles
    try:
        loaded = armopt.load(tmp_path / "bundle")
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()
    torch.testing.assert_close(loaded(x), model(x), atol=0.05, rtol=0)


def test_what_a_refused_kernel_packed_leaves_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64).eval()
    armopt.optimize(model, (torch.randn(3, 64),), output=tmp_path / "bundle", target="host", policy="threshold")
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))
    packed: list[weakref.ref[torch.Tensor]] = []
    single = bind.single

    def remembered(kernel: Kernel, site: Site, weight: torch.Tensor, bias: torch.Tensor | None) -> bind.Single:
        packed.append(weakref.ref(weight))
        return single(kernel, site, weight, bias)

    monkeypatch.setattr(bind, "single", remembered)
    monkeypatch.setattr(bind.probe, "refusal", lambda *_: "no" if len(packed) == 1 else None)
    gc.disable()
    try:
        loaded = load(tmp_path / "bundle")
        assert packed[0]() is None
    finally:
        gc.enable()
    assert "no" in loaded.kernels[0][0].reason
