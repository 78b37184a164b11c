"""Bundles made on this machine with torch 2.13, run by the real aarch64 PyTorch on emulated cores.

Each run loads a bundle in a process with the environment of `armopt run`, makes all calls once, and is judged by
oneDNN's log of the next ones: which implementation answered, with which weights.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from armopt.bundle import reader
from armopt.ir.bf16_flow import ATTENTION
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.runtime import onednn_log
from tests.arm64 import bundles

JOBS = "tests.arm64.jobs_bundles"
#: `full` runs these on the newest PyTorch.
NEWEST = (
    "mlp@graviton3-newest",
    "convnet@graviton3-newest",
    "fast-math@graviton3-newest",
    "windows@graviton3-newest",
    "mlp@yitian710-newest",
    "convnet@yitian710-newest",
    "convnet@graviton2-newest",
)
RUNS = (
    "mlp@graviton3",
    "mlp-for-2.10@graviton3",
    "convnet@yitian710",
    "fast-math@graviton3",
    "mlp@yitian710",
    "resnet50@graviton3",
    "bert@yitian710",
    "gpt2@graviton3",
    "convnet@graviton2",
    "mobilenet@graviton3",
    "mlp@graviton2",
    "bert@graviton3",
    "mlp@graviton3-torch2.13",
    "convnet@graviton3",
    "convnet@graviton3-torch2.13",
    "mlp-full-size@graviton3",
    "fast-math@graviton3-torch2.13",
    "windows@graviton3",
    "windows@graviton3-torch2.13",
    *NEWEST,
)
LONG = (
    *("resnet50@graviton3", "mobilenet@graviton3", "bert@yitian710"),
    *("mlp-full-size@graviton3", "mlp@yitian710", "bert@graviton3"),
    *("mlp@graviton3-torch2.13", "fast-math@graviton3-torch2.13"),
    *NEWEST,
)
#: Where another PyTorch may answer otherwise than the plan expects: then the load says so, and nothing is `ref`.
OTHER_BUILDS = ("torch2.13", "newest")
#: Least cosine similarity to FP32 of any model on the core.
LEAST_COSINE = 0.999
#: The twin's error predicts the server's. In a deep model one value rounded the other way early on moves much of what
#: comes later, so single values can't be compared there; the size of the error can.
PREDICTED_WITHIN = 0.2

_COMPUTE = ("convolution", "deconvolution", "matmul", "inner_product")


@dataclass(frozen=True)
class Run:
    """One bundle on one server: what was planned here and what happened there."""

    name: str
    made: bundles.Made
    value: dict[str, Any]
    captured: int

    @property
    def kernels(self) -> list[dict[str, str]]:
        """For each bucket, the kernel that each node ran."""
        return [{node: kernel for node, _, kernel, _ in bucket} for bucket in self.value["kernels"]]

    @property
    def changed(self) -> list[str]:
        """Layers that ran another kernel than planned, and why."""
        return [
            f"{node}: {kernel} ({reason})"
            for bucket in self.value["kernels"]
            for node, planned, kernel, reason in bucket
            if kernel != planned
        ]

    @property
    def logs(self) -> list[tuple[onednn_log.Execution, ...]]:
        return [onednn_log.parse(entry["log"]).executions for entry in self.value["runs"]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all weights."""
        return [site.weight for bucket in self.made.sites for site in bucket.values()]


@pytest.fixture(scope="session")
def runs(request, server, made):
    """runs(name): all that the session's tests need are queued at the first call, so that two cores work."""
    queued = {}

    def queue(name):
        example, _, host = name.partition("@")
        where = server(host)
        bundle = made(example, where.host.cpu)
        captured = 1 if example in ("resnet50", "mlp-full-size", "mlp", "mlp-for-2.10") else 2
        future = where.submit(f"{JOBS}:run", bundle=bundle.path, calls=bundle.calls, captured=captured)
        queued[name] = (bundle, future, captured)

    def run(name):
        if not queued:
            wanted = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
            for each in dict.fromkeys(n for n in wanted if n in RUNS):
                queue(each)
        bundle, future, captured = queued[name]
        return Run(name, bundle, future.result().value, captured)

    return run


@pytest.fixture
def run(runs, name):
    return runs(name)


every_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in RUNS]
)


@every_run
def test_every_layer_runs_the_kernel_that_was_planned(run):
    assert not run.value["portable"]
    if run.name.endswith(OTHER_BUILDS):
        said = " ".join(run.value["warnings"])
        assert not run.changed or "another kernel than planned" in said
    else:
        assert not run.changed
        assert run.value["warnings"] == []


@every_run
def test_the_log_holds_just_the_planned_products(run):
    """For each node of oneDNN one execution per call: its shape, its weights' dtype, and whose code it is."""
    for kernels, sites, executions in zip(run.kernels, run.made.sites, run.logs, strict=True):
        expected: Counter[object] = Counter()
        for node, name in kernels.items():
            kernel = table.get(name)
            if kernel.backend == "onednn":
                dtype = "bf16" if kernel.precision == "bf16" else "f32"
                expected[(*_problem_of(sites[node]), dtype)] += run.captured
        products = [e for e in executions if e.primitive in ("convolution", "deconvolution", "inner_product")]
        assert Counter((*_problem(e), e.weight_dtype) for e in products) == expected
        assert not onednn_log.references(products)


