"""The main job on the two models of the tutorial and the talk, with the installed command, each step a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from e2e_helpers import ROOT, armopt, cosine, environment
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armopt.models import references

#: Loads and runs a bundle where the model's source can't be imported (-I: no PYTHONPATH, no current folder).
SERVE = """
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
from safetensors.torch import load_file, save_file
import armopt
bundle, inputs, outputs, source = sys.argv[1:]
assert importlib.util.find_spec(source) is None, source
model = armopt.load(bundle)
save_file({"y": model(load_file(inputs)["x"])}, outputs)
assert source not in sys.modules and "armopt.compiler" not in sys.modules
"""


def serve(bundle: Path, x: Tensor, source: str, folder: Path) -> Tensor:
    """The bundle's answer, from a process of its own."""
    save_file({"x": x}, folder / "x.safetensors")
    paths = [str(bundle), str(folder / "x.safetensors"), str(folder / "y.safetensors")]
    subprocess.run(
        [sys.executable, "-I", "-c", SERVE, *paths, source], cwd="/", env=environment(), check=True, timeout=300
    )
    return load_file(folder / "y.safetensors")["y"]


def check(bundle: Path, model: nn.Module, x: Tensor, source: str, tmp_path: Path) -> None:
    """The promises of the main job."""
    torch.save(model.state_dict(), tmp_path / "fp32.pt")
    found = armopt("inspect", bundle, "--json", cwd=tmp_path).json
    assert found["accuracy"]["cosine"] >= 0.999
    assert found["accuracy"]["passed"] is True
    assert found["weights_bytes"] <= 0.51 * found["fp32_weights_bytes"]
    assert (bundle / "weights.safetensors").stat().st_size <= 0.51 * (tmp_path / "fp32.pt").stat().st_size
    assert {node["precision"] for node in found["nodes"]} <= {"bf16", "bf16-weights"}
    first, second = (serve(bundle, x, source, tmp_path) for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert cosine(first, model(x)) >= 0.999


@pytest.mark.slow
def test_tutorial_mlp(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from tutorial_mlp import TutorialMLP
    finally:
        sys.path.remove(str(ROOT / "examples"))
    torch.manual_seed(0)
    model = TutorialMLP().eval()
    assert sum(p.numel() for p in model.parameters()) == 4096 * 4096 + 4096 + 4096 * 11008 + 11008 + 11008 * 10 + 10
    x = torch.rand(256, 64, 64)
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "mlp.pt2")
    target = ("--target", "graviton3")
    policy = ("--policy", "threshold")
    done = armopt("optimize", "mlp.pt2", *target, *policy, "--batch", "32,256", "-o", "mlp", "--json", cwd=tmp_path)
    # The tutorial's finding: BLAS at 32, the Compute Library in BF16 at 256.
    assert [each["kernels"] for each in done.json["buckets"]] == [{"blas_fp32_w16": 3}, {"conv1x1_bf16": 3}]
    for size in (256, 32):
        check(tmp_path / "mlp", model, x[:size], "tutorial_mlp", tmp_path)
    done = armopt("validate", "mlp", "--against", "mlp.pt2", "--min-cosine", "0.999", "--json", cwd=tmp_path)
    assert done.json["passed"] is True
    assert set(done.json["outputs"]) == {"batch=32", "batch=256"}


@pytest.mark.slow
def test_resnet50(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = references.resolve("torchvision:resnet50")().eval()
    torch.save(model.state_dict(), tmp_path / "resnet50.pt")
    arguments = ("--model", "torchvision:resnet50", "--target", "graviton3", "-o", "bundle", "--json")
    done = armopt("optimize", "resnet50.pt", *arguments, cwd=tmp_path)
    kernels = done.json["buckets"][0]["kernels"]
    assert sum(kernels.values()) == 50  # 53 convolutions, four of them merged shortcuts, and one Linear
    assert set(kernels) <= {"conv_bf16", "conv_fastmath", "conv1x1_bf16", "conv1x1_fastmath"}
    assert done.json["refused"] == []
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    check(tmp_path / "bundle", model, x, "resnet50", tmp_path)
