"""The cost tables against the counts that they are fitted to, and what they make of shapes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from armopt import targets
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.plan import cost_policy, costs, threshold_policy
from armopt.plan.costs import Variant
from benchmarks.arm64 import fitting, jobs

SAMPLES = sorted((Path(__file__).parents[2] / "benchmarks" / "arm64" / "samples").glob("*.json"))
GRAVITON3 = targets.load("graviton3")


def linear(m: int, k: int = 1024, n: int = 1024) -> Site:
    return Site("fc", "linear", m, k, n, (m, k), (n, k))


def _sites(samples: list[Mapping[str, Any]]) -> dict[str, tuple[Site, dict[str, int]]]:
    found: dict[str, tuple[Site, dict[str, int]]] = {}
    for sample in samples:
        shape = {k: v for k, v in sample.items() if k not in ("name", "kernel", "counts", "floor", "cycles", "blocks")}
        if sample["name"] not in ("pointwise", "attention"):
            site = jobs.conv_site(**shape) if "shape" in shape else jobs.linear_site(**shape)
            found.setdefault(json.dumps(shape), (site, {}))[1][sample["kernel"]] = sum(sample["counts"])
    return found


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_on_every_measured_shape_the_kernel_that_looks_cheapest_is_near_the_best(path: Path) -> None:
    costs_here = costs.parse(json.loads((Path(costs.__file__).parent / path.name).read_text()))
    ratios = []
    for site, totals in _sites(json.loads(path.read_text())["samples"]).values():
        estimates = {name: costs_here.estimate(table.get(name), site) for name in totals}
        known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
        cheapest = min(known, key=lambda name: known[name])
        ratios.append(totals[cheapest] / min(totals[name] for name in known))  # the others are `ref` on this build
    ratios.sort()
    assert len(ratios) > 100
    assert ratios[int(0.95 * len(ratios))] < 1.05
    assert ratios[-1] < 1.25


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_samples_cover_the_grid(path: Path) -> None:
    rows = defaultdict(set)
    for sample in json.loads(path.read_text())["samples"]:
        if "k" in sample:
            rows[sample["k"], sample["n"]].add(sample["m"])
    assert rows[256, 256] == {1, 2, 4, 8, 10, 16, 32, 64, 128, 256, 512}
    assert {(1024, 1024), (768, 3072), (513, 257), (512, 1)} <= rows.keys()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_counts_tell_which_blas_they_are_of(path: Path) -> None:
    """No release's number does. OpenBLAS has variants for small products, NVPL one for twelve rows."""
    held = [sample for sample in json.loads(path.read_text())["samples"] if sample.get("kernel", "")[:4] == "blas"]
    fitted = json.loads((Path(costs.__file__).parent / path.name).read_text())["kernels"][held[0]["kernel"]]
    names = {variant.name for variant in fitting.blas_variants(held)}
    assert {"one row", "large", *(variant["name"] for variant in fitted)} <= names
    assert ("few rows" in names) != ("small product" in names)


def test_an_empty_product_costs_a_call() -> None:
    found = costs.find(GRAVITON3, "2.10")
    assert found is not None
    assert 0 < (found.estimate(table.get("blas_fp32_w16"), linear(0)) or 0) < 1e6
    choice = cost_policy.default(GRAVITON3, "2.10").choose([linear(0)], GRAVITON3)[0]
    assert choice.kernel is not None
    assert choice.kernel.name == "blas_fp32_w16"


def test_small_layers_go_to_blas_and_large_ones_do_not() -> None:
    policy = cost_policy.default(GRAVITON3, "2.10")
    sites = [linear(1, 64, 64), linear(64, 32, 32), linear(8, 128, 128), linear(8), linear(32), linear(256)]
    kernels = [choice.kernel and choice.kernel.backend for site in sites for choice in policy.choose([site], GRAVITON3)]
    assert kernels == ["blas", "blas", "blas", "onednn", "onednn", "onednn"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [("graviton3", "conv_direct_fp32"), ("graviton4", "conv_bf16"), ("yitian710", "conv_bf16")],
)
@pytest.mark.parametrize("release", ["2.10", "2.13"])
def test_the_stem_of_a_vision_model_takes_code_that_gathers_nothing(target: str, expected: str, release: str) -> None:
    """Which oneDNN has for vectors of 256 bits; a convolution of many channels is in BF16 everywhere."""
    known = targets.load(target)
    policy = cost_policy.default(known, release)
    stem = jobs.conv_site([1, 3, 224, 224], [32, 3, 3, 3], 2, 1)
    deep = jobs.conv_site([1, 64, 56, 56], [64, 64, 3, 3], 1, 1)
    kernels = [choice.kernel and choice.kernel.name for site in (stem, deep) for choice in policy.choose([site], known)]
    assert kernels == [expected, "conv_bf16"]


