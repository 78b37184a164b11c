"""The cut finds the labelling that trying them all finds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from armopt import targets
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.plan import planner
from armopt.plan.cost_policy import CostPolicy
from armopt.plan.costs import TERMS, CostTable, Variant

GRAVITON3 = targets.load("graviton3")


def _site(name: str, source: str, *, m: int = 8, k: int = 64, n: int = 64, residual: str = "", escapes: bool) -> Site:
    post_op = "add" if residual else "none"
    return Site(
        name, "linear", m, k, n, (m, k), (n, k), post_op=post_op, source=source, residual=residual, escapes=escapes
    )


def _pointwise(cast: float) -> dict[str, tuple[float, float]]:
    return {"fp32:cast": (0.0, cast), "bf16:cast": (0.0, cast), "bf16:add": (0.0, 0.0), "fp32:add": (0.0, 0.0)}


def test_attention_draws_its_query_to_the_dtype_in_which_it_is_cheap() -> None:
    kernels = {"conv1x1_bf16": 100.0, "linear_fastmath": 90.0}
    site = replace(_site("qkv", "x", escapes=True), attended=(2, 32, 512))
    alone = _table(kernels, cast=0.0)
    half = replace(alone, attention_costs={"bf16": (0.0, 1.0, 0.0), "fp32": (0.0, 1.0, 0.1)})
    dear = replace(alone, attention_costs={"bf16": (0.0, 9.0, 0.0), "fp32": (0.0, 1.0, 0.1)})
    chosen = [CostPolicy(costs, near=1.0).choose([site], GRAVITON3)[0].kernel for costs in (alone, half, dear)]
    assert [kernel.name for kernel in chosen if kernel] == ["linear_fastmath", "conv1x1_bf16", "linear_fastmath"]


def _table(per_call: dict[str, float], cast: float) -> CostTable:
    """A table whose kernels cost the same whatever the shape."""
    fixed = {name: (Variant("any", 1, 1, (cost, *[0.0] * (len(TERMS) - 1))),) for name, cost in per_call.items()}
    return CostTable("neoverse-v1", "2.10.0", fixed, _pointwise(cast), {})


def _cost_of(labels: dict[str, bool], sites: list[Site], least: dict[bool, int], cast: float) -> float:
    """What a labelling costs, from the definition: the kernels, and one cast of each value in each direction needed."""
    total = float(sum(least[labels[s.node]] for s in sites))
    by_name = {s.node: s for s in sites}
    for value in {s.source for s in sites} | {s.residual for s in sites} | set(by_name):
        if not value:
            continue
        made_in_bf16 = labels.get(value, False)
        readers = [labels[s.node] for s in sites if value in (s.source, s.residual)]
        if value in by_name and by_name[value].escapes:
            readers.append(False)
        maker = by_name.get(value)
        inputs = [math.prod(s.shape) for s in sites if value in (s.source, s.residual)]
        elements = maker.m * maker.n if maker else max(inputs)
        if any(reader != made_in_bf16 for reader in readers):
            total += cast * elements
    return total


@st.composite
def _chains(draw: st.DrawFn) -> list[Site]:
    count = draw(st.integers(1, 6))
    sites = []
    for i in range(count):
        names = ["x", *(f"s{j}" for j in range(i))]
        source = draw(st.sampled_from(names))
        residual = draw(st.sampled_from(["", *names]))
        sites.append(_site(f"s{i}", source, residual=residual, escapes=draw(st.booleans()) or i == count - 1))
    return sites


@settings(max_examples=200, deadline=None)
@given(_chains(), st.lists(st.integers(1, 1000), min_size=3, max_size=3), st.floats(0, 0.2))
def test_the_cut_is_the_best_labelling(sites: list[Site], costs: list[int], cast: float) -> None:
    names = ("conv1x1_bf16", "conv1x1_fastmath", "blas_fp32_w16")
    policy = CostPolicy(_table(dict(zip(names, map(float, costs), strict=True)), cast), near=1.0)
    kernels = [choice.kernel.name for choice in policy.choose(sites, GRAVITON3) if choice.kernel]
    least = {True: costs[0], False: min(costs[1:])}  # of the kernels on BF16 and on FP32 activations
    assert all(dict(zip(names, costs, strict=True))[name] == least[name == names[0]] for name in kernels)
    chosen = {site.node: name == names[0] for site, name in zip(sites, kernels, strict=True)}
    found = _cost_of(chosen, sites, least, cast)
    best = min(
        _cost_of(dict(zip([s.node for s in sites], labels, strict=True)), sites, least, cast)
        for labels in itertools.product((False, True), repeat=len(sites))
    )
    assert math.isclose(found, best, rel_tol=1e-9)


def test_a_chain_in_bf16_is_cheaper_than_its_parts() -> None:
    """Alone, each BF16 kernel loses by its two casts; in a chain of three they share two."""
    costs = _table({"conv1x1_bf16": 900.0, "conv1x1_fastmath": 1000.0}, cast=0.15)
    policy = CostPolicy(costs, near=1.0)
    alone = policy.choose([_site("a", "x", escapes=True)], GRAVITON3)
    assert [choice.kernel.name for choice in alone if choice.kernel] == ["conv1x1_fastmath"]
    chain = [_site(f"s{i}", f"s{i - 1}" if i else "x", escapes=i == 15) for i in range(16)]
    chosen = policy.choose(chain, GRAVITON3)
    assert {choice.kernel.name for choice in chosen if choice.kernel} == {"conv1x1_bf16"}


def test_never_bf16_where_the_core_has_none() -> None:
    names = [kernel.name for kernel in table.kernels()]
    policy = CostPolicy(_table(dict.fromkeys(names, 1.0), 0.0))
    graviton2 = targets.load("graviton2")
    made = planner.make([_site("a", "x", escapes=True)], graviton2, policy, {})
    assert table.get(made.decisions[0].kernel).precision == "fp32"


def test_what_reads_fewer_bytes_wins_a_tie() -> None:
    policy = CostPolicy(_table({"conv1x1_fastmath": 102.0, "blas_fp32_w16": 100.0}, 0.0))
    choice = policy.choose([_site("a", "x", m=1, escapes=True)], GRAVITON3)[0]
    assert choice.kernel is not None
    assert choice.kernel.name == "conv1x1_fastmath"
    assert "blas_fp32_w16" in choice.reason


def test_a_site_that_no_kernel_takes_stays_with_aten() -> None:
    policy = CostPolicy(_table({"conv1x1_bf16": 1.0}, 0.0))
    empty = Site("c", "conv", 0, 72, 16, (0, 8, 9, 9), (16, 8, 3, 3), (1, 1), (0, 0), (1, 1), output_padding=(0, 0))
    choice = policy.choose([empty], GRAVITON3)[0]
    assert (choice.kernel, choice.reason) == (None, "an empty input")


def test_a_kernel_that_was_not_measured_is_taken_where_no_other_is() -> None:
    policy = CostPolicy(_table({"conv1x1_bf16": 1.0}, 0.0))
    choice = policy.choose([_site("a", "x", n=1, escapes=True)], GRAVITON3)[0]
    assert choice.kernel is not None
    assert choice.kernel.name == "blas_fp32_w16"


def test_a_dense_convolution_is_never_called_fp32_where_fast_math_is_on() -> None:
    costs = _table({"conv_bf16": 10.0, "conv_fastmath": 20.0, "conv_fp32": 1.0}, 0.0)
    shape, weight = (1, 8, 9, 9), (16, 8, 3, 3)
    site = Site("c", "conv", 49, 72, 16, shape, weight, (1, 1), (0, 0), (1, 1), output_padding=(0, 0), source="x")
    assert _kernel(costs, site, "graviton3") == "conv_bf16"
    assert _kernel(costs, site, "graviton2") == "conv_fp32"


def _kernel(costs: CostTable, site: Site, target: str) -> str | None:
    choice = CostPolicy(costs).choose([site], targets.load(target))[0]
    return choice.kernel and choice.kernel.name
