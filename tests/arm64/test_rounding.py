"""Each kernel against its portable twin: what validation on a laptop says of rounding holds on the server.

The measure: the twin is off from the real kernel by no more than a tenth of what BF16 costs, that is the
real kernel's error against FP64 on the operands before any rounding.
"""

import math
from dataclasses import replace

import pytest
import torch

from armopt.ir.records import Op, Precision
from armopt.kernels import examples, table
from armopt.kernels.base import Use
from armopt.kernels.examples import Example
from tests.arm64 import kernel_cases
from tests.arm64.kernel_cases import Case

JOBS = "tests.arm64.jobs_kernels"
#: Sums in another order, in FP32: a unit in the last place for each doubling of the terms, with room.
FP32_ERROR = 2e-6


#: What each kernel names for itself.
CASES = kernel_cases.examples()

# --- special values -------------------------------------------------------------------------------

LAYERS = {
    Op.LINEAR: Example((16, 400), 48),
    Op.CONV: Example((1, 64, 6, 6), 48, (3, 3), padding=1),
}
#: Those that an Arm server with BF16 may run whatever was planned.
ROUNDING = [k for k in table.kernels(None, Use.FALLBACK) if k.precision != Precision.FP32]
#: Those whose activations are BF16 too.
IN_BF16 = ("conv1x1_bf16", "conv_bf16")
OPERANDS = (
    *("zeros", "zero weights", "huge", "overflow", "subnormal weights", "subnormal inputs", "subnormal products"),
    *("huge weights", "tiny weights", "saturating weights", "saturating inputs"),
    *("infinite input", "nan input", "infinite weight", "both infinities", "nan weight"),
)
SPECIAL = (
    *(Case(kernel.name, LAYERS[kernel.op], values) for kernel in ROUNDING for values in OPERANDS),
    # large enough for relu on the bits
    *(
        Case(kernel, replace(LAYERS[table.get(kernel).op], shape=shape, post_op="relu"), values)
        for kernel, shape in zip(IN_BF16, ((512, 400), (1, 64, 20, 20)), strict=True)
        for values in ("normal", "infinite input", "nan input", "both infinities", "nan weight")
    ),
)


@pytest.fixture(scope="module")
def results(request, server):
    """results(case, target): what the emulated kernel gave; the first call queues all that the tests need."""
    wanted = {}
    for item in request.session.items:
        if getattr(item, "module", None) is request.module and "case" in getattr(item, "fixturenames", ()):
            params = item.callspec.params
            wanted.setdefault(params["target"], []).append(params["case"])
    queued = {
        target: (cases, server(target).submit(f"{JOBS}:run", cases=cases, target=target))
        for target, cases in wanted.items()
    }

    def result(case, target):
        cases, future = queued[target]
        return dict(zip(cases, future.result().value, strict=True))[case]

    return result


def _of(cases):
    every = [
        pytest.param(target, case, id=f"{target}: {case}", marks=[pytest.mark.full] if is_full else [])
        for target, listed in cases.items()
        for case, is_full in listed
    ]
    return pytest.mark.parametrize(("target", "case"), every)


@_of(
    {target: [(case, target == "yitian710" and i % 2 > 0) for i, case in enumerate(CASES[target])] for target in CASES}
)
def test_the_twin_rounds_as_the_kernel(results, figure, target, case):
    found, kernel, reason = results(case, target)
    assert kernel == case.kernel, reason
    exact, twin = kernel_cases.exact(case), kernel_cases.twin(case, target)
    assert found.dtype == twin.dtype
    assert found.shape == twin.shape
    real = _norm(found.double() - exact) / _norm(exact)
    apart = _norm(found.double() - twin.double()) / _norm(exact)
    if table.get(case.kernel).rounding.weights == torch.bfloat16:
        figure(f"{target}: {case}: error {real:.2e}, twin apart by {apart / real:.4f} of it")
        assert apart <= real / 10
    else:
        assert max(real, apart) <= FP32_ERROR


def _is_sampled(case):
    """All of the kernels in BF16; of the others each value for one, in turn."""
    others = [kernel.name for kernel in ROUNDING if kernel.name not in IN_BF16]
    turn = OPERANDS.index(case.operands) + others.index(case.kernel) if case.kernel in others else 0
    return turn % len(others) == 0


@_of({"graviton3": [(case, not _is_sampled(case)) for case in SPECIAL]})
def test_special_values_are_those_of_the_twin(results, target, case):
    found, kernel, reason = results(case, target)
    assert kernel == case.kernel, reason
    twin = kernel_cases.twin(case, target)
    assert torch.equal(found.isfinite(), twin.isfinite())
    if case.operands != "overflow":  # whether inf or inf - inf is left of a sum depends on its order
        assert torch.equal(found.isnan(), twin.isnan())
        assert torch.equal(found.isposinf(), twin.isposinf())
    finite = twin.isfinite()
    found, twin = found[finite].double(), twin[finite].double()
    # BFMMLA takes subnormal operands as zero, and gives zero for a subnormal sum
    largest = max(1.0, *(float(tensor.abs().max()) for tensor in kernel_cases.operands(case).values()))
    flushed = _terms(case) * torch.finfo(torch.float32).smallest_normal * largest if "subnormal" in case.operands else 0
    if twin.numel():
        assert float((found - twin).abs().max()) <= 1e-2 * float(twin.abs().max()) + flushed


def test_more_threads_round_alike(server):
    """A laptop has few, a server 64; the Compute Library picks its kernel by them too."""
    cases = [
        Case("conv1x1_bf16", Example((64, 684), 33)),
        Case("conv1x1_bf16", Example((3, 1376), 240)),
        Case("conv_bf16", examples.MIDDLE),
        Case("conv_bf16", examples.STRIDED),
        Case("conv_bf16", Example((1, 256, 4, 4), 128, (3, 3), stride=2, padding=1)),
    ]
    one, many = (
        server("graviton3").call(f"{JOBS}:run", cases=cases, target="graviton3", threads=threads).value
        for threads in (1, 16)
    )
    for case, (first, _, _), (second, kernel, reason) in zip(cases, one, many, strict=True):
        assert kernel == case.kernel, reason
        assert torch.equal(first, second), case


def _terms(case):
    return case.layer.shape[1] // case.layer.groups * math.prod(case.layer.filters)


def _norm(values):
    return float(values.norm())
