"""The clock: estimates of time, from the figures of a product and the cycles of its kernels."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace

import pytest
import torch
from torch import nn

from armopt import targets
from armopt.compiler.captured_model import capture_model
from armopt.compiler.recipe import Recipe
from armopt.errors import InputError
from armopt.ir.records import Precision, Site
from armopt.kernels import table
from armopt.kernels.timings import Timings, site_key
from armopt.plan import clock_report, costs, latency, policies
from armopt.plan.clocked_costs import ClockedCosts
from armopt.plan.cost_policy import CostPolicy
from armopt.targets.clock import Clock, Work
from benchmarks.arm64 import clock_region

GRAVITON3 = targets.load("graviton3")
CLOCK = Clock(
    ghz=2.0,
    llc_kib=1024,
    block_cycles=10.0,
    fault_us=0.5,
    l2_gbs=100.0,
    llc_gbs=50.0,
    memory_gbs=10.0,
    memory_gbs_all=30.0,
    region_us=0.25,
    wake_us=8.0,
    error=2.0,
    usual_threads=4,
)


@pytest.mark.parametrize(
    ("work", "threads", "expected"),
    [
        (Work(cycles=2000), 1, 1.0),
        (Work(cycles=0, blocks=200), 1, 1.0),
        (Work(cycles=0, faults=4), 1, 2.0),
        (Work(cycles=0, l2_bytes=1e6), 1, 10.0),
        (Work(cycles=0, llc_bytes=1e6), 2, 10.0),
        (Work(cycles=0, memory_bytes=1e6), 1, 100.0),
        (Work(cycles=0, memory_bytes=1e6), 2, 50.0),
        (Work(cycles=0, memory_bytes=1e6), 16, 1e6 / 30e3),  # all that the memory gives
        (Work(cycles=0, regions=3), 1, 0.0),
        (Work(cycles=0, regions=3), 8, 3 * 3 * 0.25),
        (Work(cycles=2000, blocks=200, faults=4), 1, 4.0),
        (Work(cycles=2000, l2_bytes=1e6, llc_bytes=1e6, memory_bytes=1e6), 1, 101.0),  # the slowest level
    ],
)
def test_a_time_is_the_sum_of_what_each_figure_says(work: Work, threads: int, expected: float) -> None:
    assert CLOCK.microseconds(work, threads) == pytest.approx(expected)


def test_threads_that_sleep_have_to_be_woken() -> None:
    work = Work(cycles=0, regions=2)
    assert CLOCK.microseconds(work, 4, sleeps=True) == pytest.approx(2 * 2 * 8.0)


def _clocked(threads: int) -> ClockedCosts:
    policy = policies.find_policy(f"cost=2.10@{threads}", GRAVITON3)
    assert isinstance(policy, CostPolicy)
    assert isinstance(policy.costs, ClockedCosts)
    return policy.costs


def _linear(m: int, k: int, n: int) -> Site:
    return Site("fc", "linear", m, k, n, (m, k), (n, k))


def test_threads_share_arithmetic_and_not_what_a_call_costs() -> None:
    kernel = table.get("conv1x1_bf16")
    large, small = _linear(256, 1024, 1024), _linear(1, 32, 32)
    one, sixteen = _clocked(1), _clocked(16)

    def ratio(site: Site) -> float:
        alone, together = one.estimate(kernel, site), sixteen.estimate(kernel, site)
        assert alone is not None
        assert together is not None
        return alone / together

    assert ratio(large) > 4
    assert ratio(small) < 1


def test_weights_that_no_cache_holds_come_from_memory() -> None:
    kernel, site = table.get("conv1x1_bf16"), _linear(1, 4096, 4096)
    held, streamed = _clocked(1).of([site]), _clocked(1).of([site] * 2)
    assert (held.streamed, streamed.streamed) == (False, True)
    times = [each.estimate(kernel, site) for each in (held, streamed)]
    weights = 2 * 4096**2 / 1e3
    assert times[1] - times[0] == pytest.approx(weights / held.clock.memory_gbs - weights / held.clock.llc_gbs)


def test_a_policy_says_what_it_minimises() -> None:
    threads = targets.clock_of(GRAVITON3).usual_threads
    assert f"time on {threads} threads, within" in policies.find_policy("cost=2.10", GRAVITON3).name
    assert "time on 1 thread, within" in policies.find_policy("cost=2.10@1", GRAVITON3).name
    reasons = policies.find_policy("cost=2.10@1", GRAVITON3).choose([_linear(8, 512, 512)], GRAVITON3)
    assert reasons[0].reason.startswith("about ")
    assert " us; " in reasons[0].reason


@pytest.mark.parametrize(
    "text", ["cost@0", "cost@", "cost@four", "cost@4@8", "cost@1000", "cost=2.10@-1", "threshold@4"]
)
def test_what_is_no_number_of_threads_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="can't read policy"):
        policies.find_policy(text, GRAVITON3)


def test_without_a_clock_instructions_count_and_threads_are_refused() -> None:
    target = targets.load("axion")
    assert targets.clock_of(target) is None
    assert "time on" not in policies.find_policy("cost", target).name
    with pytest.raises(InputError, match="axion don't depend on threads"):
        policies.find_policy("cost@4", target)


def test_cycles_are_of_the_very_core() -> None:
    """Instructions of a core that is like it will do, its cycles won't: Neoverse-V2 has twice the pipes of an N2."""
    target = targets.load("graviton4")
    assert "time on" in policies.find_policy("cost=2.10", target).name
    like = replace(target, cost_table="neoverse-n2")
    assert targets.clock_of(like) is not None
    assert "time on" not in policies.find_policy("cost=2.10", like).name


