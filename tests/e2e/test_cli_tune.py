"""`armopt tune` on this host, and what follows from its file."""

from __future__ import annotations

import json
from pathlib import Path

from e2e_helpers import Cli


def test_tune_then_optimize_and_load(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    done = cli("tune", bundle, "-o", "t.json", "--rounds", "3", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["seconds"] == json.loads((tmp_path / "t.json").read_text())["seconds"]
    assert any(json.loads(key)["op"] == "conv" for key in said["seconds"])
    assert all("aten" in "".join(times) for times in said["seconds"].values())  # every site has at least plain ATen

    shown = cli("tune", bundle, "-o", "t.json", "--rounds", "3", cwd=tmp_path)
    assert "1.00x" in shown.out
    assert "--tuning t.json" in shown.out


def test_a_bundle_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    done = cli("tune", "nothing", cwd=tmp_path)
    assert done.code == 2
    assert done.err.startswith("armopt: nothing: there is no such bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_tuning_file_decides_the_plan(cli: Cli, tmp_path: Path) -> None:
    model = ("--model", "torchvision:squeezenet1_1", "--input", "1x3x64x64", "--target", "host")
    assert cli("optimize", *model, "-o", "b", cwd=tmp_path).code == 0
    assert cli("tune", "b", "--rounds", "3", cwd=tmp_path).code == 0
    made = cli("plan", *model, "--tuning", "tuning.json", "--json", cwd=tmp_path)
    assert made.code == 0, made.err
    plan = json.loads(made.out)["buckets"][0]
    assert plan["policy"].startswith("cost (tuned on ")
    assert all(" us here" in node["reason"] for node in plan["nodes"])


def test_a_file_that_is_no_tuning_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    done = cli("plan", "--model", "torchvision:squeezenet1_1", "--tuning", "t.json", cwd=tmp_path)
    assert done.code == 2
    assert "is no tuning file" in done.err
    assert "armopt tune" in done.err
