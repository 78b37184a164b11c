"""The main job on the two models of the tutorial and the talk, with the installed command, each step a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
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
save_file({name: model(x) for name, x in load_file(inputs).items()}, outputs)
assert source not in sys.modules and "armopt.compiler" not in sys.modules
"""


def serve(bundle: Path, calls: Sequence[Tensor], source: str, folder: Path) -> list[Tensor]:
    """The bundle's answers, from a process of its own."""
    save_file({str(i): x.clone() for i, x in enumerate(calls)}, folder / "x.safetensors")
    paths = [str(bundle), str(folder / "x.safetensors"), str(folder / "y.safetensors")]
    subprocess.run(
        [sys.executable, "-I", "-c", SERVE, *paths, source], cwd="/", env=environment(), check=True, timeout=300
    )
    found = load_file(folder / "y.safetensors")
    return [found[str(i)] for i in range(len(calls))]


def check(bundle: Path, model: nn.Module, calls: Sequence[Tensor], source: str, tmp_path: Path) -> None:
    """The promises of the main job."""
    torch.save(model.state_dict(), tmp_path / "fp32.pt")
    found = armopt("inspect", bundle, "--json", cwd=tmp_path).json
    assert found["accuracy"]["cosine"] >= 0.999
    assert found["accuracy"]["passed"] is True
    assert found["weights_bytes"] <= 0.51 * found["fp32_weights_bytes"]
    assert (bundle / "weights.safetensors").stat().st_size <= 0.51 * (tmp_path / "fp32.pt").stat().st_size
    assert {node["precision"] for node in found["nodes"]} <= {"bf16", "bf16-weights"}
    first, second = (serve(bundle, calls, source, tmp_path) for _ in range(2))
    for x, one, two in zip(calls, first, second, strict=True):
        assert torch.equal(one, two)
        with torch.no_grad():
            assert cosine(one, model(x)) >= 0.999


@pytest.mark.slow
@pytest.mark.full
def test_tutorial_mlp(tmp_path: Path) -> None:
    """examples/tutorial_mlp_cli.sh as it stands, and what it leaves."""
    script = subprocess.run(
        ["bash", ROOT / "examples" / "tutorial_mlp_cli.sh", tmp_path / "work"],
        cwd=tmp_path,
        env=environment(PATH=f"{Path(sys.executable).parent}:{os.defpath}"),  # `armopt`, `python` of this environment
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert script.returncode == 0, script.stderr
    for words in ("Wrote mlp.armopt for graviton3", "passed: cosine 0.999", "armopt run mlp.armopt"):
        assert words in script.stdout
    assert "Traceback" not in script.stderr
    validated = script.stdout.partition("Against the original in FP32 (mlp.pt2).")[2]
    assert re.findall(r"^(batch=\d+) +output ", validated, re.M) == ["batch=32", "batch=256"]

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from tutorial_mlp import TutorialMLP
    finally:
        sys.path.remove(str(ROOT / "examples"))
    model = TutorialMLP().eval()
    model.load_state_dict(torch.export.load(tmp_path / "work" / "mlp.pt2").state_dict)
    assert sum(p.numel() for p in model.parameters()) == 4096 * 4096 + 4096 + 4096 * 11008 + 11008 + 11008 * 10 + 10
    x = torch.rand(256, 64, 64, generator=torch.Generator().manual_seed(0))
    bundle = tmp_path / "work" / "mlp.armopt"
    check(bundle, model, (x, x[:32]), "tutorial_mlp", tmp_path)


@pytest.mark.slow
@pytest.mark.full
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
    check(tmp_path / "bundle", model, [x], "resnet50", tmp_path)
