"""`import armopt` after torch says what is lost where the environment came too late, and nothing where it did not."""


def test_without_the_variable_it_says_what_is_lost_and_how_to_start(server):
    (said,) = server("graviton3-no-fpmath").call("tests.arm64.jobs_import:remark").value
    assert "DNNL_DEFAULT_FPMATH_MODE was not set" in said
    assert "armopt run BUNDLE -- CMD" in said


def test_under_armopt_run_it_says_nothing(server):
    assert server("graviton3").call("tests.arm64.jobs_import:remark").value == []