@pytest.mark.parametrize("name", [name for name in targets.names() if targets.product(name).clock is not None])
def test_every_product_with_a_clock_is_planned_by_time(name: str) -> None:
    assert "time on" in policies.find_policy("cost=2.10", targets.load(name)).name


def test_a_host_has_the_clock_of_a_product_of_its_core() -> None:
    cpuinfo = "processor: 0\nFeatures: fp asimd bf16 sve\nCPU implementer: 0x41\nCPU part: 0xd40\n"
    assert targets.clock_of(targets.this_host(cpuinfo)) == targets.clock_of(GRAVITON3)
    assert targets.clock_of(replace(targets.load("axion"), name="host")) is None


def test_layers_too_small_for_threads_are_planned_otherwise_at_one_and_at_many() -> None:
    """The serial part of a call doesn't shrink: the kernel with the smaller one wins where there are many threads."""
    sites = [_linear(m, k, k) for m in (1, 8, 64, 256) for k in (64, 128, 256, 512)]
    chosen = [
        [policies.find_policy(f"cost=2.10@{threads}", GRAVITON3).choose([site], GRAVITON3)[0].kernel for site in sites]
        for threads in (1, 64)
    ]
    assert chosen[0] != chosen[1]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.second(torch.relu(self.first(x))), -1)


def test_a_whole_graph_takes_its_layers_and_what_is_between_them() -> None:
    recipe = Recipe.of(GRAVITON3, "cost=2.10@1")
    (part,) = capture_model(_Net().eval(), (torch.zeros(8, 512),)).parts
    planned = recipe.plan_part(part)
    graph, plan, known = planned.prepared.graph_module, planned.plans[0], _clocked(1)
    values = planned.captured.values(plan.bucket)
    total = latency.microseconds(graph, values, plan, known)
    layers = [
        known.of([]).estimate(table.get(d.kernel), _linear(8, *size))
        for d, size in zip(plan.decisions, ((512, 1024), (1024, 256)), strict=True)
    ]
    softmax = known.pointwise("fp32:other", 8 * 256)
    assert total >= sum(layers) + softmax
    assert total < 1.5 * (sum(layers) + softmax) + known.pointwise("fp32:cast", 8 * 1024) * 2
    stored = 2 * (512 * 1024 + 1024 * 256) + 4 * (1024 + 256)
    assert latency.weight_bytes(graph, values, plan) == stored


