"""The main job on the oldest and the newest torch: capture, plan, lower, validate and write, then load and run."""

import pytest

from armopt.emulation.folder import DEFAULT_TORCH


@pytest.mark.parametrize("host", ["graviton3", pytest.param("graviton3-newest", marks=pytest.mark.full)])
def test_optimize_and_load(pytestconfig, server, tmp_path, host):
    job = "tests.arm64.jobs_oldest:optimize_and_load"
    found = server(host).call(job, path=str(tmp_path / "bundle")).value
    oldest = host == "graviton3"
    assert found["torch"].partition("+")[0] == (DEFAULT_TORCH if oldest else pytestconfig.getoption("--newest-torch"))
    assert found["gate"]
    assert found["cosine"] >= 0.999  # BF16 rounds to 8 bits: above 0.9999 for two layers
    assert found["buckets"] == [{"batch": 1}, {"batch": 4}]
    # each passed its probe; layers of so few channels are in FP32
    assert found["kernels"] == [["conv_direct_fp32", "conv_direct_fp32", "blas_fp32_w16"]] * 2
