"""Layers that users keep in FP32, and rows that depend on no other row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt.cli.app import app
from armopt.compiler.captured_model import capture_model
from armopt.compiler.checks import Checks
from armopt.compiler.recipe import Recipe
from armopt.errors import InputError
from armopt.ir.records import Precision, Site, Target
from armopt.plan import planner

HERE = "tests.unit.test_pinning"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, 128)
        self.layers = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
        self.head = nn.Linear(128, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layers(self.embed(ids)))
        return result


class Mixing(nn.Module):
    """A row's result depends on the rows beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        return y - y.mean(0, keepdim=True)


class Whole(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x)
        return y.mean(0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
def test_named_layers_stay_in_fp32_with_the_reason(tmp_path: Path) -> None:
    checks = Checks(keep_fp32=("layers.2", "h*d", "embed"))
    written = armopt.optimize(net(), (IDS,), output=tmp_path / "b", checks=checks).require().manifest
    decided = {node.node: node for node in written.plan[0].nodes}
    assert decided["layers_0"].precision == Precision.BF16
    assert decided["layers_2"].precision == decided["head"].precision == Precision.FP32
    assert decided["head"].reason == "kept in FP32, as 'h*d' says"
    assert {row.node: row.reason for row in written.not_in_bf16[0].products}["layers_2"].startswith("kept in FP32")
    stored = load_file(tmp_path / "b" / "weights.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in stored.items() if tensor.dim() > 1}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "layers_2_weight",
        "head_weight",
        "embed_weight",
    }


def test_of_all_layers_the_bundle_is_the_model(tmp_path: Path) -> None:
    armopt.optimize(net(), (IDS,), output=tmp_path / "b", checks=Checks(keep_fp32=("*",)))
    with pytest.warns(armopt.ArmoptWarning):
        loaded = armopt.load(tmp_path / "b")
    torch.testing.assert_close(loaded(IDS), net()(IDS), rtol=1e-5, atol=1e-6)


def test_plan_shows_it_and_an_unknown_pattern_names_what_is_near() -> None:
    asked = ["plan", "--model", f"{HERE}:net", "--input", "ids=4x32:int64:4096", "--keep-fp32"]
    shown = CliRunner().invoke(app, [*asked, "layers.*"])
    assert shown.output.count("kept in FP32, as 'layers.*' says") == 4  # two layers, in both tables
    error = CliRunner().invoke(app, [*asked, "layer.2"]).exception
    assert isinstance(error, InputError)
    assert "no layer is called 'layer.2'. Did you mean layers_2" in str(error)
    with pytest.raises(InputError, match=r"no sequence of patterns.*keep_fp32=\("):
        Checks(keep_fp32="head")  # type: ignore[arg-type]


class Asked:
    """A policy that chooses plain ATen, and keeps what it was asked."""

    name = "asked"

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[planner.Choice]:
        self.sites += sites
        return [planner.Choice(None, "asked") for _ in sites]


@pytest.mark.parametrize(("keep", "pinned"), [((), set()), (("head",), {"head"}), (("*.2", "none"), {"layers_2"})])
def test_a_pinned_neighbour_costs_casts_as_any_operation_in_fp32(keep: tuple[str, ...], pinned: set[str]) -> None:
    """The policy does not see pinned layers, and what they read is wanted in FP32."""
    reads = {"layers_0": "layers_2", "layers_2": "head", "head": None}
    policy = Asked()
    recipe = replace(Recipe.of("graviton3", policy), keep_fp32=keep)
    (part,) = capture_model(net(), (IDS,)).parts
    assert recipe.plan_part(part).plans[0].pinned == pinned
    free = {node: reader is None or reader in pinned for node, reader in reads.items() if node not in pinned}
    assert {site.node: site.escapes for site in policy.sites} == free


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
def test_a_compiled_model_and_the_backend_keep_them_too() -> None:
    made = armopt.compile(net(), (IDS,), target="graviton3", checks=Checks(keep_fp32=("head", "layers.0")))
    layers = armopt.explain(made).layers
    assert len(layers) == 3
    assert sum(each.precision == Precision.FP32 and "kept in FP32" in each.reason for each in layers) == 2
    with pytest.raises(InputError, match=r"no layer is called 'heads'\. Did you mean head"):
        armopt.compile(net(), target="graviton3", checks=Checks(keep_fp32=("heads",)))
    torch._dynamo.reset()
    run = torch.compile(net(), backend="armopt", options={"target": "graviton3", "keep_fp32": ["*"]})
    with torch.no_grad():
        torch.testing.assert_close(run(IDS), net()(IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
@pytest.mark.parametrize("batch", [(1, 8), (4,), (1,)])
def test_a_row_alone_is_the_row_among_others_to_the_bit(tmp_path: Path, batch: tuple[int, ...]) -> None:
    armopt.optimize(net(), (IDS,), batch=batch, output=tmp_path / "b", checks=Checks(batch_invariant=True)).require()
    loaded = armopt.load(tmp_path / "b")
    assert [each.bucket for each in loaded.manifest.plan] == [{"batch": max(batch)}]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "b")]).output
    assert f"rows      {max(batch)} in each run" in shown
    ids = torch.randint(0, 4096, (19, 32))
    alone = torch.cat([loaded(row[None]) for row in ids])
    for rows in (1, 2, 3, 7, 8, 9, 19):
        assert torch.equal(loaded(ids[:rows]), alone[:rows])
    assert loaded(ids[:0]).shape == (0, 32, 64)
    cosine = torch.nn.functional.cosine_similarity(alone.flatten(), net()(ids).flatten(), 0)
    assert cosine > 0.999


def test_by_the_command_line_and_refused_with_the_reason(tmp_path: Path) -> None:
    asked = ["optimize", "--model", f"{HERE}:net", "--input", "ids=4x32:int64:4096", "--batch-invariant"]
    done = CliRunner().invoke(app, [*asked, "--batch", "8", "-o", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "kernels   at batch 8:" in done.output
    error = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "c")]).exception
    assert "the model has no dynamic batch. Give batch (--batch), or" in str(error)
    asks = Checks(batch_invariant=True)
    x = (torch.randn(2, 16),)
    with pytest.raises(InputError, match=r"row 0 of output 0 is another among \d+ rows than alone"):
        armopt.optimize(Mixing().eval(), x, batch=(1, 4), output=tmp_path / "m", checks=asks)
    with pytest.raises(InputError, match=r"output 0 has shape \[16\], whose first dimension alone has to be the batch"):
        armopt.optimize(Whole().eval(), x, batch=(1, 4), output=tmp_path / "w", checks=asks)
