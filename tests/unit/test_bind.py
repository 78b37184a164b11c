from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from armopt.bundle.program import Program
from armopt.ir.records import Backend, Op
from armopt.kernels import table
from armopt.kernels.base import Kernel
from armopt.plan import threshold_policy
from armopt.runtime import bind, probe
from tests.attention import query_dtypes
from tests.planning import programs

pytestmark = pytest.mark.usefixtures("pytorchs_calls")


def lowered(model: nn.Module, *inputs: torch.Tensor, target: str = "graviton3", rows: int = 1) -> Program:
    return programs(model.eval(), *inputs, target=target, policy=threshold_policy.ThresholdPolicy(rows))[0]


class Refuse(dict):  # type: ignore[type-arg]
    """Verdicts that refuse the kernels named and trust all others."""

    def __init__(self, **refusals: str) -> None:
        super().__init__()
        self.refusals = refusals

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> str | None:
        return next((reason for name, reason in self.refusals.items() if f'["{name}"' in key), None)

    def get(self, key: str, default: Any = None) -> str | None:
        return self[key]


def bound(program: Program, fast_math: bool = False, **refusals: str) -> tuple[Any, bind.Bound]:
    module, (entry,) = bind.Binder(fast_math, verdicts=Refuse(**refusals)).bind(program)
    return module, entry


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("bf16_calls")
def test_what_is_trusted_runs_as_planned() -> None:
    program = lowered(nn.Linear(16, 8), X)
    module, entry = bound(program)
    assert (entry.planned, entry.kernel, entry.reason) == ("conv1x1_bf16", "conv1x1_bf16", "")
    assert any("mkldnn" in str(node.target) for node in module.graph.nodes)


@pytest.mark.usefixtures("bf16_calls")
def test_a_refused_linear_takes_the_next_kernel_and_says_why() -> None:
    program = lowered(nn.Linear(16, 8), X)
    expected = program.graph_module(X)[0]
    refusals: dict[str, str] = {}
    seen = []
    while True:
        module, entry = bound(program, fast_math=True, **refusals)
        seen.append(entry.kernel)
        # every kernel rounds the operands to 8 bits, some the result too
        assert (module(X)[0] - expected).abs().max() <= 2**-6 * expected.abs().max()
        assert (entry.reason == "") == (entry.kernel == entry.planned == "conv1x1_bf16")
        assert all(f"{name}: too slow" in entry.reason for name in refusals if table.get(name).precision == "bf16")
        if entry.kernel == "aten_linear":
            break
        refusals[entry.kernel] = "too slow"
    assert seen[0] == "conv1x1_bf16"
    assert len(seen) == len(set(seen)) >= 4


def test_a_refused_convolution_ends_in_plain_aten() -> None:
    program = lowered(nn.Conv2d(4, 6, 3, 2, 1), IMAGE)
    expected = program.graph_module(IMAGE)[0]
    refusals = {kernel.name: "ref:any" for kernel in table.kernels(Op.CONV) if kernel.backend != Backend.ATEN}
    module, entry = bound(program, **refusals)
    assert entry.kernel == "aten_conv"
    assert "conv_bf16: ref:any" in entry.reason
    # weights as stored, activations no longer rounded
    assert (module(IMAGE)[0] - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_fast_math_kernels_need_the_variable() -> None:
    program = lowered(nn.Linear(16, 8), X)
    _, entry = bound(program, fast_math=True, conv1x1_bf16="ref:any")
    assert table.get(entry.kernel).fast_math
    _, entry = bound(program, fast_math=False, conv1x1_bf16="ref:any")
    assert not table.get(entry.kernel).fast_math
    assert "DNNL_DEFAULT_FPMATH_MODE=BF16 was not set" in entry.reason


@pytest.mark.parametrize("planned", table.kernels(), ids=lambda kernel: kernel.name)
def test_a_fallback_rounds_no_more_than_the_plan(planned: Kernel) -> None:
    """What was validated, perhaps repaired, with results in FP32 is not rounded to BF16 by a load."""
    quicker, fallbacks = bind.alternatives(planned, {kernel.name: 1.0 for kernel in table.kernels(planned.op)})
    assert all(kernel.steps_out_of_bf16 >= planned.steps_out_of_bf16 for kernel in (*quicker, *fallbacks))
    assert planned.backend == Backend.ATEN or fallbacks[-1].backend == Backend.ATEN


def test_fp32_stays_in_fp32() -> None:
    """A node planned in FP32 is never rounded by a fallback."""
    program = lowered(nn.Linear(16, 8), X, target="graviton2")
    module, entry = bound(program, fast_math=True, conv1x1_fp32="ref:any")
    assert (entry.planned, table.get(entry.kernel).precision) == ("conv1x1_fp32", "fp32")
    expected = program.graph_module(X)[0]
    # FP32 sums of 16 terms in another order
    assert (module(X)[0] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4), nn.ReLU6()), X),
        (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Tanh()), IMAGE),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1, dilation=1), nn.ReLU()), IMAGE[:, :, 0]),
        (lambda: nn.Sequential(nn.Conv3d(4, 3, 2), nn.Hardswish()), IMAGE[:, :, None].expand(1, 4, 3, 8, 8)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, 2), IMAGE),
        (lambda: nn.ConvTranspose1d(4, 6, 3), IMAGE[:, :, 0]),
        (lambda: nn.Linear(16, 8), X[0]),
        (lambda: nn.Linear(16, 1), X),
    ],
    ids=["linear", "conv", "1d", "3d", "transposed", "transposed 1d", "vector", "one feature"],
)
@pytest.mark.parametrize("target", ["graviton2", "graviton3"])
def test_this_hosts_kernels_agree_with_the_twins(model: Any, x: torch.Tensor, target: str) -> None:
    """For the target `host` on this machine: oneDNN's x86 kernels, through the same calls and the real probe."""
    program = lowered(model(), x.contiguous(), target=target)
    module, entries = bind.Binder(fast_math=False).bind(program)
    expected, found = program.graph_module(x)[0], module(x)[0]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    # FP32: sums of up to 32 terms in another order. BF16: a fallback may leave out roundings to 8 bits, of two layers.
    unit = 2**-5 if target == "graviton3" else 2**-20
    assert (found - expected).abs().max() <= unit * expected.abs().max()
    assert all(entry.reason or entry.kernel == entry.planned for entry in entries)