@every_run
def test_a_linear_is_one_image_of_many_pixels(run):
    """As many images of one pixel, each row is a product of its own, padded to eight: six times the work in BF16."""
    layers = [
        (site.m, site.k, site.n)
        for kernels, sites in zip(run.kernels, run.made.sites, strict=True)
        for node, site in sites.items()
        if site.op == "linear" and table.get(kernels[node]).backend == "onednn"
    ]
    for execution in (e for log in run.logs for e in log if e.primitive == "convolution"):
        sizes = _sizes(execution)
        if sizes["ih"] == sizes["iw"] == 1 < sizes["mb"]:
            assert (sizes["mb"], sizes["ic"], sizes["oc"]) not in layers


@every_run
def test_no_reference_implementation_ran(run):
    found = [e for log in run.logs for e in onednn_log.references(log)]
    assert not found


@every_run
def test_no_weight_was_reordered_after_the_first_call(run, figure):
    assert not [e for log in run.logs for e in onednn_log.weight_reorders(log, run.shapes)]
    others = Counter(e.problem for log in run.logs for e in log if e.primitive == "reorder")
    if others:
        figure(f"{run.name}: reorders of activations in {run.captured} calls: {dict(others)}")


@every_run
def test_what_was_planned_for_blas_is_not_in_the_log(run):
    for kernels, sites, executions in zip(run.kernels, run.made.sites, run.logs, strict=True):
        left = {(sites[n].k, sites[n].n) for n, kernel in kernels.items() if table.get(kernel).backend == "blas"}
        products = [e for e in executions if e.primitive in ("matmul", "inner_product")]
        weights = {tuple(map(int, e.problem.split(":")[1].split("x")[-2:])) for e in products if ":" in e.problem}
        assert not left & weights


@every_run
def test_outputs_are_those_of_fp32_and_the_twin_predicts_their_error(run, figure):
    for call, (inputs, reference, twin, there) in enumerate(
        zip(run.made.calls, run.made.reference, run.made.twin, run.value["runs"], strict=True)
    ):
        found = there["output"]
        rows = next(iter(inputs.values())).shape[0]
        assert found.dtype == reference.dtype
        assert found.shape == reference.shape
        cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), reference.double().flatten(), 0)
        real, predicted = _error(found, reference), _error(twin, reference)
        figure(
            f"{run.name} batch {rows}: cosine to FP32 {cosine:.7f}, error {real:.3e}, twin's {predicted:.3e}, "
            f"difference between them {_error(found, twin):.1e}"
        )
        assert cosine >= LEAST_COSINE, call
        if run.changed:  # to kernels that round less
            assert real <= (1 + PREDICTED_WITHIN) * predicted, call
        elif run.made.manifest.required_features:
            assert abs(predicted - real) <= PREDICTED_WITHIN * real, call
        else:  # all in FP32: sums in another order, over some dozen layers
            assert max(real, predicted) < 1e-5, call


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("windows@graviton3", ["bfloat16"]),
        ("windows@graviton3-torch2.13", []),
        pytest.param("windows@graviton3-newest", None, marks=pytest.mark.full),  # as its BLAS is
    ],
)
def test_small_attention_is_pytorchs_where_blas_has_a_product_in_bf16(run, dtypes, server):
    """Without one, as in the build of 2.13, it would be oneDNN's ``gemm:ref``: there it is primitives of its own."""
    if dtypes is None:
        report = server("graviton3-newest").call(f"{JOBS}:examine").value
        lacks = any(check.name == "BLAS BF16" and check.status == "failed" for check in report.checks)
        dtypes = [] if lacks else ["bfloat16"]
    (program,) = reader.read(run.made.path).programs
    assert sum(node.target is ATTENTION for node in program.graph_module.graph.nodes) == 1
    assert run.value["attention"] == dtypes


# --- helpers --------------------------------------------------------------------------------------


def _error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    difference = found.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


def _problem_of(site: Site) -> tuple[int, ...]:
    if site.op == "linear":
        return (1, site.m, site.k, site.n)
    shape = (site.shape[0], *site.shape[2:])
    return _key(site.groups, shape, site.shape[1], site.n, site.weight[2:], site.stride[0])


def _problem(execution: onednn_log.Execution) -> tuple[int, ...]:
    sizes = _sizes(execution)
    groups, mb, ic, oc, ih, iw, kh, kw, sh = (
        sizes.get(name, 1) for name in ("g", "mb", "ic", "oc", "ih", "iw", "kh", "kw", "sh")
    )
    return _key(groups, (mb, ih, iw), ic, oc, (kh, kw), sh)


def _key(
    groups: int, shape: Sequence[int], channels: int, outputs: int, filters: Sequence[int], stride: int
) -> tuple[int, ...]:
    """What tells one layer from another; for a filter of one pixel, only how many pixels there are."""
    if stride == 1 and set(filters) == {1}:
        return (groups, math.prod(shape), channels, outputs)
    return (groups, *shape, channels, outputs, *filters, stride)


def _sizes(execution: onednn_log.Execution) -> dict[str, int]:
    """``mb1_ic3oc64_ih64…`` by name."""
    return {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", execution.problem)}


@pytest.mark.full
def test_half_the_bytes_of_fp32_and_little_more_while_loading(arm64, made, figure):
    """As the page tables have it: all of the process's data, with what probes take, and not the emulator's own."""
    small, large = made("convnet", "graviton3"), made("resnet50", "graviton3")
    job = "benchmarks.arm64.jobs:memory"
    taken = arm64(bundles.BARE).call(job, path=str(large.path), first=str(small.path)).value
    loaded, peak = taken["loaded"] / taken["fp32_bytes"], taken["peak"] / taken["bytes"]
    figure(f"ResNet-50 in memory: {loaded:.2f} of FP32's bytes, {peak:.2f} of the bundle's while it loads")
    assert 0.45 < loaded <= 0.55
    assert 1 < peak <= 1.25