@pytest.mark.parametrize("rows", [1, 8, 32, 256])
def test_what_falls_to_a_reference_kernel_on_a_release_is_not_chosen_there(rows: int) -> None:
    """From oneDNN 3.10 the packed inner product is `gemm:ref`."""
    for release, may in (("2.10", True), ("2.13", False)):
        choice = cost_policy.default(GRAVITON3, release).choose([linear(rows)], GRAVITON3)[0]
        assert choice.kernel is not None
        assert (choice.kernel.name == "linear_fastmath") <= may


def test_the_nearest_release_has_the_say() -> None:
    for release, expected in (("2.10.1", "2.10.0"), ("2.9", "2.10.0"), ("2.12", "2.13.0"), ("2.14", "2.15.0")):
        found = costs.find(GRAVITON3, release)
        assert found is not None
        assert found.torch == expected


def test_without_a_table_every_layer_is_packed() -> None:
    unknown = targets.load("graviton3").__class__(
        "x", "some-core", frozenset(), vector_bits=128, simd_pipes=2, l2_kib=512, cores=1
    )
    assert costs.find(unknown) is None
    policy = cost_policy.default(unknown)
    assert policy == threshold_policy.ThresholdPolicy(rows=1)
    (choice,) = policy.choose([linear(1, 64, 64)], replace(unknown, isa_features=frozenset({"bf16"})))
    assert choice.kernel is not None
    assert (choice.kernel.name, choice.reason) == ("conv1x1_bf16", "packed once")


def test_terms_of_a_padded_product() -> None:
    variant = Variant("sve", 8, 24, (0.0,) * len(costs.TERMS), block=340)
    found = dict(zip(costs.TERMS, costs.terms(variant, linear(9, 341, 25)), strict=True))
    assert found["arithmetic"] == 16 * 48 * 344
    assert found["merging"] == 9 * 48 * 2
    assert found["packing"] == 16 * 344
    assert (found["input"], found["output"], found["weight"]) == (9 * 341, 9 * 25, 25 * 341)


def test_code_that_gathers_nothing_pads_no_channels() -> None:
    variant = Variant("brgconv", 1, 8, (0.0,) * len(costs.TERMS), channels=1)
    site = jobs.conv_site([1, 3, 5, 5], [16, 3, 3, 3], padding=1)
    assert dict(zip(costs.TERMS, costs.terms(variant, site), strict=True))["arithmetic"] == 25 * 16 * 27


def test_a_convolution_pads_channels_in_each_tap_and_rows_in_each_image() -> None:
    variant = Variant("sve", 8, 24, (0.0,) * len(costs.TERMS))
    site = jobs.conv_site([2, 3, 5, 5], [24, 3, 3, 3], padding=1)
    found = dict(zip(costs.TERMS, costs.terms(variant, site), strict=True))
    assert found["arithmetic"] == 2 * 32 * 24 * (9 * 4)
    assert found["gathers"] == 50 * 9


def test_a_pointwise_operation_costs_a_call_and_its_elements() -> None:
    found = costs.find(GRAVITON3, "2.10")
    assert found is not None
    few, many = (found.pointwise("fp32:cast", elements) for elements in (1000, 2000))
    assert 0 < few < many < 2 * few
    assert found.pointwise("fp32:unheard-of", 1000) > 0


def test_a_fused_post_op_costs_nothing() -> None:
    found = costs.find(GRAVITON3, "2.10")
    assert found is not None
    plain, fused = (jobs.conv_site([1, 64, 14, 14], [64, 64, 1, 1], post_op=op) for op in ("none", "relu"))
    fastmath, bf16 = table.get("conv_fastmath"), table.get("conv_bf16")
    assert torch.float32 == fastmath.activations
    assert found.estimate(fastmath, plain) == found.estimate(fastmath, fused)
    assert (found.estimate(bf16, plain) or 0) < (found.estimate(bf16, fused) or 0)


@pytest.mark.parametrize(("release", "most"), [("2.13.0", None), ("2.15.0", 2048)])
def test_where_onednns_own_code_answers_is_read_off_the_samples(release: str, most: int | None) -> None:
    """It multiplies without BFMMLA: in FP32 with fast math. Source: the counts of 2.15.0."""
    path = next(path for path in SAMPLES if path.stem == f"neoverse-v1-torch-{release}")
    held = [s for s in json.loads(path.read_text())["samples"] if s.get("kernel") == "conv1x1_fastmath"]
    assert [variant.most_channels for variant in fitting.own_variant(held)] == ([most] if most else [])
    found = costs.find(GRAVITON3, release)
    assert found is not None
    few, many = (
        costs.answering(found.kernels["conv1x1_fastmath"], linear(64, *sizes)).name for sizes in ((64, 32), (64, 33))
    )
    assert many != "oneDNN's own"
    assert (few == "oneDNN's own") == bool(most)
