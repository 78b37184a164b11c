"""Layers as primitives of their own, on the emulated core: who answers, and with which numbers."""

import pytest
import torch

from armopt.ir.onednn_names import is_reference
from armopt.ir.records import Precision
from armopt.kernels import examples, table
from tests.arm64 import kernel_cases

JOBS = "tests.arm64.jobs_own"
KERNELS = (
    *("conv1x1_bf16", "conv1x1_fastmath", "conv_bf16", "conv_fastmath", "conv_fp32", "conv_direct_fp32"),
    "conv_merged_fp32",
)
GELU = {"gelu", "gelu_tanh"}
#: Every third layer that a kernel names for itself.
CASES = [
    case for name in KERNELS for case in [c for c in kernel_cases.examples()["graviton3"] if c.kernel == name][::3]
]


@pytest.fixture(scope="module")
def results(server):
    """By whether primitives are their own: what each case gave. They are where the environment has no fast math."""
    arguments = {"cases": CASES, "target": "graviton3"}
    own = server("graviton3-no-fpmath").submit(f"{JOBS}:run", **arguments)
    called = server("graviton3").submit(f"{JOBS}:run", **arguments, own=False, fast_math=True)
    return {name: dict(zip(CASES, job.result().value, strict=True)) for name, job in (("own", own), ("called", called))}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_own_primitive_gives_what_the_call_of_pytorch_gives(results, case):
    found, bound = results["own"][case]
    called, other = results["called"][case]
    assert (bound.kernel, other.kernel, other.implementation) == (case.kernel, case.kernel, ""), (bound, other)
    assert bound.implementation
    assert not is_reference(bound.implementation)
    if case.kernel == "conv_direct_fp32":
        assert bound.implementation.startswith("brgconv")
    if table.get(case.kernel).precision == Precision.BF16:
        assert torch.equal(found, called)
    else:
        assert (found - called).norm() <= 2e-6 * called.norm()


def test_a_dense_convolution_planned_in_fp32_is_in_fp32(server):
    """Whatever the environment says: PyTorch's call multiplies it in BF16 where that asks for fast math."""
    case = kernel_cases.Case("conv_fp32", examples.MIDDLE)
    ((found, bound),) = server("graviton3").call(f"{JOBS}:run", cases=[case], target="graviton3").value
    assert (bound.kernel, is_reference(bound.implementation or "ref")) == ("conv_fp32", False)
    exact = kernel_cases.exact(case)
    assert (found.double() - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("host", ["graviton3", "graviton3-torch2.13"])
def test_blas_gives_the_same_without_pytorch_around_it(server, host, rows, bias):
    """OpenBLAS and NVPL."""
    found, expected = server(host).call(f"{JOBS}:product", rows=rows, bias=bias).value
    assert torch.equal(found, expected)


def test_threads_that_the_compute_library_does_not_take_are_said(server):
    """It keeps the number of its first call in a process."""
    job, case = f"{JOBS}:threads_of_the_compute_library", next(c for c in CASES if c.kernel == "conv1x1_bf16")
    found, said = server("graviton3").call(job, case=case, more=1).value
    (line,) = said
    assert f"works with {found} thread" in line
    assert f", PyTorch with {found + 1}: " in line
    assert server("graviton3").call(job, case=case, more=0).value == (found, [])


@pytest.mark.parametrize(
    ("host", "fp32", "bf16", "of_tanh"),
    [
        ("graviton3", {*GELU, "sigmoid"}, set(), True),
        (
            "graviton3-torch2.13",
            {"gelu", "gelu_tanh", "sigmoid", "silu"},
            {"gelu", "gelu_tanh", "sigmoid", "silu"},
            False,
        ),
        ("graviton2", set(), set(), False),
    ],
)
def test_functions_are_run_by_who_is_quicker(server, host, fp32, bf16, of_tanh):
    """oneDNN has none for Neoverse-N1 on torch 2.10, and PyTorch's silu is quicker there than one of its tanh."""
    taken, apart, furthest = server(host).call(f"{JOBS}:functions").value
    assert taken == {torch.float32: fp32, torch.bfloat16: bf16}
    assert apart == of_tanh
    assert furthest < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("host", ["graviton3-no-fpmath", "graviton3-torch2.13", "graviton2"])
def test_attention_multiplies_all_heads_at_once(server, host, dtype):
    """By the Compute Library, whatever the environment and BLAS multiply with; in FP32 in FP32."""
    if (host, dtype) == ("graviton2", torch.bfloat16):
        pytest.skip("the core has no BF16")
    found = server(host).call(f"{JOBS}:attention", dtype=dtype).value
    assert len(found) == 5 - (host == "graviton2")  # where a small softmax is a reference
    for implementation, refused, error in found:
        assert (implementation, refused) == ("gemm:acl", None)
        assert error < (4e-3 if dtype == torch.bfloat16 else 1e-6)
