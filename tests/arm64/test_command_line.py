"""The way a user goes: `armopt emulate -- armopt run BUNDLE -- python script.py`, all of it real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).with_name("jobs_bundles.py")


def test_a_script_under_armopt_run_on_an_emulated_server(server, made, tmp_path):
    in_tests = server("graviton3").call("tests.arm64.jobs_bundles:seen_environment").value
    bundle = made("convnet", "graviton3")
    save_file({"x": bundle.calls[0][""]}, tmp_path / "in")
    script = ["python", str(SCRIPT), str(bundle.path), str(tmp_path / "in"), str(tmp_path / "out")]
    on_server = ["armopt", "run", str(bundle.path), "--threads", "1", "--", *script]
    env = {**os.environ, "ARMOPT_CACHE": str(tmp_path)}
    emulate = [sys.executable, "-m", "armopt", "emulate", "--cpu", "graviton3", "--", *on_server]
    done = subprocess.run(emulate, capture_output=True, text=True, check=False, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["environment"] == in_tests  # so the other tests' workers have what `armopt run` sets
    assert (
        said["environment"].items()
        >= {
            "DNNL_DEFAULT_FPMATH_MODE": "BF16",
            "LRU_CACHE_CAPACITY": "1024",
            "OMP_NUM_THREADS": "1",
            "OMP_PROC_BIND": "false",
        }.items()
    )
    assert said["warnings"] == []
    assert set(said["kernels"]) == {node.kernel for node in bundle.manifest.plan[0].nodes}
    found = load_file(tmp_path / "out")["y"]
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), bundle.reference[0].flatten(), 0)
    assert cosine >= 0.999  # in BF16 it is above 0.9999
