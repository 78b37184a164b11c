"""Published timings: which the clock is fitted to, which judge it, and why others can't."""

from __future__ import annotations

from unittest import mock

import pytest

from armopt.kernels.onednn import primitives
from benchmarks.arm64 import clock, clock_jobs, estimates, measuring, published, seeds
from benchmarks.arm64.contenders import ARMOPT
from benchmarks.arm64.published import FITTED, Case


def test_no_more_than_a_third_is_fitted_and_all_of_it_can_be_reproduced() -> None:
    cases = [row for row in published.rows() if isinstance(row.case, Case)]
    assert len(published.rows()) > 450
    assert {row.line for row in cases} >= FITTED
    assert len(cases) >= 3 * len(FITTED)


def test_every_other_point_says_why_it_is_not_reproduced() -> None:
    reasons = {row.case for row in published.rows() if isinstance(row.case, str)}
    assert all(len(reason.split()) > 3 for reason in reasons)


def test_every_case_names_a_call_and_a_time() -> None:
    jobs = {row.line: row.case.job for row in published.rows() if isinstance(row.case, Case)}
    for row in published.rows():
        if row.line in jobs:
            module, _, name = jobs[row.line].make.partition(":")
            assert module == "benchmarks.arm64.clock_jobs"
            assert f"def {name}(" in (published.TABLE.parent / "clock_jobs.py").read_text()
            assert row.milliseconds > 0


def test_calls_are_those_that_the_sources_name() -> None:
    cases = {row.line: row.case for row in published.rows() if isinstance(row.case, Case)}
    for line in (124, 133):  # oneDNN #4380 and #4201: ih56iw56 oh28ow56 kh1kw1 sh2sw1
        assert cases[line].arguments["stride"] == (2, 1)
    for line in (165, 167, 169, 171, 173):  # pytorch #107167: no product is too small for oneDNN
        assert cases[line].env["TORCH_MKLDNN_MATMUL_MIN_DIM"] == "0"
        assert cases[line].env["TORCH_MKLDNN_MATMUL_MIN_SIZE"] == "0"
    assert {cases[line].make for line in range(164, 174)} == {"matmul_abt"}
    for line in (*range(118, 126), *range(127, 134, 2), *range(135, 146, 2)):  # oneDNN's code of autumn 2025, on c8g
        assert (cases[line].torch, cases[line].target) == ("2.11.0", "graviton4")
    for line in (*range(221, 226), 227, 228):  # PyTorch's own machines have OpenBLAS
        assert cases[line].torch == "2.10.0"
    assert cases[225].arguments["transposed"] == "b"  # trans_a=True, trans_b=False


@pytest.mark.parametrize(("groups", "filters", "bias"), [(1, 1, True), (16, 3, False)])
def test_the_benchmark_of_onednn_leaves_layouts_to_the_kernel(groups: int, filters: int, bias: bool) -> None:
    """Nothing is said of a layout but of the bias's, which depthwise convolutions have not."""
    api = primitives.api()
    assert isinstance(api, primitives.Api)
    with (
        mock.patch.object(primitives.Api, "strided", autospec=True, side_effect=primitives.Api.strided) as strided,
        mock.patch.object(primitives.Api, "anyhow", autospec=True, side_effect=primitives.Api.anyhow) as anyhow,
    ):
        call = clock_jobs.onednn_conv((1, 16, 8, 8), 16, filters, "", padding=filters // 2, groups=groups)
        call()
    assert [each.args[1] for each in strided.call_args_list] == ([(16,)] if bias else [])
    assert len(anyhow.call_args_list) == 3


def test_what_is_measured_belongs_to_a_point() -> None:
    known = {measuring.key(row.case) for row in published.rows() if isinstance(row.case, Case)}
    known |= {measuring.key(case) for case in (*seeds.cases(), *estimates.cases())}
    assert set(measuring.read()) <= known


def test_the_page_is_what_the_measures_and_figures_make() -> None:
    text = clock.PAGE.read_text()
    made = text.split(clock.BEGIN)[1].split(clock.END)[0].strip()
    assert made == f"{clock.figures_table()}\n\n{clock.page(clock.judge(measuring.read()))}"


def test_estimated_models_are_what_the_measures_and_figures_make() -> None:
    held = measuring.read()
    assert estimates.section(held) in estimates.PAGE.read_text()
    for threads in estimates.THREADS:
        text = estimates.table(threads, held)
        (row,) = (line for line in text.splitlines() if "mobilenet_v3_large" in line)
        case = estimates.case("mobilenet_v3_large 224", ARMOPT, threads)
        assert case is not None
        assert case.threads == threads
        time = clock.estimate(case, held)
        assert time is not None
        assert f" {time:.3g} " in row


def test_what_can_not_be_estimated_has_no_case() -> None:
    assert estimates.case("resnet50 224", "ONNX Runtime, BF16 flag", 1) is not None
    assert estimates.case("resnet50 224", "ONNX Runtime, BF16 flag", 4) is None  # which thread does what is by chance
    assert estimates.case("mask r-cnn 128", ARMOPT, 1) is None  # much of it is the user's Python
    assert estimates.case("vit_b_16 224", "Inductor's calls", 1) is None  # not counted either


def test_the_error_that_targets_say_is_the_judged_one() -> None:
    judging = [each for each in clock.judge(measuring.read()) if not each.fitted]
    _, nine = clock.spread([each.ratio for each in judging])
    assert clock.clock_of(judging[0].case).error == pytest.approx(nine, rel=0.05)


def test_the_tutorials_settings_are_in_their_published_order() -> None:
    found = [each for each in clock.judge(measuring.read()) if "tutorial" in each.row.where and each.case.make == "mlp"]
    for batch in (10, 32, 256):
        ours = [each for each in found if each.case.arguments["batch"] == batch]
        assert len(ours) >= 2
        assert sorted(ours, key=lambda e: e.estimate) == sorted(ours, key=lambda e: e.row.milliseconds)


def test_a_spread_is_the_median_and_the_ninth_of_ten() -> None:
    assert clock.spread([1.0, 0.5, 2.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx((1.0, 2.0))
