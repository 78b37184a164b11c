"""What libraries read, and what `doctor` finds, on the real aarch64 builds."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import armopt
from armopt import environment, targets
from armopt.emulation import TORCH_VERSIONS, EmulatedWorker, PreparedFolder, emulated_command
from armopt.environment import build
from armopt.runtime import onednn_log
from armopt.targets.emulated import core_named
from tests.arm64 import bundles
from tests.library_names import variables_read
from tests.packing import is_packing

HERE = Path(__file__).parent
EXAMINE = "armopt.deploy.doctor:examine"
JOBS = "tests.arm64.jobs_bundles"


def checks(report):
    return {check.name: check.status for check in report.checks}


def findings(report):
    return {finding.what: finding for finding in report.findings}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A convolution and two Linears for Graviton3."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    path = tmp_path_factory.mktemp("doctor") / "bundle"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        armopt.optimize(model, (torch.randn(64, 3, 16, 16),), output=path, target="graviton3")
    return path


# --- true to the build: no emulation --------------------------------------------------------------


@pytest.mark.parametrize("torch_version", TORCH_VERSIONS)
def test_every_variable_emitted_is_read_by_the_real_libraries(require_torch, monkeypatch, torch_version):
    package = require_torch(torch_version).site(torch_version) / "torch"
    monkeypatch.setattr(build, "package_folder", lambda: package)
    chosen = environment.wanted(targets.load("graviton3"), threads=2, build=environment.installed())
    readers = variables_read([*chosen, "ARMOPT_NO_SUCH_VARIABLE"], package)
    assert readers.pop("ARMOPT_NO_SUCH_VARIABLE") == ()
    assert all(readers.values()), readers
    assert readers["DNNL_DEFAULT_FPMATH_MODE"] == ("libtorch_cpu.so",)
    assert "libgomp.so.1" in readers["OMP_PROC_BIND"]
    assert environment.only_read(chosen, package) == chosen
    assert "THP_MEM_ALLOC_ENABLE" not in chosen


@pytest.mark.parametrize(
    ("torch_version", "facts"),
    [
        ("2.10.0", {"torch_build": "cpu", "blas": "OpenBLAS 0.3.30", "sbgemm": "yes", "thp_switch": "none"}),
        ("2.13.0", {"torch_build": "cuda 13.0", "blas": "NVPL", "sbgemm": "no", "thp_switch": "MIMALLOC_ALLOW_THP"}),
    ],
)
def test_facts_of_the_real_wheels(require_torch, monkeypatch, torch_version, facts):
    package = require_torch(torch_version).site(torch_version) / "torch"
    monkeypatch.setattr(build, "package_folder", lambda: package)
    assert environment.installed().items() >= {**facts, "acl": "52.6.0", "allocator": "mimalloc"}.items()


# --- huge pages, by QEMU's log of system calls ----------------------------------------------------

ALLOCATE = """
import ctypes, os, sys
allocate = ctypes.CDLL(sys.argv[1])._ZN3c109alloc_cpuEm  # c10::alloc_cpu, which every tensor's memory comes from
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
os.write(2, b"FROM HERE\\n")
allocate(64 << 20)
"""


@pytest.mark.parametrize(
    ("torch_version", "variable", "asks"),
    [
        ("2.10.0", "", True),
        ("2.10.0", "THP_MEM_ALLOC_ENABLE=0", True),
        ("2.10.0", "MIMALLOC_ALLOW_THP=0", True),
        ("2.13.0", "", True),
        ("2.13.0", "THP_MEM_ALLOC_ENABLE=0", True),
        ("2.13.0", "MIMALLOC_ALLOW_THP=0", False),
    ],
)
def test_who_asks_for_huge_pages(require_torch, torch_version, variable, asks):
    folder, core = require_torch(torch_version), core_named("graviton3")
    root = folder.sysroot(core)
    c10 = folder.site(torch_version) / "torch" / "lib" / "libc10.so"
    command = [folder.qemu, "-strace", "-cpu", core.name, "-L", root, root / "usr/bin/python3.11", "-S"]
    env = {"PATH": os.environ["PATH"], **dict([variable.split("=")] if variable else [])}
    done = subprocess.run([*command, "-c", ALLOCATE, c10], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    calls = done.stderr.split("FROM HERE\n")[1]
    assert "mmap(" in calls
    assert bool(re.search(r"madvise\(\w+,\d{8,},MADV_HUGEPAGE\) = 0", calls)) == asks


# --- the allocator --------------------------------------------------------------------------------

TCMALLOC = "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"
LOADED = """
import os
print(os.environ["LD_PRELOAD"], "libtcmalloc_minimal.so.4" in open("/proc/self/maps").read())
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, f"{TCMALLOC} True"),
        # the user's choice stays, also to have none
        pytest.param(
            {"LD_PRELOAD": "/usr/lib/aarch64-linux-gnu/libgomp.so.1"},
            "/usr/lib/aarch64-linux-gnu/libgomp.so.1 False",
            marks=pytest.mark.full,
        ),
        pytest.param({"LD_PRELOAD": ""}, " False", marks=pytest.mark.full),
    ],
)
def test_armopt_run_preloads_the_hosts_allocator(require_torch, bundle, given, seen):
    require_torch("2.10.0")
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    words = ["armopt", "run", str(bundle), "--", "python", "-c", LOADED]
    command, env = emulated_command("neoverse-v1", words, env={**clean, **given})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"{seen}\n", done.stderr


