from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armopt.runtime.onednn_log import Tensor, capture_verbose, parse, references, weight_reorders
from tests.packing import is_packing

LOGS = Path(__file__).parents[1] / "data" / "onednn"
ARM = (LOGS / "torch-2.10.0-neoverse-v1-sections.log").read_text()
X86 = (LOGS / "torch-2.13.0-x86.log").read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"# {title}\n")[2].partition("\n# ")[0]


def test_headers() -> None:
    arm, x86 = parse(ARM).header, parse(X86).header
    assert (arm.onednn_version, arm.runtime, arm.isa) == ("3.7.1", "OpenMP", "AArch64 SVE (256 bits)")
    assert (x86.onednn_version, x86.threads) == ("3.12.0", 1)
    assert arm.commit == "8d263e693366ef8db40acc569cc7d8edf644556d"


@pytest.mark.parametrize("path", sorted(LOGS.glob("*.log")), ids=lambda p: p.stem)
def test_every_log_reads_whole(path: Path) -> None:
    text = path.read_text()
    log = parse(text)
    lines = [line for line in text.splitlines() if ",primitive,exec," in line]
    assert len(log.executions) == len(lines) > 0
    assert log.header.onednn_version in {"3.7.1", "3.12.0"}
    for execution in log.executions:
        assert execution.tensors
        assert execution.problem


def test_a_matmul_sees_a_weight_transposed() -> None:
    (reorder,) = parse(
        "onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:ba::f0 "
        "dst:bf16::blocked:BA8b4a::f0,attr-scratchpad:user attr-fpmath:bf16,,64x96,3.06104"
    ).executions
    assert reorder.reorders([(96, 64)])
    assert reorder.reorders([(64, 96, 1, 1)])
    assert not reorder.reorders([(96, 96)])


def test_eager_linear_on_arm_packs_its_weight() -> None:
    reorder, matmul = parse(section(ARM, "linear, eager")).executions
    assert (matmul.primitive, matmul.implementation) == ("matmul", "gemm:acl")
    assert matmul.weight_dtype == "bf16"
    assert matmul.tensors["wei"] == Tensor("bf16", "BA4b4a")
    assert matmul.attributes["fpmath"] == "bf16"
    assert matmul.problem == "32x64:64x64"
    assert is_packing(reorder)
    assert weight_reorders((reorder, matmul), [(64, 64)]) == (reorder,)
    assert weight_reorders((reorder, matmul), [(64, 32)]) == ()


def test_packed_convolution_on_arm_reorders_nothing() -> None:
    first, second = parse(section(ARM, "_convolution_pointwise, packed, relu, twice")).executions
    for execution in (first, second):
        assert execution.implementation == "gemm:acl"
        assert not execution.is_reference
        assert execution.weight_dtype == "bf16"
        assert execution.attributes["post-ops"] == "eltwise_relu"
        assert execution.auxiliary == "alg:convolution_direct"


def test_reference_kernels_are_found() -> None:
    slow = references(parse(ARM).executions)
    assert {e.implementation for e in slow} == {"ref:any", "gemm:ref"}
    assert references(parse(X86).executions) == ()


def test_a_weight_that_is_reordered_for_a_reference_kernel() -> None:
    executions = parse(section(ARM, "_convolution_pointwise in bf16, packed, relu")).executions
    assert [e.primitive for e in executions] == ["reorder", "reorder", "convolution"]
    assert [is_packing(e) for e in executions] == [True, False, False]
    assert len(weight_reorders(executions, [(32, 16, 3, 3)])) == 2


def test_grouped_weights_are_known_by_pytorchs_shape() -> None:
    executions = parse(section(ARM, "grouped conv2d, eager")).executions
    assert executions[0].problem == "4x8x4x3x3"
    assert executions[0].reorders([(32, 4, 3, 3)])
    depthwise = parse(section(ARM, "depthwise conv2d, eager")).executions
    assert depthwise[0].reorders([(16, 1, 3, 3)])
    assert depthwise[1].implementation == "jit_dw:sve_256"
    assert not depthwise[1].is_reference


