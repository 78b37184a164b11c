"""The emulated Arm machine itself: it is what it says it is, and its workers report faithfully."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from armopt.emulation import (
    TORCH_VERSIONS,
    EmulatedError,
    EmulatedWorker,
    emulate,
    emulated_command,
)
from armopt.targets.emulated import core_named

JOBS = "tests.arm64.jobs_emulation"
SERVERS = {"2.10.0": "graviton3", "2.13.0": "graviton3-torch2.13"}


@pytest.fixture(scope="module")
def light(require_torch):
    """A worker without PyTorch, which starts in two seconds."""
    with EmulatedWorker("neoverse-v1", preload="json", folder=require_torch("2.10.0")) as worker:
        yield worker


def run(cpu, *argv):
    command, env = emulated_command(core_named(cpu).name, argv)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "has", "has_not"),
    [
        ("graviton2", {"asimddp"}, {"bf16", "sve", "i8mm"}),
        ("graviton3", {"bf16", "svebf16", "i8mm", "sve"}, {"sve2"}),
        ("yitian710", {"bf16", "svebf16", "i8mm", "sve", "sve2"}, {"sme"}),
    ],
)
def test_a_core_has_its_features_wherever_a_library_looks(require_torch, cpu, has, has_not):
    require_torch("2.10.0")
    with EmulatedWorker(core_named(cpu).name, preload="json") as worker:
        core, seen = core_named(cpu), worker.call(f"{JOBS}:cpu").value
    assert has <= seen["features"]
    assert not has_not & seen["features"]
    assert seen["hwcap2_bf16"] == ("bf16" in has)
    assert seen["midr"] == core.midr
    assert seen["part"] == core.midr >> 4 & 0xFFF
    assert seen["variant"] == core.midr >> 20 & 0xF
    assert seen["revision"] == core.midr & 0xF


@pytest.mark.parametrize(
    "restart",
    [
        "os.execvp('python3', ['python3', *args])",
        "os.execv(sys.executable, [sys.executable, *args])",
        "sys.exit(subprocess.call([sys.executable, *args]))",
        "sys.exit(subprocess.call('python -c \"' + args[1] + '\"', shell=True))",
    ],
)
def test_what_an_emulated_process_starts_is_emulated_too(require_torch, restart):
    require_torch("2.10.0")
    inner = "import platform, os; print(platform.machine(), os.environ['ARMOPT_EMULATED_CPU'])"
    outer = f"import os, sys, subprocess; args = ['-c', {inner!r}]; {restart}"
    done = run("yitian710", "python", "-c", outer)
    assert done.stdout.split() == ["aarch64", "neoverse-n2"], done.stderr


def test_what_is_preloaded_is_preloaded_on_the_emulated_machine_alone(require_torch):
    require_torch("2.10.0")
    seen = """
import os, subprocess, sys
print(os.environ.get("LD_PRELOAD"), "tcmalloc" in open("/proc/self/maps").read(), flush=True)
if sys.argv[1:]:
    subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "LD_PRELOAD": ""})
"""
    library = "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4"
    given = {**os.environ, "LD_PRELOAD": library}
    command, env = emulated_command("neoverse-v1", ["python", "-c", seen, seen], env=given)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    # what it starts gets what it says, not what it was given
    assert (done.stdout.splitlines(), done.stderr) == ([f"{library} True", " False"], "")


def test_the_exit_code_is_the_commands(require_torch):
    require_torch("2.10.0")
    assert emulate("neoverse-v1", ["python", "-c", "raise SystemExit(7)"]) == 7
    assert emulate("neoverse-v1", ["python", "-c", "import os; os.abort()"]) == 128 + signal.SIGABRT


def test_signals_reach_the_command(require_torch):
    require_torch("2.10.0")
    guest = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("up", flush=True)
for _ in range(300):  # not one long sleep: a signal just before it would wait until its end
    time.sleep(0.1)"""
    host = f"from armopt.emulation import emulate; exit(emulate('neoverse-v1', ['python', '-c', {guest!r}]))"
    process = subprocess.Popen([sys.executable, "-c", host], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.wait(timeout=30) == 3


# --- a worker -------------------------------------------------------------------------------------


def test_values_cross_the_boundary_unchanged(light):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = light.call(f"{JOBS}:echo", value={"array": array, "text": "é", "nothing": None}).value
    assert value["text"] == "é"
    assert value["nothing"] is None
    np.testing.assert_array_equal(value["array"], array)


def test_output_of_python_and_of_c_is_captured_per_call(light):
    for _ in range(2):
        result = light.call(f"{JOBS}:write_everywhere")
        assert sorted(result.stdout.splitlines()) == ["C library", "descriptor", "python"]
        assert result.stderr == "error\n"


def test_an_exception_there_is_an_error_here_with_its_traceback(light):
    with pytest.raises(EmulatedError, match="on purpose") as caught:
        light.call(f"{JOBS}:fail")
    assert "jobs_emulation.py" in str(caught.value)
    with pytest.raises(EmulatedError, match="pickle"):
        light.call(f"{JOBS}:unpicklable")
    assert light.call(f"{JOBS}:echo", value=1).value == 1


def test_a_time_out_kills_the_job_and_costs_nothing_else(light):
    start = time.monotonic()
    with pytest.raises(EmulatedError, match="longer than 1 s"):
        light.call(f"{JOBS}:sleep", timeout=1, seconds=100)
    assert time.monotonic() - start < 20
    assert light.call(f"{JOBS}:echo", value=2).value == 2


def test_a_crash_says_which_signal_and_the_last_words(light):
    with pytest.raises(EmulatedError, match="SIGABRT") as caught:
        light.call(f"{JOBS}:crash")
    assert "last words" in caught.value.stderr
    assert light.call(f"{JOBS}:echo", value=3).value == 3


# --- PyTorch on it --------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_version", TORCH_VERSIONS)
def test_pytorch_and_torchvision_work(server, torch_version):
    facts = server(SERVERS[torch_version]).call(f"{JOBS}:torch_facts").value
    assert facts == {
        "version": torch_version,
        "vision": {"2.10.0": "0.25.0", "2.13.0": "0.28.0"}[torch_version],
        "capability": "SVE256",
        "cuda": False,
        "gpus": 0,
        "nms": [1],
        "inverse": 0.25,
    }


def test_tensors_cross_the_boundary(server):
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    product = server("graviton3").call(f"{JOBS}:tensor_product", left=left, right=right).value
    # float64 sums of 4 products, in another order at most: a few units in the last place
    torch.testing.assert_close(product, left @ right, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("torch_version", "linear"), [("2.10.0", ",acl,"), ("2.13.0", ",gemm:ref,")])
def test_onednns_log_can_be_switched_on_for_one_call(server, torch_version, linear):
    result = server(SERVERS[torch_version]).call(f"{JOBS}:packed_calls")
    _, convolution_log, linear_log = result.stdout.split("# ")
    runs = {
        name: [line for line in log.splitlines() if ",exec," in line]
        for name, log in (("convolution", convolution_log), ("linear", linear_log))
    }
    (convolution,), (packed_linear,) = runs["convolution"], runs["linear"]  # one primitive each: no reorder
    assert ",convolution,gemm:acl," in convolution
    assert "wei:bf16" in convolution
    assert linear in packed_linear  # the trap of oneDNN >= 3.10
    # BF16 weights keep 8 bits of mantissa; over 64 products the angle stays far below this.
    assert result.value["convolution"] > 0.9999
    assert result.value["linear"] > 0.9999
