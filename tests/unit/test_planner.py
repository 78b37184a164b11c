from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armopt import targets
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.plan import planner, threshold_policy

POLICY = threshold_policy.ThresholdPolicy()
TARGETS = [name for name in targets.names() if name != "host"]


def linear(m: int = 64, k: int = 32, n: int = 16) -> Site:
    return Site("fc", "linear", m, k, n, (m, k), (n, k), weight_key="fc_weight")


def conv(shape: tuple[int, ...] = (1, 8, 9, 9), **changes: Any) -> Site:
    spatial = len(shape) - 2
    groups = changes.get("groups", 1)
    ones = (1,) * spatial
    values = {
        "weight": (8, 8 // groups, *(3,) * spatial),
        "stride": ones,
        "padding": ones,
        "dilation": ones,
        "output_padding": (0,) * spatial,
        **changes,
    }
    return Site("conv", "conv", 81, 72, 8, shape, weight_key="w", **values)


def decide(site: Site, target: str = "graviton3") -> Any:
    made = planner.make([site], targets.load(target), POLICY, {})
    return made.decisions[0], made.refused


@pytest.mark.parametrize(
    ("m", "kernel"), [(1, "blas_fp32_w16"), (63, "blas_fp32_w16"), (64, "conv1x1_bf16"), (65, "conv1x1_bf16")]
)
def test_the_tutorials_threshold_is_64_rows(m: int, kernel: str) -> None:
    decision, refused = decide(linear(m))
    assert decision.kernel == kernel
    assert refused == ()
    assert f"{m} rows" in decision.reason
    assert POLICY.name == "threshold=64"


def test_a_batch_of_sequences_counts_all_its_rows() -> None:
    site = Site("fc", "linear", 64, 32, 16, (2, 32, 32), (16, 32))
    assert decide(site)[0].kernel == "conv1x1_bf16"


def test_the_threshold_is_a_field() -> None:
    made = planner.make([linear(4)], targets.load("graviton3"), threshold_policy.ThresholdPolicy(4), {"batch": 4})
    assert (made.decisions[0].kernel, made.policy, made.bucket) == ("conv1x1_bf16", "threshold=4", {"batch": 4})


_SITES = st.builds(linear, st.integers(0, 200), st.integers(0, 64), st.integers(0, 64)) | st.builds(
    conv,
    st.sampled_from([(1, 8, 9), (2, 8, 9, 9), (1, 8, 4, 9, 9), (0, 8, 9, 9)]),
    groups=st.sampled_from([1, 2, 8]),
    transposed=st.booleans(),
)


@given(st.lists(_SITES, max_size=4), st.sampled_from(TARGETS))
@settings(max_examples=100, deadline=None)
def test_it_is_pure_and_total(found: list[Site], target: str) -> None:
    """The same input gives the same plan, leaves the input alone, and says something of every site."""
    before = [asdict(site) for site in found]
    first, second = (planner.make(found, targets.load(target), POLICY, {}) for _ in range(2))
    assert first == second
    assert [asdict(site) for site in found] == before
    assert len(first.decisions) == len(found)
    for site, decision in zip(found, first.decisions, strict=True):
        kernel = table.get(decision.kernel)
        assert kernel.op == site.op == decision.op
        assert kernel.refuses(site) is None
        assert decision.reason
        assert decision.precision == kernel.precision
    assert len(first.refused) == sum(table.get(d.kernel).backend == "aten" for d in first.decisions)


@pytest.mark.parametrize("target", [name for name in TARGETS if not targets.load(name).bf16])
@pytest.mark.parametrize(
    "site", [linear(1), linear(640), conv(), conv((1, 8, 9)), conv((1, 8, 4, 9, 9))], ids=lambda s: s.op
)
def test_no_bf16_where_the_core_has_none(target: str, site: Site) -> None:
    assert decide(site, target)[0].precision == "fp32"


def test_graviton2_has_no_bf16_and_graviton3_has() -> None:
    assert not targets.load("graviton2").bf16
    assert decide(conv())[0].precision == "bf16"


def test_a_policy_that_plans_bf16_without_it_is_stopped() -> None:
    class Wrong:
        name = "wrong"

        def choose(self, sites: Any, target: Any) -> Any:
            return [planner.Choice(table.get("conv_bf16"), "because")]

    with pytest.raises(AssertionError, match="neoverse-n1, which has none"):
        planner.make([conv()], targets.load("graviton2"), Wrong(), {})


@pytest.mark.parametrize("site", [linear(0), linear(8, 0), linear(8, 32, 0), linear(640, 32, 1)])
def test_degenerate_products_go_to_blas_with_the_reason(site: Site) -> None:
    decision, refused = decide(site)
    assert (decision.kernel, refused) == ("blas_fp32_w16", ())
    assert "empty product" in decision.reason or "out_features=1" in decision.reason


@pytest.mark.parametrize(
    ("site", "kernel", "reason"),
    [
        (conv(groups=8), "conv_fp32", "grouped"),
        (conv((1, 8, 4, 9, 9)), "conv_fp32", "3-d"),
        (conv((1, 8, 9), transposed=True), "aten_conv", "1 dimensions"),
        (conv(groups=2, transposed=True), "aten_conv", "grouped transposed"),
    ],
)
def test_convolutions_say_why(site: Site, kernel: str, reason: str) -> None:
    decision, refused = decide(site)
    assert decision.kernel == kernel
    assert reason in decision.reason
    assert bool(refused) == (kernel == "aten_conv")


def test_a_transposed_convolution_says_why_it_is_in_fp32() -> None:
    assert "transposed" in decide(conv(transposed=True))[0].reason


def test_an_empty_convolution_says_why() -> None:
    assert "empty" in decide(conv((0, 8, 9, 9)))[0].reason


def test_a_plan_is_frozen() -> None:
    made = planner.make([linear()], targets.load("graviton3"), POLICY, {})
    with pytest.raises(FrozenInstanceError):
        made.policy = "x"  # type: ignore[misc]