# --- doctor ---------------------------------------------------------------------------------------


def test_a_good_build_answers_and_a_missing_variable_is_found(server, bundle):
    without = ["LRU_CACHE_CAPACITY"]  # oneDNN reads it when it makes the first primitive, which is later
    report = server("graviton3").call(f"{JOBS}:examine", bundle=str(bundle), without=without).value
    assert set(checks(report).values()) == {"ok"}, report.checks
    assert "on bf16 weights" in report.checks[0].found
    assert report.host["products"] == "graviton3"
    assert report.facts["blas_core"] == "neoversev1"
    assert report.facts["malloc"].startswith("libtcmalloc_minimal.so.4")  # `armopt run` preloads it
    assert report.verdicts
    assert {verdict.reason for verdict in report.verdicts} == {""}
    severities = {name: f.severity for name, f in findings(report).items()}
    assert severities == {"LRU_CACHE_CAPACITY": "soft"}
    assert "armopt run BUNDLE" in report.findings[0].remedy
    assert not report.healthy


def test_a_core_without_bf16(server, bundle):
    worker = server("graviton2")
    alone = worker.call(EXAMINE).value
    assert checks(alone) == {
        **dict.fromkeys(("oneDNN BF16", "fast math", "BLAS BF16", "BLAS BF16, one row"), "skipped"),
        **dict.fromkeys(("oneDNN FP32", "BLAS FP32", "own primitives"), "ok"),
    }
    found = findings(alone)["CPU features"]
    assert (found.severity, found.found) == ("soft", "neoverse-n1 without it")
    assert found.remedy == "Make bundles with: armopt optimize --target altra or graviton2"
    refused = worker.call(EXAMINE, bundle=str(bundle)).value
    assert refused.findings[0].severity == "hard"
    assert refused.findings[0].found == "neoverse-n1 with no bf16"


def test_a_variable_set_too_late(server):
    worker = server("graviton3-no-fpmath")
    found = findings(worker.call(EXAMINE).value)
    unset = found["DNNL_DEFAULT_FPMATH_MODE"]
    assert (unset.severity, unset.found) == ("info", "unset")  # layers say it for themselves
    assert found["malloc"].severity == "info"  # no allocator is preloaded on this server
    report = worker.call(f"{JOBS}:examine", environ={"DNNL_DEFAULT_FPMATH_MODE": "BF16"}).value
    assert checks(report)["fast math"] == "failed"
    assert checks(report)["oneDNN BF16"] == "ok"
    late = findings(report)["fast math"]
    assert late.found == "DNNL_DEFAULT_FPMATH_MODE was set after torch was imported"
    assert "armopt run" in late.remedy
    assert "DNNL_DEFAULT_FPMATH_MODE" not in findings(report)


def test_a_blas_without_sbgemm(server):
    report = server("graviton3-torch2.13").call(EXAMINE).value
    assert {name for name, status in checks(report).items() if status != "ok"} == {"BLAS BF16"}
    found = findings(report)["BF16 in BLAS"]
    assert (found.severity, found.found) == ("info", "NVPL has no sbgemm")
    assert "torch==2.10.0" in found.remedy


@dataclass(frozen=True)
class OtherSite(PreparedFolder):
    """The prepared folder with another site folder for torch."""

    other: Path

    def site(self, torch_version: str) -> Path:
        return self.other


#: mov w0, #1; str w0, [x8]; add x0, x8, #24; str x0, [x8, #8]; str xzr, [x8, #16]; strb wzr, [x8, #24]; ret:
#: returns an arm_compute::Status (an error code and a std::string) that says RUNTIME_ERROR and nothing else.
REFUSE = struct.pack("<7I", 0x52800020, 0xB9000100, 0x91006100, 0xF9000500, 0xF900091F, 0x3900611F, 0xD65F03C0)
ASKED = re.compile(rb"_ZN11arm_compute.*(8validate|12has_opt_impl)E")


def refuse_everything(library: bytes) -> bytes:
    """libarm_compute.so whose functions that tell whether a layer can be had all say no: to oneDNN, as good as none."""
    data = bytearray(library)
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<2H", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    symbols = next(s for s in sections if s[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]][4]
    patched = 0
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section, value, length = struct.unpack_from("<IBBHQQ", data, at)
        text = bytes(data[names + name : data.index(b"\0", names + name)])
        if info & 15 == 2 and section and ASKED.match(text):
            assert length >= len(REFUSE)
            offset = value - sections[section][3] + sections[section][4]
            data[offset : offset + len(REFUSE)] = REFUSE
            patched += 1
    assert patched > 100
    return bytes(data).replace(b"arm_compute_version=", b"arm_compute_.......=")