def test_nested_creation_is_no_execution() -> None:
    lines = section(X86, "_linear_pointwise, packed, none, twice")
    assert "create_nested" in lines
    assert [e.primitive for e in parse(lines).executions] == ["inner_product", "inner_product"]


def test_the_format_of_onednn_2() -> None:
    """From the AWS Graviton Technical Guide: no version, underscore before the type, no time."""
    line = (
        "dnnl_verbose,exec,cpu,convolution,gemm:ref,forward_training,src_f32::blocked:abcd:f0 "
        "wei_f32::blocked:abcde:f0 bia_f32::blocked:a:f0 dst_f32::blocked:abcd:f0,post_ops:'eltwise_relu;';,"
        "alg:convolution_direct,mb1_g64ic64oc64_ih112oh56kh3sh2dh0ph0_iw112ow56kw3sw2dw0pw0"
    )
    (execution,) = parse(line).executions
    assert execution.is_reference
    assert execution.tensors["wei"] == Tensor("f32", "abcde")
    assert execution.problem.startswith("mb1_g64")


def test_timestamps_other_text_and_cut_lines() -> None:
    whole = "onednn_verbose,v1,1693533460193.346924,primitive,exec,cpu,reorder,jit:uni,undef,"
    whole += "src:f32::blocked:ab::f0 dst:f32::blocked:ba::f0,,,2x2,0.1"
    text = f"loading… {whole}\n\nonednn_verbose,v1,primitive,exec,cpu,matmul\nhello\n"
    assert [e.primitive for e in parse(text).executions] == ["reorder"]


LINE = st.sampled_from([line for line in (ARM + X86).splitlines() if line.startswith("onednn_verbose")])


@given(st.text() | st.lists(st.text(alphabet=",:x_v1execpuinfo\n0", max_size=80)).map("onednn_verbose,".join))
def test_arbitrary_text_never_raises(text: str) -> None:
    parse(text)


@given(LINE, st.integers(0, 400), st.text(max_size=5))
def test_a_damaged_line_never_raises(line: str, at: int, junk: str) -> None:
    for execution in parse(line[:at] + junk + line[at:]).executions:
        execution.reorders([(64, 64)])
        assert isinstance(execution.is_reference, bool)
    parse(line[:at])


def convolve() -> None:
    """Reaches oneDNN on every host."""
    x, weight = torch.ones(1, 16, 8, 8), torch.ones(16, 16, 3, 3)
    torch.ops.mkldnn._convolution_pointwise(x, weight, None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


def test_capture_collects_what_ran_and_passes_the_rest_on(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with capture_verbose() as log:
        print("inside")
        os.system("echo child")
        convolve()
    print("after")
    assert "convolution" in [e.primitive for e in log.executions]
    assert sorted(capfd.readouterr().out.split()) == ["after", "before", "child", "inside"]


def test_capture_ends_cleanly_on_an_exception(capfd: pytest.CaptureFixture[str]) -> None:
    with suppress(ZeroDivisionError), capture_verbose() as log:
        convolve()
        _ = 1 / 0
    assert log.executions
    convolve()  # must not be logged any more
    assert "onednn_verbose" not in capfd.readouterr().out


def test_captures_wait_for_each_other() -> None:
    counts: list[int] = []

    def work() -> None:
        with capture_verbose() as log:
            convolve()
        counts.append(sum(e.primitive == "convolution" for e in log.executions))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("close", [False, True])
def test_capture_with_the_users_own_log_and_with_stdout_closed(close: bool) -> None:
    code = (
        "import torch, os, sys\nfrom armopt.runtime.onednn_log import capture_verbose\n"
        f"if {close}: os.close(1)\n"
        f"{inspect.getsource(convolve)}\n"
        "with capture_verbose() as log: convolve()\n"
        "convolve()\n"
        "print(len([e for e in log.executions if e.primitive == 'convolution']), file=sys.stderr)\n"
    )
    env = {**os.environ, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr.split()[-1:] == ["1"]
    if not close:
        assert len([e for e in parse(done.stdout).executions if e.primitive == "convolution"]) == 2
