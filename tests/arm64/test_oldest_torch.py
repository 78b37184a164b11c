"""The main job on torch 2.10.0: capture, plan, lower, validate and write there, then load and run."""


def test_optimize_and_load_on_the_oldest_torch(server, tmp_path):
    job = "tests.arm64.jobs_oldest:optimize_and_load"
    found = server("graviton3").call(job, path=str(tmp_path / "bundle")).value
    assert found["torch"].startswith("2.10.0")
    assert found["gate"]
    assert found["cosine"] >= 0.999  # BF16 rounds to 8 bits: above 0.9999 for two layers
    assert found["buckets"] == [{"batch": 1}, {"batch": 4}]
    # each passed its probe; so small a layer does without the casts
    assert found["kernels"] == [["conv_fastmath", "conv_fastmath", "blas_fp32_w16"]] * 2