def mirror(source: Path, place: Path, but: dict) -> None:
    """A folder of links, with real folders where `but` has a name."""
    place.mkdir()
    for entry in source.iterdir():
        if entry.name in but:
            mirror(entry, place / entry.name, but[entry.name])
        else:
            (place / entry.name).symlink_to(entry)


@pytest.mark.full
def test_a_wheel_without_acl(require_torch, bundle, tmp_path):
    prepared = require_torch("2.10.0")
    site = tmp_path / "site"
    mirror(prepared.site("2.10.0"), site, {"torch": {"lib": {}}})
    library = site / "torch" / "lib" / "libarm_compute.so"
    content = refuse_everything(library.read_bytes())
    library.unlink()
    library.write_bytes(content)
    folder = OtherSite(prepared.path, site)
    with EmulatedWorker("neoverse-v1", "2.10.0", bundles.BARE, folder=folder) as worker:
        report = worker.call(EXAMINE, bundle=str(bundle)).value
    assert "acl" not in report.facts
    failed = {name for name, status in checks(report).items() if status == "failed"}
    assert failed == {"oneDNN BF16", "fast math", "own primitives"}  # in FP32 oneDNN's own code answers
    found = findings(report)
    assert found["oneDNN BF16"].severity == "soft"
    assert "torch==2.10.0" in found["oneDNN BF16"].remedy
    # every layer that was to use it got another kernel, and says why
    changed = [verdict for verdict in report.verdicts if verdict.reason]
    assert changed
    assert all("ref:any" in verdict.reason or "f32 weights" in verdict.reason for verdict in changed)
    assert found["kernels"].severity == "soft"


# --- TensorFlow -----------------------------------------------------------------------------------

TENSORFLOW = """
import numpy as np
import tensorflow as tf

def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

three, one, linear = tf.constant(normal(3, 3, 32, 64)), tf.constant(normal(1, 1, 64, 64)), tf.constant(normal(64, 128))

@tf.function
def model(x):
    y = tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, three, 1, "SAME")), one, 1, "SAME")
    return tf.matmul(tf.reshape(y, (64, 64)), linear)

x = tf.constant(normal(1, 8, 8, 32))
model(x)
print("SECOND CALL", flush=True)
model(x)
"""


@pytest.fixture(scope="session")
def tensorflow(require_torch):
    """The site folder of TensorFlow, or a loud skip."""
    prepared = require_torch("2.10.0")
    site = prepared.tensorflow_site
    if not prepared.is_complete(prepared.tensorflow_part):
        said = "TensorFlow is not prepared: python -m armopt.emulation.prepare --tensorflow (1.3 GB, about a minute)"
        warnings.warn(f"NOT TESTED on Arm: {said}", stacklevel=2)
        pytest.skip(said)
    return prepared, site


@pytest.mark.full
def test_tensorflows_variables_are_read_by_its_libraries(tensorflow):
    _, site = tensorflow
    chosen = environment.wanted(targets.load("graviton3"), framework="tensorflow", threads=2)
    readers = variables_read([*chosen, "TF_NO_SUCH_VARIABLE"], site / "tensorflow")
    assert readers.pop("TF_NO_SUCH_VARIABLE") == ()
    assert all(readers.values()), readers
    assert environment.only_read(chosen, site / "tensorflow") == chosen


@pytest.mark.full
def test_tensorflow_runs_on_acl_in_bf16(tensorflow, tmp_path):
    """`armopt run --framework tensorflow --target graviton3 -- python script.py`, on the emulated core."""
    prepared, site = tensorflow
    script = tmp_path / "script.py"
    script.write_text(TENSORFLOW)
    command = ["python", "-m", "armopt", "run", "--framework", "tensorflow", "--target", "graviton3", "--threads", "1"]
    env = {
        "PATH": f"{prepared.wrappers}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "PYTHONNOUSERSITE": "1",
        "PYTHONPATH": f"{HERE.parents[1]}:{site}:{prepared.base_site}",
        "ONEDNN_VERBOSE": "1",
        "ARMOPT_EMULATED_CPU": "neoverse-v1",
    }
    python = str(prepared.wrappers / "python")
    done = subprocess.run(
        [python, *command[1:], "--", "python", str(script)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = onednn_log.parse(done.stdout.split("SECOND CALL")[1])
    layers = [e for e in log.executions if e.primitive in ("convolution", "matmul")]
    assert [e.primitive for e in layers] == ["convolution", "convolution", "matmul"]
    assert all(e.weight_dtype == "bf16" and not e.is_reference for e in layers), log.text
    # filters are packed once; TensorFlow packs a matmul's weight on every call
    assert [e.problem for e in log.executions if is_packing(e)] == ["64x128"]
    assert onednn_log.parse(done.stdout).header.threads == 1
