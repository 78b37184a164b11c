from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from armopt.ir.onednn_names import is_reference
from armopt.ir.records import Site
from armopt.kernels import table
from armopt.runtime import bind, probe
from armopt.runtime.onednn_log import Execution, Tensor, parse

LOGS = Path(__file__).parents[1] / "data" / "onednn"
SITE = Site("fc", "linear", 8, 32, 16, (8, 32), (16, 32), weight_key="w")
BF16 = table.get("conv1x1_bf16")


def ran(implementation: str = "gemm:acl", primitive: str = "convolution", weights: str = "bf16") -> Execution:
    return Execution(primitive, implementation, tensors={"wei": Tensor(weights, "Acdb16a")}, problem="mb8_ic32oc16")


def reorder(problem: str) -> Execution:
    return Execution(
        "reorder", "jit:uni", tensors={"src": Tensor("f32", "ab"), "dst": Tensor("f32", "BA4b4a")}, problem=problem
    )


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        ((ran(),), None),
        ((ran(primitive="matmul"),), None),
        ((), "oneDNN did not run"),
        ((reorder("8x32"),), "oneDNN did not run"),
        ((ran("ref:any"),), "oneDNN answers with the reference implementation ref:any"),
        ((ran("gemm:ref"),), "oneDNN answers with the reference implementation gemm:ref"),
        ((ran(), reorder("16x32")), "the weight is reordered on every call"),
        ((ran(), reorder("32x16")), "the weight is reordered on every call"),
        ((ran(), reorder("8x32")), None),
        ((ran(weights="f32"),), "gemm:acl runs on f32 weights"),
    ],
)
def test_verdicts(log: tuple[Execution, ...], verdict: str | None) -> None:
    assert probe.judge(BF16, SITE, log) == verdict


def test_fp32_weights_are_right_for_an_fp32_kernel() -> None:
    assert probe.judge(table.get("conv1x1_fp32"), SITE, (ran(weights="f32"),)) is None


def test_names_of_implementations_decide_nothing() -> None:
    """In another release they are others, as KleidiAI's ``kai``: only a reference has a name that counts."""
    for path in sorted(LOGS.glob("*.log")):
        text = path.read_text()
        names = {e.implementation for e in parse(text).executions if not is_reference(e.implementation)}
        assert names
        for kernel in table.kernels():
            for e in parse(text).executions:
                site = replace(SITE, weight=(64, 64))
                verdicts = [
                    probe.judge(kernel, site, (replace(e, implementation=n),)) for n in (e.implementation, "kai")
                ]
                if is_reference(e.implementation):
                    assert "reference" in str(verdicts[0]) or e.primitive == "reorder"
                else:
                    assert str(verdicts[0]).replace(e.implementation, "kai") == str(verdicts[1])
        renamed = parse(re.sub(r"(?<=[,:])acl(?=[,:])", "kai", text)).executions
        assert [replace(e, implementation="") for e in renamed] == [
            replace(e, implementation="") for e in parse(text).executions
        ]
        assert not any("acl" in e.implementation for e in renamed)


def test_blas_and_aten_are_not_probed() -> None:
    def never() -> None:
        raise AssertionError

    for kernel in table.kernels():
        if kernel.backend != "onednn":
            assert probe.refusal(kernel, SITE, never) is None


def test_a_kernel_that_fails_is_refused() -> None:
    def fail() -> None:
        raise RuntimeError("could not create a primitive\nmore")

    assert probe.refusal(BF16, SITE, fail) == "fails on this build: could not create a primitive"


def test_it_runs_twice_and_judges_the_second() -> None:
    """The first call may prepare what later ones reuse."""
    calls = []
    verdict = probe.refusal(BF16, SITE, lambda: calls.append(1))
    assert len(calls) == 2
    assert verdict == "oneDNN did not run"


def test_the_real_log_of_this_host() -> None:
    kernel = table.get("conv1x1_fp32")
    weight = kernel.pack(torch.randn(16, 32), SITE)
    verdict = probe.refusal(kernel, SITE, bind.single(kernel, SITE, weight, None))
    assert verdict is None or "did not run" not in verdict
