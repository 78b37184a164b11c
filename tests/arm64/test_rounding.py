"""Each kernel against its portable twin: what validation on a laptop says of rounding holds on the server.

The measure: the twin is off from the real kernel by no more than a tenth of what BF16 costs, that is the
real kernel's error against FP64 on the operands before any rounding.
"""

import math

import pytest
import torch

from armopt.kernels import table
from tests.arm64 import kernel_cases
from tests.arm64.kernel_cases import Case

JOBS = "tests.arm64.jobs_kernels"
#: Sums in another order, in FP32: a unit in the last place for each doubling of the terms, with room.
FP32_ERROR = 2e-6


def _linear(kernel, *sizes):
    return [Case(kernel, (m, k), n) for m, k, n in sizes]


def _conv(kernel, *rows):
    return [
        Case(kernel, (batch, channels, *size), n, filters, **geometry)
        for batch, channels, size, n, filters, geometry in rows
    ]


# --- shapes ---------------------------------------------------------------------------------------
# The Compute Library splits K where it exceeds 340 (SVE of 256 bits, 24 columns) or 680 (NEON, 12 columns), evenly.

BF16_LINEAR = (
    *((64, 64, 64), (64, 256, 10), (32, 340, 48), (32, 344, 48), (32, 676, 24), (64, 680, 33), (64, 684, 33)),
    *((24, 1000, 48), (16, 1027, 65), (16, 2048, 64), (8, 4096, 64), (1, 4096, 1000), (9, 1376, 1000)),
    *((64, 512, 7), (128, 100, 3), (256, 768, 2), (40, 1360, 60)),
)
BF16_CONV = (
    (1, 3, (32, 32), 32, (7, 7), {"stride": 2, "padding": 3}),
    (1, 3, (16, 16), 16, (3, 3), {"padding": 1}),
    (1, 3, (16, 16), 64, (5, 5), {"padding": 2}),
    (1, 64, (8, 8), 64, (3, 3), {"padding": 1}),
    (1, 64, (8, 8), 64, (1, 1), {}),
    (2, 128, (7, 7), 48, (1, 1), {"stride": 2}),
    (1, 1024, (4, 4), 100, (1, 1), {"stride": 2}),
    (1, 2048, (2, 2), 128, (1, 1), {}),
    (1, 32, (9, 9), 48, (5, 5), {"padding": 2}),
    (1, 16, (12, 12), 33, (5, 5), {"stride": 2, "padding": 2}),
    (1, 20, (10, 10), 24, (7, 7), {"padding": 3}),
    (1, 37, (7, 7), 33, (3, 3), {"padding": 1}),
    (1, 64, (5, 12), 40, (1, 5), {"padding": 2}),
    # fewer output rows, in the whole batch, than the filter has: the NEON kernel, whatever the width
    (1, 256, (2, 2), 240, (3, 3), {"padding": 1}),
    (1, 256, (4, 4), 128, (3, 3), {"stride": 2, "padding": 1}),
    (1, 32, (8, 8), 96, (7, 7), {}),
    (2, 256, (4, 4), 64, (3, 3), {"stride": 2, "padding": 1}),
    (3, 256, (2, 2), 48, (3, 3), {"padding": 1}),
)
DILATED = (1, 64, (9, 9), 40, (3, 3), {"padding": 2, "dilation": 2})
FASTMATH_LINEAR = ((64, 64, 64), (64, 684, 33), (8, 4096, 64), (128, 100, 3), (9, 1376, 1000))
FASTMATH_CONV = (
    BF16_CONV[0],
    BF16_CONV[3],
    BF16_CONV[9],
    BF16_CONV[13],
    DILATED,
)
FP32_CONV = (
    (1, 48, (9, 9), 48, (3, 3), {"padding": 1, "groups": 48}),
    (1, 32, (9, 9), 32, (3, 3), {"padding": 1, "groups": 2}),
    (1, 16, (10, 10), 24, (3, 3), {"stride": 2, "padding": 1}),
    DILATED,
)
#: What repair takes instead of conv_bf16, in the same process with fast math.
BLAS_CONV = (BF16_CONV[0], BF16_CONV[3], BF16_CONV[12], DILATED)
# Groups of fewer than 16 channels are `gemm:ref` as they are. Without SVE of 256 bits all are, unless depthwise.
NARROW = (
    (1, 32, (9, 9), 64, (3, 3), {"padding": 1, "groups": 4}),
    (2, 128, (6, 6), 128, (3, 3), {"padding": 1, "groups": 32}),
)
FP32_DENSE = (
    *_linear("conv1x1_fp32", (64, 64, 64), (8, 2048, 33), (64, 100, 3)),
    *_conv("conv_fp32", FP32_CONV[0], *FP32_CONV[2:], *BF16_CONV[:4], BF16_CONV[13]),
    *_linear("blas_fp32", (1, 1024, 64), (33, 684, 10)),
)

