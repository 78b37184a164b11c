"""What `armopt doctor` makes of facts and smoke tests; tests/arm64 has the real backends."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt import environment, targets
from armopt.cli import app
from armopt.deploy import doctor, smoke_tests
from armopt.environment.compare import Difference
from armopt.errors import BundleError
from armopt.runtime.bind import Bound

CPUINFO = Path(__file__).parents[1] / "data" / "cpuinfo"
PRODUCTS = sorted(p.stem for p in CPUINFO.glob("*.txt") if not p.stem.startswith(("qemu", "x86")))
#: What `record` gave on the emulated Graviton3 with torch 2.10.0 from PyPI.
FACTS = {
    "machine": "aarch64",
    "torch": "2.10.0+cpu",
    "torch_build": "cpu",
    "acl": "52.6.0",
    "allocator": "mimalloc",
    "blas": "OpenBLAS 0.3.30",
    "sbgemm": "yes",
    "onednn": "3.7.1",
    "threads": "2",
    "threads_for_host": "2",
    "thp": "madvise",
    "thp_switch": "none",
    "malloc": "libtcmalloc_minimal.so.4.5.10",
}
NVPL = {"torch": "2.13.0+cu130", "torch_build": "cuda 13.0", "blas": "NVPL", "sbgemm": "no", "onednn": "3.12.0"}
GOOD = {v: e.value for v, e in environment.wanted(targets.load("graviton3"), build=FACTS).items()}


NO_FAST_MATH = {"conv1x1_fastmath": "gemm:acl runs on f32 weights", "own": "no symbols"}


class Backends(smoke_tests.Backends):
    """Those of a good Arm server; what is in `wrong` fails with that message."""

    def __init__(self) -> None:
        self.wrong: dict[str, str] = {}

    def kernel(self, name: str) -> str:
        return self._answer(name, "gemm:acl on bf16 weights")

    def own(self, name: str) -> str:
        return self._answer("own", "indirect_gemm:acl")

    def blas_bf16(self, rows: int) -> str:
        return self._answer("gemv" if rows == 1 else "sbgemm", "sbgemm")

    def _answer(self, name: str, what: str) -> str:
        if name in self.wrong:
            raise smoke_tests.WrongError(self.wrong[name])
        return what

    def examine(self, on: str = "graviton3", environ: dict[str, str] | None = None, **facts: str) -> doctor.Report:
        host = targets.this_host((CPUINFO / f"{on}.txt").read_text())
        known = {name: value for name, value in (FACTS | facts).items() if value}
        return doctor.examine(host=host, environ=GOOD if environ is None else environ, facts=known, backends=self)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Backends:
    monkeypatch.setattr(environment, "late_variables", lambda names, environ: ())
    return Backends()


def named(report: doctor.Report) -> dict[str, Difference]:
    assert len({f.what for f in report.findings}) == len(report.findings)
    return {f.what: f for f in report.findings}


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_product_is_healthy_unless_it_lacks_bf16(product: str, backends: Backends) -> None:
    report = backends.examine(product)
    assert product in report.host["products"].split(", ")
    if targets.load(product).bf16:
        assert report.healthy
        assert report.findings == ()
        assert {c.status for c in report.checks} == {"ok"}
    else:
        found = named(report)
        assert set(found) == {"CPU features"}
        assert "armopt optimize --target" in found["CPU features"].remedy
        assert not report.healthy


def test_each_trouble_has_its_own_message(backends: Backends) -> None:
    texts = {}
    texts["bf16"] = str(named(backends.examine("altra"))["CPU features"])
    backends.wrong = NO_FAST_MATH
    unset = named(backends.examine(environ={}))
    assert "fast math" not in unset
    texts["unset"] = str(unset["DNNL_DEFAULT_FPMATH_MODE"])
    texts["lost"] = str(named(backends.examine())["fast math"])
    backends.wrong = dict.fromkeys(("conv1x1_bf16", "conv1x1_fastmath", "conv1x1_fp32"), "ref:any")
    texts["references"] = str(named(backends.examine())["oneDNN BF16"])
    assert str(named(backends.examine(acl=""))["oneDNN BF16"]) == texts["references"]
    backends.wrong = {}
    texts["nvpl"] = str(named(backends.examine(**NVPL))["BF16 in BLAS"])
    backends.wrong = {"sbgemm": "sbgemm gives wrong numbers: all zeros"}
    texts["zeros"] = str(named(backends.examine())["BF16 in BLAS"])
    backends.wrong = {"gemv": "BF16 gemv gives wrong numbers: all zeros"}
    texts["gemv"] = str(named(backends.examine())["BLAS BF16, one row"])
    assert len(set(texts.values())) == len(texts)
    assert "all zeros" in texts["zeros"]
    assert "NVPL has no sbgemm" in texts["nvpl"]


def test_what_was_set_late(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    late = (environment.FPMATH,)
    monkeypatch.setattr(environment, "late_variables", lambda names, environ: late)
    assert backends.examine().findings == ()  # late, but before torch was imported: it works, so nothing is wrong
    backends.wrong = NO_FAST_MATH
    found = named(backends.examine())
    assert set(found) == {"fast math", "own primitives"}
    assert found["fast math"].found == "DNNL_DEFAULT_FPMATH_MODE was set after torch was imported"


def test_a_build_without_symbols(backends: Backends) -> None:
    backends.wrong = {"own": "libtorch_cpu.so has no symbols of oneDNN's C API"}
    report = backends.examine()
    assert report.healthy
    found = named(report)
    assert set(found) == {"own primitives"}
    assert "no symbols" in str(found["own primitives"])


def test_own_primitives_need_no_variable(backends: Backends) -> None:
    """It matters for what is left to ATen alone."""
    backends.wrong = {"conv1x1_fastmath": "gemm:acl runs on f32 weights"}
    assert backends.examine().findings == ()
    report = backends.examine(environ={name: value for name, value in GOOD.items() if "FPMATH" not in name})
    assert report.healthy
    found = named(report)
    assert set(found) == {environment.FPMATH}
    assert "attention" in found[environment.FPMATH].cost


def test_a_backend_that_answers_is_there_whatever_its_file_is_called(backends: Backends) -> None:
    assert backends.examine(acl="").findings == ()


def test_nvpl_costs_no_bundle_anything(backends: Backends) -> None:
    report = backends.examine(**NVPL)
    assert report.healthy
    assert named(report)["BF16 in BLAS"].severity == "info"
    assert {c.name: c.found for c in report.checks if c.status == "failed"} == {"BLAS BF16": "NVPL has no sbgemm"}


def test_glibcs_malloc_is_no_illness(backends: Backends) -> None:
    report = backends.examine(malloc="glibc 2.36")
    assert report.healthy
    assert named(report)["malloc"].severity == "info"
    assert backends.examine().findings == ()


def test_wrong_numbers_are_hard(backends: Backends) -> None:
    backends.wrong = {"sbgemm": "sbgemm gives wrong numbers: all zeros"}
    assert named(backends.examine())["BF16 in BLAS"].severity == "hard"


def test_no_torch(backends: Backends) -> None:
    report = backends.examine(torch="")
    assert report.findings[0].severity == "hard"
    assert "pip install" in report.findings[0].remedy


def test_strict(backends: Backends) -> None:
    host = targets.this_host((CPUINFO / "graviton3.txt").read_text())
    report = doctor.examine(host=host, environ={}, facts=FACTS, backends=backends, strict=True)
    assert {f.severity for f in report.findings} == {"hard"}


def test_right_and_wrong_numbers() -> None:
    exact = torch.randn(8, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert smoke_tests.agreement(exact.bfloat16(), exact, "it") == "it"
    for wrong, text in ((torch.zeros_like(exact), "all zeros"), (exact * 2, "2 of the length"), (-exact, "-1.0000")):
        with pytest.raises(smoke_tests.WrongError, match=text):
            smoke_tests.agreement(wrong, exact, "it")
    with pytest.raises(smoke_tests.WrongError, match="cosine similarity nan"):
        smoke_tests.agreement(exact * float("nan"), exact, "it")


def run_here() -> dict[str, smoke_tests.Check]:
    """What an Arm server runs, on this machine."""
    return {check.name: check for check in smoke_tests.smoke_tests(targets.load("graviton3"), FACTS)}


def test_this_machines_own_blas_passes() -> None:
    checks = run_here()
    assert checks["BLAS FP32"] == smoke_tests.Check("BLAS FP32", "ok", "sgemm")
    assert checks["BLAS BF16"].status == "ok"
    assert checks["BLAS BF16, one row"].status == "ok"
    assert torch.backends.mkldnn.enabled


@pytest.mark.skipif(sys.platform != "linux" or "asimd" in targets.this_host().isa_features, reason="for x86")
def test_elsewhere_onednn_answers_under_other_names() -> None:
    check = run_here()["oneDNN FP32"]
    assert (check.status, "on f32 weights" in check.found) == ("ok", True)


def test_a_test_that_crashes_is_a_failed_test() -> None:
    class Broken(smoke_tests.Backends):
        def blas_fp32(self) -> str:
            raise ValueError("on purpose\nand more")

    checks = smoke_tests.smoke_tests(targets.load("altra"), FACTS, Broken())
    assert smoke_tests.Check("BLAS FP32", "failed", "ValueError: on purpose") in checks


def test_another_build_is_harmless_once_every_kernel_was_probed() -> None:
    soft = Difference("soft", "torch", "2.10.0", "2.13.0", "kernels may answer differently", "Install torch 2.10.0")
    variable = Difference("soft", "LRU_CACHE_CAPACITY", "1024", "unset", "slow", "")
    good = doctor.Proof("conv_bf16", "conv_bf16", (1,), 3, "")
    changed = doctor.Proof("conv_bf16", "conv_fp32", (1,), 3, "ref:any")
    assert [f.severity for f in doctor.proved([soft, variable], (good,))] == ["info", "soft"]
    assert [f.severity for f in doctor.proved([soft, variable], (good, changed))] == ["soft", "soft"]
    assert [f.severity for f in doctor.proved([soft], ())] == ["soft"]


def make(path: Path, target: str) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96)).eval()
    armopt.optimize(model, (torch.randn(128, 64),), output=path, target=target)
    return path


def test_verdicts_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "bundle", "graviton3")
    from armopt.bundle import files
    from armopt.runtime import load

    nodes = files.read_manifest(path).plan[0].nodes
    bound = [Bound(n.node, n.kernel, n.kernel) for n in nodes]
    bound[1] = Bound(nodes[1].node, nodes[1].kernel, "aten_linear", "conv1x1_bf16: ref:any")

    class Loaded:
        portable = False
        kernels = (bound,)

    monkeypatch.setattr(load, "load_parts", lambda opened: {"": Loaded})
    report = doctor.examine(path)
    assert sum(v.layers for v in report.verdicts) == len(nodes)
    (changed,) = (v for v in report.verdicts if v.reason)
    assert (changed.kernel, changed.shape) == ("aten_linear", nodes[1].shape)
    assert "1 run another, e.g. aten_linear" in named(report)["kernels"].found
    assert not report.healthy
    assert json.loads(json.dumps(report.to_json()))["kernels"][0]["shape"]


def test_a_bundle_of_this_machine_is_probed_here(tmp_path: Path) -> None:
    report = doctor.examine(make(tmp_path / "bundle", "host"))
    assert report.bundle == "host"
    assert sum(v.layers for v in report.verdicts) == 3


def test_a_bundle_for_another_machine_runs_as_twins(tmp_path: Path) -> None:
    if "asimd" in targets.this_host().isa_features:
        pytest.skip("this is an Arm machine")
    path = make(tmp_path / "bundle", "graviton3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what load says is in the findings, not beside them
        report = doctor.examine(path)
    assert report.verdicts == ()
    assert all(f.severity != "hard" for f in report.findings)


def test_a_damaged_bundle(tmp_path: Path) -> None:
    path = make(tmp_path / "bundle", "graviton3")
    (path / "graph.json").write_text("{}")
    with pytest.raises(BundleError, match="changed or damaged"):
        doctor.examine(path)


# --- the command ----------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app.app, ["doctor", *arguments])


@pytest.mark.parametrize("healthy", [True, False])
def test_the_exit_code_and_the_text(healthy: bool, backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    report = backends.examine(environ=GOOD if healthy else {})
    monkeypatch.setattr(doctor, "examine", lambda bundle, strict: report)
    done = invoke()
    assert done.exit_code == (0 if healthy else 3)
    assert "neoverse-v1 (graviton3)" in done.stdout
    assert "OpenBLAS 0.3.30" in done.stdout
    assert "malloc of libtcmalloc_minimal.so.4" in done.stdout
    assert ("This host is healthy" if healthy else "-> Start with: armopt run BUNDLE -- CMD") in done.stdout
    assert len(done.stdout.splitlines()) < 40  # one screen
    found = json.loads(invoke("--json").stdout)
    assert found["healthy"] == healthy
    assert found["facts"]["acl"] == "52.6.0"
    assert {c["name"] for c in found["checks"]} >= {"oneDNN BF16", "BLAS BF16", "BLAS BF16, one row", "fast math"}


@pytest.mark.slow
def test_the_command_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "armopt", "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 3)
    assert found["facts"]["torch"] == torch.__version__
