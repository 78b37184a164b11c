"""`armopt validate`, and what `armopt optimize` checks: gates, tasks, inputs, repair, reports, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_helpers import Cli, Models, listing
from PIL import Image
from safetensors.torch import save_file

from tests.sampling import sampled

#: Arguments of `armopt validate BUNDLE`, and words that its message must hold.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown metric": (("--gate", "topl>=1"), ("--gate", "'topl'", "top1")),
    "no gate": (("--gate", "top1"), ("--gate", "'top1'", "top1>=0.995")),
    "a bound that is none": (("--gate", "top1>=much"), ("--gate", "much", "number")),
    "the wrong side": (("--gate", "top1<=0.9"), ("--gate", "top1>=0.9")),
    "another task's metric": (("--gate", "miou>=0.9"), ("miou", "classification", "--task segmentation")),
    "unknown output": (("--gate", "cosine[logit]>=0.9"), ("cosine[logit]", "output")),
    "unknown task": (("--task", "clasification"), ("--task", "clasification", "classification")),
    "a task that doesn't fit": (("--task", "detection"), ("--task", "detection", "boxes")),
    "missing inputs": (("--inputs", "none.npz"), ("none.npz", "no such file")),
    "empty folder": (("--inputs", "{b}/empty"), ("empty", "no images", ".jpg", ".npz")),
    "folder of something else": (("--inputs", "{b}/notes"), ("notes", "no images")),
    "images and tensors": (("--inputs", "{b}/mixed"), ("mixed", "both")),
    "a broken image": (("--inputs", "{b}/broken"), ("broken.png", "image")),
    "inputs of another shape": (("--inputs", "{b}/shape.safetensors"), ("x", "1x3x9x9", "1x3x16x16")),
    "inputs of another dtype": (("--inputs", "{b}/dtype.safetensors"), ("x", "float64", "float32")),
    "inputs of another name": (("--inputs", "{b}/name.safetensors"), ("name.safetensors", "lacks x")),
    "one input too many": (("--inputs", "{b}/more.safetensors"), ("'y'", "It takes x")),
    "a class without its weights": (("--model", "mynets.nets:net"), ("--model", "--against")),
    "an original that is missing": (("--against", "none.pt2"), ("none.pt2", "no such file")),
    "an original with other inputs": (("--against", "{m}/two.pt2"), ("two.pt2", "no input 'x'", "tokens, context")),
    "an original with other weights": (("--against", "{b}/other.pt2"), ("other.pt2", "conv", "other weights")),
    "no place for a report": (("--report", "none/report.html"), ("none", "mkdir -p")),
    "a folder for a report": (("--report", "{b}"), ("--report", "is a folder")),
}


@pytest.fixture(scope="module")
def bad(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mynets import nets

    folder = tmp_path_factory.mktemp("bad")
    for name in ("empty", "notes", "mixed", "broken"):
        (folder / name).mkdir()
    (folder / "notes" / "notes.txt").write_text("x")
    picture = Image.new("RGB", (20, 20))
    picture.save(folder / "mixed" / "a.png")
    np.savez(folder / "mixed" / "b.npz", x=np.zeros(1))
    (folder / "broken" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    x = models.x[:1]
    save_file({"x": torch.zeros(1, 3, 9, 9)}, folder / "shape.safetensors")
    save_file({"x": x.double()}, folder / "dtype.safetensors")
    save_file({"z": x}, folder / "name.safetensors")
    save_file({"x": x, "y": x.clone()}, folder / "more.safetensors")
    torch.manual_seed(5)
    torch.export.save(torch.export.export(nets.Net().eval(), (x,)), folder / "other.pt2")
    return folder


@pytest.mark.parametrize("name", sampled(CASES, 3))
def test_what_can_not_be_is_one_line(
    name: str, bundle: Path, models: Models, bad: Path, cli: Cli, tmp_path: Path
) -> None:
    arguments, words = (
        [text.replace("{m}", str(models.folder)).replace("{b}", str(bad)) for text in texts] for texts in CASES[name]
    )
    done = cli("validate", bundle, *arguments, "--json", cwd=tmp_path)
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = done.err.strip().splitlines()
    assert line.startswith("armopt: ")
    for word in words:
        assert word in line
    assert listing(tmp_path) == {}


def test_everything_at_once(models: Models, cli: Cli, tmp_path: Path) -> None:
    """From a state dict to a report, on the user's images."""
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        pixels = generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    gates = ("--gate", "top5>=0.9", "--gate", "sqnr[output]>=30")
    done = cli(
        *("optimize", models["state.pt"], "--model", "mynets.nets:net", "--input", "x=2x3x16x16", "-o", "b"),
        *("--check-inputs", "photos", "--keep-reference", "--report", "made.html", *gates),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert "inputs    yours: photos (4 images; prepared as for ImageNet" in done.out
    assert "passed (cosine>=0.99, top5>=0.9, sqnr[output]>=30)" in done.out
    assert (tmp_path / "b" / "reference.safetensors").is_file()

    arguments = ("validate", "b", "--inputs", "photos", *gates, "--report", "seen.html")
    done = cli(*arguments, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.json
    assert found["passed"] is True
    assert [gate["gate"] for gate in found["gates"]] == ["cosine>=0.99", "top5>=0.9", "sqnr[output]>=30"]
    assert (found["samples"], found["inputs_given"], found["report"]) == (2, True, "seen.html")
    assert found["task"]["name"] == "classification"
    assert {entry["node"] for entry in found["nodes"]} == {"conv", "hidden", "head"}
    for name in ("made.html", "seen.html"):
        text = (tmp_path / name).read_text()
        assert text.index("Passed") < text.index("top5&gt;=0.9")
        assert "0.png" in text

    done = cli(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert "Inputs: yours: photos (4 images" in done.out
    assert "passed: cosine" in lines[-2]
    assert lines[-1] == "Wrote seen.html."
    assert len(lines) <= 40  # one screen
    assert max(map(len, lines[3:])) <= 120


def test_a_gate_that_fails(bundle: Path, cli: Cli, tmp_path: Path) -> None:
    done = cli("validate", bundle, "--gate", "max_abs<=1e-9", "--report", "report.html", "--json", cwd=tmp_path)
    assert done.code == 4
    assert "max_abs is " in done.err
    assert "the gate is <=1e-09" in done.err
    assert done.json["passed"] is False
    assert [gate["passed"] for gate in done.json["gates"]] == [True, False]
    assert "Failed: not to be deployed" in (tmp_path / "report.html").read_text()


def test_repair_and_no_repair(models: Models, cli: Cli, tmp_path: Path) -> None:
    arguments = ("optimize", models["static.pt2"], "-o", "b", "--force", "--gate", "sqnr>=75", "--json")
    done = cli(*arguments, "--no-repair", cwd=tmp_path)
    assert done.code == 4
    assert "sqnr is " in done.err
    assert done.json["accuracy"]["repair"] is None
    assert "NOT deployable" in cli("inspect", "b", cwd=tmp_path).out

    done = cli(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["accuracy"]["passed"] is True
    changed = {change["node"] for change in done.json["accuracy"]["repair"]["changes"]}
    found = cli("inspect", "b", "--json", cwd=tmp_path).json
    assert {node["name"] for node in found["nodes"] if node["reason"].startswith("repaired")} == changed
    assert changed
    done = cli("validate", "b", "--against", models["static.pt2"], "--gate", "sqnr>=75", cwd=tmp_path)
    assert done.code == 0, done.err


def test_a_model_that_gives_nan(cli: Cli, models: Models, package: Path, tmp_path: Path) -> None:
    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.fc(x) - 100).sqrt()

    torch.export.save(torch.export.export(Root().eval(), (torch.ones(2, 8),)), tmp_path / "nan.pt2")
    done = cli("optimize", "nan.pt2", "-o", "b", cwd=tmp_path)
    assert done.code == 2
    (line,) = done.err.strip().splitlines()
    assert "nan.pt2: gives nothing but NaN in FP32 on these inputs: output" in line
    assert "--inputs" in line
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pt2"]


BRANCHY = """
import torch


class Branchy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        y = self.first(x)
        return self.second(-y if torch.compiler.is_compiling() else y), y.topk(3).indices


def make():
    torch.manual_seed(0)
    return Branchy().eval()
"""


def test_a_capture_that_is_not_the_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "branchy.py").write_text(BRANCHY)
    model = ("--model", "branchy:make", "--input", "x=32x8")
    done = cli("optimize", *model, "-o", "b", cwd=tmp_path)
    assert done.code == 4
    for word in ("the capture is not the model: output 0 differs by", "first in second (Linear)", "is_compiling()"):
        assert word in done.err
        assert word in done.out
    assert "NOT deployable" in cli("inspect", "b", cwd=tmp_path).out
    assert cli("validate", "b", cwd=tmp_path).code == 4

    done = cli("optimize", *model, "-o", "b", "--force", "--against", "capture", cwd=tmp_path)
    assert done.code == 0, done.err
    done = cli("optimize", *model, "-o", "c", "--against", "graph", cwd=tmp_path)
    assert (done.code, "can't compare with 'graph'" in done.err) == (2, True)
