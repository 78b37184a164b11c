"""Every kind of model file and of example inputs, through the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e_helpers import ROOT, Cli, Models, armopt, cosine, environment, listing
from safetensors.torch import save_file
from torch import Tensor

import armopt as api

NET = ("--model", "mynets.nets:net")
TWO = ("--model", "mynets.nets:two_inputs")
X = ("--input", "x=1x3x16x16")

pytestmark = pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")


def load(bundle: Path) -> api.load:
    return api.load(bundle)


def expected(model: torch.nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor | dict[str, Tensor]:
    with torch.no_grad():
        return model(*args, **kwargs)


KINDS = {
    "pt2": ("static.pt2",),
    "torchscript": ("script.pt", *X),
    "pickle": ("module.pt", "--trust-pickle", *X),
    "state dict": ("state.pt", *NET, *X),
    "state dict in the old format": ("legacy.pt", *NET, *X),
    "state dict one level down": ("nested.pt", *NET, *X),
    "state dict in safetensors": ("state.safetensors", *NET, *X),
    "input without a name": ("state.pt", *NET, "--input", "1x3x16x16:float32"),
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_each_kind_of_file(arguments: tuple[str, ...], models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models[arguments[0]], *arguments[1:], "-o", tmp_path / "b", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    # 1 is exact; the bundle's BF16 rounds weights to 8 bits, an error of 2^-9 each that averages out.
    assert done.json["accuracy"]["cosine"] >= 0.999
    assert done.json["weights_bytes"] <= 0.51 * done.json["fp32_weights_bytes"]
    model = load(tmp_path / "b")
    for _ in range(2):  # the second call finds what the first may have kept
        assert cosine(model(models.x[:1]), expected(models.net, models.x[:1])) >= 0.999
    assert cosine(model(x=models.x[1:2]), expected(models.net, models.x[1:2])) >= 0.999


def test_reference_without_a_file_found_in_the_current_folder(models: Models, package: Path, tmp_path: Path) -> None:
    armopt("optimize", *NET, *X, "-o", tmp_path / "b", cwd=package)  # no PYTHONPATH: the folder itself
    assert cosine(load(tmp_path / "b")(models.x[:1]), expected(models.net, models.x[:1])) >= 0.999


def test_torchvision_reference_has_inputs_of_its_own(cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", "--model", "torchvision:squeezenet1_1", "-o", "b", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert load(tmp_path / "b").manifest.model.inputs[0].shape == (1, 3, 224, 224)


def test_torchvision_state_dict(cli: Cli, tmp_path: Path) -> None:
    from armopt.models import references

    torch.manual_seed(0)
    model = references.resolve("torchvision:squeezenet1_1")().eval()
    torch.save(model.state_dict(), tmp_path / "s.pt")
    arguments = ("--model", "torchvision:squeezenet1_1", "--input", "x=1x3x64x64")
    done = cli("optimize", "s.pt", *arguments, "-o", "b", cwd=tmp_path)
    assert done.code == 0, done.err
    x = torch.randn(1, 3, 64, 64)
    assert cosine(load(tmp_path / "b")(x), expected(model, x)) >= 0.999


def test_dynamic_pt2_takes_any_batch(models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models["dynamic.pt2"], "-o", "b", cwd=tmp_path)
    assert done.code == 0, done.err
    model = load(tmp_path / "b")
    for size in (1, 3, 4):
        assert cosine(model(models.x[:size]), expected(models.net, models.x[:size])) >= 0.999


BUCKETS = {"pt2": ("dynamic.pt2",), "state dict": ("state.pt", *NET, *X), "module": ("module.pt", "--trust-pickle", *X)}


@pytest.mark.parametrize("arguments", BUCKETS.values(), ids=BUCKETS)
def test_batch_buckets(arguments: tuple[str, ...], models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models[arguments[0]], *arguments[1:], "--batch", "1,128", "-o", "b", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [each["bucket"] for each in done.json["buckets"]] == [{"batch": 1}, {"batch": 128}]
    small, large = (each["kernels"] for each in done.json["buckets"])
    assert small != large  # 64 rows are the threshold
    model = load(tmp_path / "b")
    for size in (1, 3, 128):
        x = models.x[:1].repeat(size, 1, 1, 1) + torch.randn(size, 1, 1, 1)
        assert cosine(model(x), expected(models.net, x)) >= 0.999


def test_one_batch_size_is_a_static_bundle(models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models["state.pt"], *NET, *X, "--batch", "4", "-o", "b", cwd=tmp_path)
    assert done.code == 0, done.err
    model = load(tmp_path / "b")
    assert model.manifest.model.inputs[0].shape == (4, 3, 16, 16)
    assert cosine(model(models.x), expected(models.net, models.x)) >= 0.999
    with pytest.raises(api.ArmoptError, match="expected shape 4x3x16x16, found 1x3x16x16"):
        model(models.x[:1])


class TestSeveralInputs:
    """tokens and context have one shape: a bundle that mixed them up would run, and be wrong."""

    @staticmethod
    def check(bundle: Path, models: Models) -> None:
        model = load(bundle)
        wanted = expected(models.two, models.tokens, models.context)
        calls = (
            model(models.tokens, models.context),
            model(models.tokens, context=models.context),
            model(tokens=models.tokens, context=models.context),
            model(context=models.context, tokens=models.tokens),
        )
        for found in calls:
            assert list(found) == list(wanted) == ["result", "mean"]
            assert all(cosine(found[name], wanted[name]) >= 0.999 for name in wanted)

    def test_pt2_exported_with_keywords(self, models: Models, cli: Cli, tmp_path: Path) -> None:
        done = cli("optimize", models["two.pt2"], "-o", "b", cwd=tmp_path)
        assert done.code == 0, done.err
        model = load(tmp_path / "b")
        found = model(context=models.context, tokens=models.tokens)
        wanted = expected(models.two, models.tokens, models.context)
        assert all(cosine(found[name], wanted[name]) >= 0.999 for name in wanted)

    @pytest.mark.parametrize(
        "inputs",
        [("tokens=4x16", "context=4x16"), ("context=4x16", "tokens=4x16"), ("4x16", "4x16"), ("4x16", "context=4x16")],
        ids=["named", "named in another order", "by position", "mixed"],
    )
    def test_described(self, inputs: tuple[str, ...], models: Models, cli: Cli, tmp_path: Path) -> None:
        described = [part for text in inputs for part in ("--input", text)]
        done = cli("optimize", models["two.pt"], *TWO, *described, "-o", "b", cwd=tmp_path)
        assert done.code == 0, done.err
        self.check(tmp_path / "b", models)

    @pytest.mark.parametrize("kind", ["safetensors", "npz", "pt"])
    def test_samples_from_a_file(self, kind: str, models: Models, cli: Cli, tmp_path: Path) -> None:
        samples = {"tokens": models.tokens, "context": models.context}
        path = tmp_path / f"sample.{kind}"
        if kind == "safetensors":
            save_file(samples, path)
        elif kind == "npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in samples.items()})
        else:
            torch.save(samples, path)
        done = cli("optimize", models["two.pt"], *TWO, "--inputs", path, "-o", "b", cwd=tmp_path)
        assert done.code == 0, done.err
        self.check(tmp_path / "b", models)
        done = cli("validate", "b", "--inputs", path, "--against", models["two.pt"], *TWO, "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.json["inputs"] == str(path)
        assert done.json["cosine"] >= 0.999

    def test_wrong_calls_say_what_the_model_takes(self, models: Models, cli: Cli, tmp_path: Path) -> None:
        cli("optimize", models["two.pt"], *TWO, "--input", "4x16", "--input", "4x16", "-o", "b", cwd=tmp_path)
        model = load(tmp_path / "b")
        with pytest.raises(api.ArmoptError, match="context"):
            model(models.tokens)
        with pytest.raises(api.ArmoptError, match="float32, found float64"):
            model(models.tokens, models.context.double())
        with pytest.raises(api.ArmoptError, match="takes no input other"):
            model(models.tokens, models.context, other=models.tokens)


def test_zip_is_the_same_bundle(models: Models, cli: Cli, tmp_path: Path) -> None:
    for name in ("b", "b.zip"):
        done = cli("optimize", models["static.pt2"], "-o", name, cwd=tmp_path)
        assert done.code == 0, done.err
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    assert packed == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    x = models.x[:1]
    assert torch.equal(load(tmp_path / "b.zip")(x), load(tmp_path / "b")(x))
    for command in ("inspect", "validate", "env"):
        assert cli(command, "b.zip", "--json", cwd=tmp_path).code == 0
        assert cli(command, "b.zip", cwd=tmp_path).code == 0


def test_force_replaces_a_bundle(models: Models, cli: Cli, tmp_path: Path) -> None:
    for target in ("graviton3", "graviton2"):
        done = cli("optimize", models["static.pt2"], "-o", "b", "--force", "--target", target, cwd=tmp_path)
        assert done.code == 0, done.err
    assert cli("inspect", "b", "--json", cwd=tmp_path).json["target"] == "graviton2"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_target_without_bf16_keeps_fp32(models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("optimize", models["static.pt2"], "-o", "b", "--target", "graviton2", "--json", cwd=tmp_path)
    assert done.json["weights_bytes"] <= done.json["fp32_weights_bytes"]
    assert done.json["accuracy"]["cosine"] > 1 - 1e-9  # nothing is rounded; batch norm is folded in FP32
    nodes = cli("inspect", "b", "--json", cwd=tmp_path).json["nodes"]
    assert {node["precision"] for node in nodes} == {"fp32"}
    assert all("bf16" not in node["kernel"] for node in nodes)


def test_same_model_gives_the_same_bundle(models: Models, cli: Cli, tmp_path: Path) -> None:
    for name in ("first", "second"):
        cli("optimize", models["static.pt2"], "-o", name, cwd=tmp_path)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


class TestJson:
    """--json: one object on stdout, whatever else is said goes to stderr."""

    def test_inspect_has_what_the_design_promises(self, bundle: Path, cli: Cli) -> None:
        found = cli("inspect", bundle, "--json", cwd=bundle.parent).json
        assert found["target"] == "graviton3"
        assert found["nodes"]
        for node in found["nodes"]:
            assert {"name", "op", "shape", "kernel", "precision", "reason"} <= node.keys()
            assert node["reason"]
        assert isinstance(found["weights_bytes"], int)
        assert isinstance(found["fp32_weights_bytes"], int)
        assert all({"name", "reason"} <= entry.keys() for entry in found["refused"])
        assert 0.99 <= found["accuracy"]["cosine"] <= 1

    def test_every_command(self, bundle: Path, models: Models, cli: Cli, tmp_path: Path) -> None:
        commands = (
            ("optimize", models["static.pt2"], "-o", tmp_path / "b"),
            ("plan", models["static.pt2"]),
            ("inspect", bundle),
            ("validate", bundle),
            ("validate", bundle, "--against", models["static.pt2"]),
            ("env", bundle),
            ("targets",),
        )
        for command in commands:
            done = cli(*command, "--json", cwd=tmp_path)
            assert done.code == 0, done.err
            assert done.json, command  # parses stdout whole
            assert "Traceback" not in done.err

    def test_refused_nodes_are_listed_with_a_reason(self, package: Path, cli: Cli, tmp_path: Path) -> None:
        (package / "mynets" / "deform.py").write_text(
            "import torch\n\n\nclass Attend(torch.nn.Module):\n    def forward(self, x):\n"
            "        return torch.matmul(x, x.transpose(1, 2))\n"
        )
        arguments = ("--model", "mynets.deform:Attend", "--input", "x=1x8x8", "-o", "b", "--json")
        done = cli("optimize", *arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        assert all(entry["reason"] for entry in done.json["refused"])
        load(tmp_path / "b")(torch.randn(1, 8, 8))


def test_plan_decides_as_optimize_and_writes_nothing(models: Models, cli: Cli, bundle: Path, tmp_path: Path) -> None:
    before = listing(models.folder)
    planned = cli("plan", models["static.pt2"], "--json", cwd=tmp_path)
    assert planned.code == 0, planned.err
    assert listing(tmp_path) == {}
    assert listing(models.folder) == before
    (bucket,) = planned.json["buckets"]
    done = cli("inspect", bundle, "--json", cwd=tmp_path).json["nodes"]
    keys = ("kernel", "precision", "reason")
    assert [{key: node[key] for key in keys} for node in bucket["nodes"]] == [
        {key: node[key] for key in keys} for node in done
    ]
    text = cli("plan", models["static.pt2"], "--target", "graviton2", cwd=tmp_path)
    assert text.code == 0
    assert "conv_fp32" in text.out


def test_policy_threshold_moves_the_border(models: Models, cli: Cli, tmp_path: Path) -> None:
    def kernels(policy: str) -> list[str]:
        done = cli("plan", models["static.pt2"], "--policy", policy, "--json", cwd=tmp_path)
        return [node["kernel"] for node in done.json["buckets"][0]["nodes"] if node["op"] == "linear"]

    assert all("blas" in kernel for kernel in kernels("threshold"))
    assert all("conv1x1" in kernel for kernel in kernels("threshold=1"))


def test_the_plan_names_rivals_and_draws_itself(models: Models, cli: Cli, tmp_path: Path) -> None:
    done = cli("plan", models["static.pt2"], "--policy", "cost=2.10", "--html", "p.html", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    (bucket,) = done.json["buckets"]
    assert bucket["policy"].startswith("cost (neoverse-v1, torch 2.10.0; time on 4 threads, within ")
    assert all(re.match(r"about [\d.]+ [um]s; \w+ [\d.]+x", node["reason"]) for node in bucket["nodes"])
    page = (tmp_path / "p.html").read_text()
    for node in bucket["nodes"]:
        assert f">{node['node']}<" in page
        assert node["kernel"] in page
    assert "src=" not in page
    assert "href=" not in page
    refused = cli("plan", models["static.pt2"], "--html", "missing/p.html", cwd=tmp_path)
    assert refused.code == 2
    assert "missing/p.html: can't be written" in refused.err


def test_second_process_needs_no_source(models: Models, cli: Cli, tmp_path: Path) -> None:
    """Isolated (-I): no current folder, no PYTHONPATH; the model's own package can't be imported."""
    done = cli("optimize", models["two.pt"], *TWO, "--input", "4x16", "--input", "4x16", "-o", "b", cwd=tmp_path)
    assert done.code == 0, done.err
    save_file({"tokens": models.tokens, "context": models.context}, tmp_path / "x.safetensors")
    script = """
import importlib.util, sys
from safetensors.torch import load_file, save_file
import armopt
assert importlib.util.find_spec("mynets") is None
result = armopt.load(sys.argv[1])(**load_file(sys.argv[2]))
assert "armopt.compiler" not in sys.modules and "torch.export" not in sys.modules.get("armopt.runtime").__dict__
save_file(result, sys.argv[3])
"""
    paths = [str(tmp_path / name) for name in ("b", "x.safetensors", "y.safetensors")]
    # check=True raises with the process's exit code; its stderr goes to pytest's capture
    subprocess.run([sys.executable, "-I", "-c", script, *paths], cwd="/", env=environment(), check=True, timeout=120)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "y.safetensors")
    first = load(tmp_path / "b")(models.tokens, models.context)
    assert all(torch.equal(first[name], found[name]) for name in first)


def test_the_command_is_the_checkouts(tmp_path: Path) -> None:
    """What these tests run is what they are about."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import armopt; print(armopt.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == ROOT / "armopt" / "__init__.py"
