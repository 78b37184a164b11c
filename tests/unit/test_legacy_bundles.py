"""Bundles that earlier versions wrote (tests/data/bundles), of schema 1 and 2: they load and compute what they did."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import armopt
from armopt.bundle import manifest, reader, writer
from armopt.cli import app
from armopt.errors import BundleError
from tests.hashed_manifest import hashed

FOLDER = Path(__file__).parents[1] / "data" / "bundles"
GRAPH, MODULE = FOLDER / "schema1.zip", FOLDER / "schema2.zip"
#: What they computed was stored on one CPU; another one sums in another order.
NEAR = {"rtol": 1e-5, "atol": 1e-6}
pytestmark = pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")


class Router(torch.nn.Module):
    """What schema2.zip was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.look = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU())
        self.ways = torch.nn.ModuleList([torch.nn.Linear(32, 4), torch.nn.Linear(32, 4)])

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        hidden = self.look(x) * self.scale
        return OrderedDict(y=self.ways[int(hidden.sum() > 70)](hidden))


def test_one_graph() -> None:
    tensors = load_file(FOLDER / "schema1.safetensors")
    found = armopt.load(GRAPH)(tensors["x"], scale=tensors["scale"])
    assert list(found) == ["logits", "hidden"]
    for name in found:
        torch.testing.assert_close(found[name], tensors[name], **NEAR)


def test_submodules() -> None:
    tensors = load_file(FOLDER / "schema2.safetensors")
    found = armopt.load(MODULE, model=Router)(tensors["x"])
    torch.testing.assert_close(found["y"], tensors["y"], **NEAR)


def test_its_fp32_original() -> None:
    assert armopt.validate(GRAPH)["reference"] == "the model in FP32, as the bundle keeps it (batch norm folded)"


@pytest.mark.parametrize("path", [GRAPH, MODULE], ids=["graph", "module"])
def test_the_commands(path: Path) -> None:
    shown = json.loads(CliRunner().invoke(app.app, ["inspect", str(path), "--json"]).stdout)
    with zipfile.ZipFile(path) as archive:
        stored = json.loads(archive.read("manifest.json"))
    for name in ("model", "accuracy", "environment", "versions", "files", "target"):
        assert shown[name] == stored[name]
    nodes = [{key: node[key] for key in node if key not in ("part", "bucket")} for node in shown["nodes"]]
    for found, wanted in zip(nodes, (node for plan in stored["plan"] for node in plan["nodes"]), strict=True):
        assert found == {"name": wanted["node"], **{key: wanted[key] for key in found if key != "name"}}
    assert CliRunner().invoke(app.app, ["env", str(path)]).exit_code == 0


@pytest.mark.parametrize("path", [GRAPH, MODULE], ids=["graph", "module"])
def test_written_again_it_is_of_the_present_schema(path: Path, tmp_path: Path) -> None:
    old = reader.read(path, reference=True)
    described = writer.replace(old.manifest, schema_version=manifest.SCHEMA_VERSION)
    writer.write(tmp_path / "new", described, old.parts, {}, rest=old.rest, reference=old.reference)
    new = reader.read(tmp_path / "new", reference=True)
    assert new.manifest.schema_version == 3
    assert [part.signature for part in new.parts] == [part.signature for part in old.parts]
    assert (new.manifest.model, new.manifest.plan) == (old.manifest.model, old.manifest.plan)
    for a, b in zip(old.programs, new.programs, strict=True):
        assert [str(n) for n in a.graph_module.graph.nodes] == [str(n) for n in b.graph_module.graph.nodes]


def test_the_first_bundles_had_one_gate() -> None:
    with zipfile.ZipFile(GRAPH) as archive:
        content = json.loads(archive.read("manifest.json"))
    for name in ("gates", "inputs", "inputs_given", "task", "repair"):
        del content["accuracy"][name]
    found = manifest.from_bytes(hashed(content), "m")
    assert [gate.gate for gate in found.accuracy.gates] == ["cosine>=0.99"]
    assert found.accuracy.repair is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content["model"].pop("inputs"),
        lambda content: content.update(model=[]),
        lambda content: content.update(plan=[3]),
        lambda content: content.update(plan=None),
        lambda content: content.update(onnxruntime="none"),
        lambda content: content.update(accuracy={}),
        lambda content: content.update(schema_version=True),
        lambda content: content["model"].update(kind="module"),
    ],
)
def test_what_fits_neither_schema_is_an_error_of_ours(change: Callable[[dict[str, Any]], Any]) -> None:
    with zipfile.ZipFile(GRAPH) as archive:
        content = json.loads(archive.read("manifest.json"))
    change(content)
    with pytest.raises(BundleError):
        manifest.from_bytes(hashed(content), "m")
