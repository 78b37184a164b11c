"""`armopt export-onnx` and `armopt optimize --onnx` as a user runs them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import onnxruntime
import pytest
import torch
from e2e_helpers import Cli, Models, Result, cosine, listing

pytestmark = pytest.mark.slow


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = opened.run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


def test_export_onnx(cli: Cli, models: Models, bundle: Path, tmp_path: Path) -> None:
    before = listing(bundle)
    done = cli("export-onnx", bundle, "-o", "net.onnx", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert listing(bundle) == before
    assert listing(tmp_path) == {"net.onnx": done.json["files"]["net.onnx"]}
    assert (done.json["inputs"], done.json["outputs"], done.json["kept_in_fp32"]) == (["x"], ["output"], [])
    assert done.json["onnxruntime"]["layers"] == {"bf16": 2, "all": 3}
    x = models.x[:1]
    with torch.no_grad():
        assert cosine(run(tmp_path / "net.onnx", x), models.net(x)) >= 0.9999

    again = cli("export-onnx", bundle, "-o", "net.onnx", cwd=tmp_path)
    assert (again.code, again.out) == (2, "")
    assert "net.onnx: is there already" in again.err
    again = cli("export-onnx", bundle, "-o", "net.onnx", "--force", "--onnx-weights", "bf16", cwd=tmp_path)
    assert again.code == 0, again.err
    for said in ("Wrote net.onnx", "bf16", "2 of 3 layers", "mlas.enable_gemm_fastmath_arm64_bfloat16', '1'"):
        assert said in again.out
    assert (tmp_path / "net.onnx").stat().st_size < 0.6 * done.json["files"]["net.onnx"]
    with torch.no_grad():
        assert cosine(run(tmp_path / "net.onnx", x), models.net(x)) >= 0.9999

    plain = cli("export-onnx", bundle, "-o", "plain.onnx", "--onnx-plain", cwd=tmp_path)
    assert plain.code == 0, plain.err
    assert "mlas." not in plain.out


def test_optimize_with_onnx(cli: Cli, models: Models, tmp_path: Path) -> None:
    """The model is a file of the bundle, in a zip as well."""
    arguments = (models["dynamic.pt2"], "--batch", "1,4", "--onnx", "--onnx-weights", "bf16")
    done = cli("optimize", *arguments, "-o", "net.zip", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    described = {"file": "model.onnx", "opset": 20, "weights": "bf16", "bucket": {"batch": 4}}
    assert done.json["onnx"] == described
    with zipfile.ZipFile(tmp_path / "net.zip") as archive:
        archive.extract("model.onnx", tmp_path)
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["onnxruntime"]["model"] == described
    assert "model.onnx" in manifest["files"]
    with torch.no_grad():
        for batch in (1, 3):
            assert cosine(run(tmp_path / "model.onnx", models.x[:batch]), models.net(models.x[:batch])) >= 0.9999


def _refused(done: Result, *said: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    for words in said:
        assert words in done.err


def test_bad_input(cli: Cli, models: Models, bundle: Path, tmp_path: Path) -> None:
    """One line that says what, where and the next step; nothing is left behind."""
    x = ("--model", "mynets.nets:bessel", "--input", "x=2x16")
    lacks = ("mynets/nets.py:", "ONNX has no form of aten.special_bessel_j0")
    _refused(cli("optimize", *x, "--onnx", "-o", "b.armopt", cwd=tmp_path), *lacks)
    _refused(cli("export-onnx", bundle, "-o", "n.onnx", "--onnx-weights", "int8", cwd=tmp_path), "'int8'", "fp16")
    _refused(cli("optimize", *x, "--onnx-weights", "int8", "-o", "b.armopt", cwd=tmp_path), "'int8'", "--onnx-weights")
    _refused(cli("export-onnx", "none", "-o", "n.onnx", cwd=tmp_path), "none", "no such bundle")
    _refused(cli("export-onnx", models["static.pt2"], "-o", "n.onnx", cwd=tmp_path), "static.pt2", "not a bundle")
    _refused(cli("export-onnx", bundle, "-o", "none/n.onnx", cwd=tmp_path), "none", "mkdir -p")
    assert list(tmp_path.iterdir()) == []
    assert cli("optimize", *x, "-o", "b.armopt", cwd=tmp_path).code == 0
    before = listing(tmp_path)
    _refused(cli("export-onnx", "b.armopt", "-o", "n.onnx", cwd=tmp_path), *lacks)
    assert listing(tmp_path) == before