CASES = {
    "graviton3": (
        *_linear("conv1x1_bf16", *BF16_LINEAR),
        *_conv("conv_bf16", *BF16_CONV),
        *_linear("conv1x1_fastmath", *FASTMATH_LINEAR),
        *_conv("conv_fastmath", *FASTMATH_CONV),
        *_conv("conv_fp32", *FP32_CONV[:2]),
        *_conv("conv_merged_fp32", *NARROW),
        *_linear("blas_fp32_w16", (1, 1024, 64), (33, 684, 10)),
        *_linear("linear_fastmath", *FASTMATH_LINEAR[:3]),
        *_linear("blas_fp32", (64, 684, 33)),
        *_conv("conv_blas_fp32", *BLAS_CONV),
        *_conv("conv_blas_fp32_w16", *BLAS_CONV[:2]),
        Case("conv1x1_bf16", (64, 400), 48, bias=False, post_op="relu"),
        Case("conv_bf16", (1, 64, 8, 8), 32, (3, 3), padding=1, bias=False, post_op="relu"),
        Case("conv_fastmath", (1, 64, 8, 8), 32, (3, 3), padding=1, post_op="relu"),
        # by tanh of halves, which the weight is packed as
        Case("conv_fastmath", (1, 64, 8, 8), 32, (3, 3), padding=1, post_op="silu"),
        Case("conv_fp32", (1, 48, 9, 9), 48, (3, 3), padding=1, groups=48, post_op="silu"),
        Case("linear_fastmath", (64, 400), 48, post_op="silu"),
        Case("blas_fp32_w16", (3, 400), 48, bias=False, post_op="silu"),
        Case("conv1x1_bf16", (64, 400), 48, post_op="silu"),
    ),
    "yitian710": (
        *_linear("conv1x1_bf16", *BF16_LINEAR[4:13:2], *BF16_LINEAR[13:]),
        *_conv("conv_bf16", *BF16_CONV[::2], BF16_CONV[13]),
        *_linear("conv1x1_fastmath", FASTMATH_LINEAR[1], FASTMATH_LINEAR[3]),
        *_conv("conv_fastmath", *FASTMATH_CONV[::2]),
        *_conv("conv_fp32", *FP32_CONV[:1]),
    ),
    "graviton2": FP32_DENSE,
}

# --- special values -------------------------------------------------------------------------------

LAYERS = {
    "conv1x1_bf16": {"shape": (16, 400), "outputs": 48},
    "conv1x1_fastmath": {"shape": (16, 400), "outputs": 48},
    "blas_fp32_w16": {"shape": (16, 400), "outputs": 48},
    "conv_bf16": {"shape": (1, 64, 6, 6), "outputs": 48, "filters": (3, 3), "padding": 1},
    "conv_fastmath": {"shape": (1, 64, 6, 6), "outputs": 48, "filters": (3, 3), "padding": 1},
}
OPERANDS = (
    *("zeros", "zero weights", "huge", "overflow", "subnormal weights", "subnormal inputs", "subnormal products"),
    *("huge weights", "tiny weights", "saturating weights", "saturating inputs"),
    *("infinite input", "nan input", "infinite weight", "both infinities", "nan weight"),
)
SPECIAL = (
    *(Case(kernel, operands=values, **layer) for kernel, layer in LAYERS.items() for values in OPERANDS),
    # large enough for relu on the bits
    *(
        Case(kernel, operands=values, **LAYERS[kernel] | {"shape": shape, "post_op": "relu"})
        for kernel, shape in (("conv1x1_bf16", (512, 400)), ("conv_bf16", (1, 64, 20, 20)))
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
    every = [(target, case) for target, listed in cases.items() for case in listed]
    return pytest.mark.parametrize(("target", "case"), every, ids=[f"{target}: {case}" for target, case in every])


@_of(CASES)
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


@_of({"graviton3": tuple(_conv("conv_fp32", BF16_CONV[3]))})
def test_a_dense_convolution_called_fp32_is_none_with_fast_math(results, target, case):
    """Why repair has a kernel of its own: oneDNN multiplies this one in BF16 all the same."""
    found, kernel, reason = results(case, target)
    assert kernel == "conv_fp32", reason
    exact = kernel_cases.exact(case)
    assert _norm(found.double() - exact) / _norm(exact) > 100 * FP32_ERROR


@_of({"graviton3": SPECIAL})
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
        *_linear("conv1x1_bf16", (64, 684, 33), (3, 1376, 240)),
        *_conv("conv_bf16", BF16_CONV[3], BF16_CONV[9], BF16_CONV[14]),
    ]
    one, many = (
        server("graviton3").call(f"{JOBS}:run", cases=cases, target="graviton3", threads=threads).value
        for threads in (1, 16)
    )
    for case, (first, _, _), (second, kernel, reason) in zip(cases, one, many, strict=True):
        assert kernel == case.kernel, reason
        assert torch.equal(first, second), case


def _terms(case):
    return case.shape[1] // case.groups * math.prod(case.filters)


def _norm(values):
    return float(values.norm())
