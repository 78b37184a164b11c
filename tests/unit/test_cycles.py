"""Cycles of blocks of instructions: LLVM's model of a core, and Arm's own calibration."""

from __future__ import annotations

import pytest

from benchmarks.arm64 import cycles, llvm
from benchmarks.arm64.cycles import Block

#: add x0, x0, #1; add x1, x1, #1; ld1 { v0.s }[0], [x1]; fmla z8.s, p0/m, z16.s, z31.s
_ADD_X0, _ADD_X1, _LANE, _FMLA, _NOP = 0x91000400, 0x91000421, 0x0D408020, 0x65BF0208, 0xD503201F


def test_nops_in_front_of_a_loop_of_generated_code_are_not_waiting() -> None:
    """OpenBLAS's threads spin on eight, with a load, a comparison and a branch."""
    spins, computes = (_NOP,) * 8 + (_ADD_X0,) * 3, (_ADD_X0, *(_NOP,) * 6, *(_FMLA,) * 96)
    assert [Block(0, code, 1, 1, ("", "")).waits for code in (spins, computes)] == [True, False]


@pytest.fixture(scope="module")
def llvm_mca() -> None:
    llvm.prepare()


def test_a_load_of_one_lane_is_a_load_and_an_insertion() -> None:
    assert llvm.parts("ld1\t{ v4.s }[3], [x26]") == ["ldr s31, [x26]", "mov v4.s[3], v31.s[0]"]
    whole = "ld1\t{ v4.4s }, [x26]"
    assert llvm.parts(whole) == [whole]


@pytest.mark.full  # llvm-mca is downloaded where it is not there
@pytest.mark.usefixtures("llvm_mca")
def test_what_waits_for_its_own_result_takes_longer() -> None:
    """Pipes alone would let four additions go at once."""
    chain, apart = llvm.cycles("neoverse-v1", [[_ADD_X0] * 8, [_ADD_X0, _ADD_X1] * 4])
    assert chain == pytest.approx(8, rel=0.1)
    assert apart == pytest.approx(4, rel=0.1)


@pytest.mark.full  # llvm-mca is downloaded where it is not there
@pytest.mark.usefixtures("llvm_mca")
def test_loads_of_lanes_wait_for_the_register_only_to_insert() -> None:
    """Eight cycles each, were the load to wait as well: oneDNN's reorders would take four times their time."""
    (found,) = llvm.cycles("neoverse-v1", [[_LANE] * 8])
    assert 12 <= found <= 24


@pytest.mark.parametrize(
    ("core", "rate"), [("neoverse-v1", 62.5), ("neoverse-v2", 62.5), ("neoverse-n2", 31.41), ("neoverse-n1", 31.41)]
)
def test_cores_of_four_pipes_have_the_rates_that_arm_measured_on_one(core: str, rate: float) -> None:
    assert cycles.rate_of("sve_interleaved_bf16fp32_mmla_8x3VL", core) == rate


@pytest.mark.full  # llvm-mca is downloaded where it is not there
@pytest.mark.usefixtures("llvm_mca")
def test_a_call_needs_what_its_blocks_do_as_often_as_they_ran() -> None:
    blocks = [Block(0, (_ADD_X0,) * 8, 10, 40, ("", "")), Block(64, (_ADD_X0,) * 4, 5, 5, ("", ""))]
    found = cycles.cycles(blocks, "neoverse-v1")
    assert found.cycles == pytest.approx(10 * 8 + 5 * 4, rel=0.1)
    assert found.cycles_of_all == pytest.approx(40 * 8 + 5 * 4, rel=0.1)
    assert (found.blocks, found.instructions) == (2, 100)


@pytest.mark.full  # llvm-mca is downloaded where it is not there
@pytest.mark.usefixtures("llvm_mca")
@pytest.mark.parametrize(
    ("calls", "regions"),
    [
        (["exec_blas", "exec_blas_async"], 2),  # OpenBLAS with threads of its own
        (["exec_blas", "GOMP_parallel"], 2),  # and built with OpenMP, which opens the region for it
        (["exec_blas_async", "GOMP_parallel"], 4),  # PyTorch's region, then OpenBLAS's
    ],
)
def test_a_parallel_region_counts_once_whoever_opens_it(calls: list[str], regions: int) -> None:
    blocks = [Block(64 * at, (_ADD_X0,) * 4, 2, 2, ("", name)) for at, name in enumerate(calls)]
    assert cycles.cycles(blocks, "neoverse-v1").regions == regions