class _Block(nn.Module):
    """A transformer's layer, with a product that has no weight and a function behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(192, 6, 768, batch_first=True)
        self.layer.train()  # the fast path is one operation
        for module in self.layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("release", ["2.10", "2.13"])
def test_attention_is_no_slower_on_graviton3_than_on_cores_of_half_its_width(release: str) -> None:
    (part,) = capture_model(_Block(), (torch.zeros(4, 40, 192),)).parts
    times = {}
    for name in ("graviton2", "graviton3", "yitian710"):
        recipe = Recipe.of(name, f"cost={release}@1")
        planned = recipe.plan_part(part)
        graph, (plan, *_) = planned.prepared.graph_module, planned.plans
        assert isinstance(recipe.policy, CostPolicy)
        assert isinstance(recipe.policy.costs, ClockedCosts)
        known = recipe.policy.costs
        assert known.attention("fp32", 24, 38400, 2457600) > 0
        times[name] = latency.microseconds(graph, planned.captured.values(plan.bucket), plan, known)
    assert times["graviton3"] < times["yitian710"] < times["graviton2"]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_the_steps_of_a_recurrent_layer_wait_for_one_another(kind: type[nn.RNNBase], gates: int) -> None:
    """Each is a few calls on as many rows as the batch: threads share little of it."""

    def time(steps: int, threads: int) -> float:
        model = kind(256, 256, batch_first=True).eval()
        (part,) = capture_model(model, (torch.zeros(1, steps, 256),)).parts
        planned = Recipe.of(GRAVITON3, f"cost=2.10@{threads}").plan_part(part)
        (plan,), values = planned.plans, planned.captured.values(planned.plans[0].bucket)
        return latency.microseconds(planned.prepared.graph_module, values, plan, _clocked(threads))

    few, many, shared = time(32, 1), time(64, 1), time(64, 16)
    product = _clocked(1).of([]).estimate(table.get("blas_fp32_w16"), _linear(1, 256, gates * 256))
    step = _clocked(1).pointwise("fp32:tanh", 256) + (product or 0)
    assert many - few > 32 * step
    assert many - few == pytest.approx(few, rel=0.2)
    assert many < 4 * shared


def test_only_layers_on_bf16_activations_have_casts() -> None:
    recipe = Recipe.of(GRAVITON3, "cost=2.10@1")
    (part,) = capture_model(_Net().eval(), (torch.zeros(8, 512),)).parts
    planned = recipe.plan_part(part)
    (plan,), values, known = planned.plans, planned.captured.values(planned.plans[0].bucket), _clocked(1)

    def time(kernel: str) -> float:
        decisions = tuple(replace(each, kernel=kernel, precision=Precision.BF16) for each in plan.decisions)
        return latency.microseconds(planned.prepared.graph_module, values, replace(plan, decisions=decisions), known)

    layers = {
        kernel: sum(
            known.of([]).estimate(table.get(kernel), _linear(8, *size)) or 0 for size in ((512, 1024), (1024, 256))
        )
        for kernel in ("conv1x1_fastmath", "conv1x1_bf16")
    }
    casts = known.pointwise("fp32:cast", 8 * 512) + known.pointwise("bf16:cast", 8 * 256)
    relu = known.pointwise("bf16:relu", 8 * 1024)  # which the other one takes into its call
    apart = {kernel: time(kernel) - layers[kernel] for kernel in layers}
    assert apart["conv1x1_bf16"] - apart["conv1x1_fastmath"] == pytest.approx(casts + relu)


def test_what_the_tutorial_runs_on_has_a_clock_and_cycles_for_the_releases_that_are_known() -> None:
    assert targets.clock_of(GRAVITON3) is not None
    for release in ("2.10", "2.13"):
        found = costs.find(GRAVITON3, release)
        assert found is not None
        assert found.has_cycles, release


def test_a_report_holds_times_beside_estimates_and_nothing_of_the_host_but_what_they_depend_on() -> None:
    site, known = _linear(8, 256, 256), _clocked(4)
    host = {"core": "neoverse-v1", "torch": "2.10.0", "threads": "4", "hostname": "secret", "user": "secret"}
    seconds = {"conv1x1_bf16": 20e-6, "aten_linear": 30e-6}
    report = clock_report.make(Timings(host, {site_key(site): seconds}), [site], known, "graviton3")
    assert report["host"] == {"core": "neoverse-v1", "torch": "2.10.0"}
    assert "secret" not in json.dumps(report)
    (point,) = report["points"]  # plain ATen has no estimate
    assert (point["kernel"], point["measured_us"]) == ("conv1x1_bf16", 20.0)
    assert point["estimated_us"] == pytest.approx(known.of(()).estimate(table.get("conv1x1_bf16"), site), abs=1e-3)


def test_the_spread_of_reports() -> None:
    points = [{"estimated_us": estimate, "measured_us": 10.0} for estimate in (5.0, 10.0, 20.0, 40.0, 10.0)]
    assert clock_report.spread(points) == pytest.approx((1.0, 2.0, 4.0))


@pytest.mark.parametrize(("calls_that_grow", "at_least", "at_most"), [(2, 0, 50), (9, 100, 200)])
def test_page_faults_are_those_of_a_call_that_is_warm(calls_that_grow: int, at_least: int, at_most: int) -> None:
    """Heaps and caches grow in the first calls; what each call asks the system for stays."""
    held: list[mmap.mmap] = []

    def call() -> None:
        if len(held) < calls_that_grow:
            held.append(mmap.mmap(-1, 100 * mmap.PAGESIZE))
            for page in range(100):
                held[-1][page * mmap.PAGESIZE] = 1

    assert at_least <= clock_region.steady_faults(call) <= at_most