@pytest.mark.usefixtures("bf16_calls")
def test_a_shared_weight_is_packed_once() -> None:
    fc = nn.Linear(16, 16, bias=False)
    program = lowered(nn.Sequential(fc, nn.ReLU(), fc), X)
    module, entries = bind.Binder(False, verdicts=Refuse()).bind(program)
    packed = [getattr(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"]
    assert len(entries) == len(packed) == 2
    assert packed[0] is packed[1]


@pytest.mark.usefixtures("bf16_calls")
def test_each_layer_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(probe, "refusal", lambda kernel, site, run: asked.append(kernel.name))
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    binder = bind.Binder(False)
    program = lowered(model, X)
    binder.bind(program)
    binder.bind(program)
    assert len(asked) == 2  # the first two have one shape


def test_what_needs_the_most_work_space_is_bound_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(probe, "refusal", lambda kernel, site, run: asked.append(site.node))
    image, pixels = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 64 * 64, 1)  # 148 and 16 384 weights
    model = nn.Sequential(nn.Linear(64, 64), image, nn.Flatten(), pixels)
    program = lowered(model, torch.zeros(1, 4, 64, 64), target="graviton2")
    bind.Binder(False).bind(program)
    assert asked == ["_1", "_0", "_3"]  # rows of 36 values for each pixel; then 256 rows of 64; then one row


@pytest.mark.usefixtures("bf16_calls")
def test_the_program_is_left_as_it_was() -> None:
    program = lowered(nn.Linear(16, 8), X)
    before = str(program.graph_module.graph)
    bound(program)
    assert str(program.graph_module.graph) == before


def test_a_weight_that_can_not_be_packed_leaves_its_layer_to_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("no AVX-512\nand a trace")

    monkeypatch.setattr("armopt.kernels.onednn_convolution.pack_weight", fail)
    program = lowered(nn.Linear(16, 8), X)
    module, entry = bound(program)
    assert (entry.planned, entry.kernel) == ("conv1x1_bf16", "blas_fp32_w16")
    assert entry.reason.startswith("conv1x1_bf16: can't be packed here: no AVX-512; ")
    # the twin rounds the input and the result to BF16 as well
    assert torch.allclose(module(X)[0], program.graph_module(X)[0], atol=2**-6)


class _Attention(nn.Module):
    """Query, key and value from one product, planned in BF16 to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bf16", [True, False])
def test_attention_of_pytorch_works_in_bf16_where_blas_does(bf16: bool) -> None:
    program = lowered(_Attention(), X[None])
    no = {"attention": "refused"}
    trusted = Refuse(**no) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {}
    module, _ = bind.Binder(False, verdicts=trusted, bf16_attention=bf16).bind(program)
    (found,), seen = query_dtypes(module, X[None])
    assert seen == ["bfloat16" if bf16 else "float32"]
    expected = program.graph_module(X[None])[0]
    # probabilities and results rounded to 8 bits, or not
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()
