"""One driver: a recipe's pipeline is a value, `optimize` returns what it wrote, and steps are told to who watches."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt import passes, progress
from armopt.cli import app
from armopt.compiler.graph_text import graph_text
from armopt.compiler.recipe import Recipe
from armopt.errors import AccuracyError, ArmoptWarning, InputError
from armopt.passes.pipeline import Pipeline
from tests.planning import captured_from, plan


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def operations(recipe: Recipe) -> list[str]:
    prepared = recipe.prepare(captured_from(model(), X).graph_module)
    return [str(node.target) for node in prepared.graph_module.graph.nodes if node.op == "call_function"]


def test_a_pass_can_be_left_out() -> None:
    whole = Recipe.of("graviton3")
    assert operations(whole) == ["armopt.conv.default", "aten.contiguous.default"]
    assert any("batch_norm" in name for name in operations(whole.without("FoldBatchNorm")))
    assert "aten.relu.default" in operations(whole.without("FusePointwise"))
    assert operations(whole) == ["armopt.conv.default", "aten.contiguous.default"]  # the recipe itself stays as it was


def test_passes_stop_where_they_are_told() -> None:
    pipeline = Pipeline().until("CanonicaliseConv")
    _, records = pipeline.prepare(captured_from(model(), X).graph_module)
    assert records[-1].name == "CanonicaliseConv"
    assert not pipeline.lowers
    _, planned = plan(model(), X)
    _, records = pipeline.lower(planned.prepared.graph_module, planned.plans[0], {})
    assert records == ()
    assert Pipeline().until("PackConv").lowers


def test_the_order_of_all_passes_is_known() -> None:
    names = Pipeline.names()
    assert len(set(names)) == len(names) == len(passes.PREPARE) + len(passes.LOWER)
    _, planned = plan(model(), X)
    _, records = Pipeline().lower(planned.prepared.graph_module, planned.plans[0], {})
    assert tuple(record.name for record in (*planned.records, *records)) == names


@pytest.mark.parametrize("change", [Pipeline().without, Pipeline().until, Recipe.of("graviton3").without])
def test_an_unknown_pass_is_named(change: object) -> None:
    with pytest.raises(InputError, match=r"there is no pass 'FoldBatchnorm'\. They are KeepStrides, "):
        change("FoldBatchnorm")  # type: ignore[operator]


def test_the_graph_is_printed_as_golden_files_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU()).eval()\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", "net:build", "--input", "2x16:float32", "--text"]
    until = CliRunner().invoke(app.app, [*words, "--until", "CanonicaliseLinear"])
    assert until.exit_code == 0, until.output
    assert until.stdout.splitlines() == [
        "_0_weight: f32[8,16] = weight",
        "_0_bias: f32[8] = weight",
        "input_1: f32[2,16] = input",
        "_0: f32[2,8] = armopt.linear.default(input_1, _0_weight, _0_bias, None, none, aten_linear, 0)",
        "relu: f32[2,8] = aten.relu.default(_0)",
        "return [relu]",
    ]
    lowered = CliRunner().invoke(app.app, [*words, "--batch", "2,64"])
    assert [line for line in lowered.stdout.splitlines() if line.startswith("at ")] == ["at batch=2:", "at batch=64:"]
    for more in (["--json"], ["--html", "plan.html"]):
        assert isinstance(CliRunner().invoke(app.app, [*words, *more]).exception, InputError)
    assert isinstance(CliRunner().invoke(app.app, [*words[:-1], "--until", "PackLinear"]).exception, InputError)
    assert graph_text(captured_from(nn.ReLU(), X).graph_module).endswith("return [relu]")


def test_a_gate_that_fails_is_in_the_result_and_never_silent(tmp_path: Path) -> None:
    checks = armopt.Checks(gates=("max_abs<0",), repair=False)
    with pytest.warns(ArmoptWarning, match="b is marked as not deployable: max_abs is "):
        result = armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), output=tmp_path / "b", checks=checks)
    assert not result.passed
    assert not result.manifest.accuracy.passed
    assert result.path == tmp_path / "b"
    with pytest.raises(AccuracyError, match="marked as not deployable"):
        result.require()


def test_a_gate_that_holds_raises_and_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = armopt.optimize(nn.Linear(4, 4).eval(), (torch.ones(2, 4),), output=tmp_path / "b")
    assert result.require() is result


def test_steps_are_told_to_who_watches_and_to_nobody_else(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    linear, x = nn.Linear(4, 4).eval(), (torch.ones(2, 4),)
    with progress.watched_by(lambda *step: told.append(step)):
        armopt.optimize(linear, x, output=tmp_path / "a")
    assert told == [
        *((name, i, 6) for i, name in enumerate(("capture", "prepare", "plan", "lower", "validate", "write"))),
        ("done", 6, 6),
    ]
    armopt.optimize(linear, x, output=tmp_path / "b")
    assert len(told) == 7
