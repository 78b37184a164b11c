"""Cycles of what a call ran: each block of instructions by LLVM's model of the core, times how often it ran.

A block's cycles are those of its steady state, as if it ran again and again: what it waits for of itself counts. Its
pipes alone would let a chain of loads or of additions go at once.

Where Arm's own calibration of the Compute Library's kernels says otherwise (the rates of arm_gemm's estimates: the rows
``arm_gemm`` of published.csv), it wins: LLVM thinks twice as well of the ones that round FP32 as they load it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from armopt.emulation.folder import PreparedFolder
from benchmarks.arm64 import llvm, opcodes, profile

#: Multiply-adds in a cycle, as arm_gemm has them measured: on Neoverse-V1, and where it makes no difference of cores.
_V1_RATES = {
    "sve_interleaved_bf16fp32_mmla_8x3VL": 62.5,
    "a64_interleaved_bf16fp32_mmla_8x12": 59.94,
    "sve_hybrid_bf16fp32_mmla_6x4VL": 53.59,
    "a64_hybrid_bf16fp32_mmla_6x16": 40.09,
    "sve_hybrid_fp32bf16fp32_mmla_4x6VL": 20.83,
    "sve_hybrid_fp32bf16fp32_mmla_6x4VL": 17.32,
    "a64_hybrid_fp32bf16fp32_mmla_4x24": 22.33,
    "a64_hybrid_fp32bf16fp32_mmla_6x16": 21.28,
    "a64_ffhybrid_fp32bf16fp32_mmla_6x16": 21.05,
    "sve_interleaved_fp32_mla_8x3VL": 15.15,
    "sve_hybrid_fp32_mla_6x4VL": 15.65,
    "a64_sgemm_8x12": 14.95,
    "a64_hybrid_fp32_mla_6x16": 13.43,
    "a64_hybrid_fp32_mla_4x24": 13.86,
    "sve_interleaved_bf16fp32_dot_8x3VL": 31.82,
    "sve_hybrid_bf16fp32_dot_6x4VL": 31.55,
    "a64_hybrid_bf16fp32_dot_6x16": 27.34,
}
_RATES = {
    "sve_interleaved_bf16fp32_mmla_8x3VL": 31.41,
    "a64_interleaved_bf16fp32_mmla_8x12": 31.54,
    "sve_hybrid_bf16fp32_mmla_6x4VL": 24.74,
    "a64_hybrid_bf16fp32_mmla_6x16": 25.04,
    "sve_hybrid_fp32bf16fp32_mmla_4x6VL": 16.63,
    "sve_hybrid_fp32bf16fp32_mmla_6x4VL": 14.06,
    "a64_hybrid_fp32bf16fp32_mmla_4x24": 18.9,
    "a64_hybrid_fp32bf16fp32_mmla_6x16": 16.37,
    "a64_ffhybrid_fp32bf16fp32_mmla_6x16": 15.27,
}
#: Cores that multiply 512 bits in a cycle, V1 in two pipes of 256 bits or four of 128, V2 in four of 128 (LLVM's models
#: of both). arm_gemm gives V2 the rates that it has for cores that it does not know, which at most half fill it.
_OF_FOUR_PIPES = ("neoverse-v1", "neoverse-v2")
#: Figures that arm_gemm has once for all cores were measured on V1.
_FIXED_FORMAT = {
    "sve_ffinterleaved_bf16fp32_mmla_8x3VL": 39.9,
    "sve_ffhybrid_bf16fp32_mmla_6x4VL": 49.1,
    "sve_ffhybrid_fp32bf16fp32_mmla_4x6VL": 32.35,
    "a64_ffhybrid_bf16fp32_mmla_6x16": 37.09,
    "a64_ffhybrid_fp32bf16fp32_mmla_4x24": 28.48,
    "a64_ffinterleaved_bf16fp32_mmla_8x12": 31.62,
    "sve_ffinterleaved_fp32_mla_8x3VL": 13.51,
    "sve_ffhybrid_fp32_mla_6x4VL": 15.27,
    "a64_ffhybrid_fp32_mla_6x16": 13.16,
}
#: Of what is multiplied in a block, per 128 bits: BFMMLA 16, BFDOT 8, FMLA on FP32 4.
_MULTIPLIED = {"sve_bfmmla": 16, "neon_bfmmla": 16, "bfdot": 8, "fmla": 4}
_KERNEL = re.compile(r"((?:sve|a64)_\w*?_\d+x\d+(?:VL)?)")
#: Blocks that make up this share of the instructions are asked of LLVM; the rest cost what those do on average.
_SHARE = 0.998
_PYTHON = ("python3", "_ctypes", "libffi")
#: Who gives work to threads: OpenMP, and an OpenBLAS with threads of its own. One built with OpenMP lacks the latter.
_PARALLEL = ("GOMP_parallel", "exec_blas_async")
_NOP, _YIELD = 0xD503201F, 0xD503203F


@dataclass(frozen=True)
class Block:
    """Instructions that always run together.

    Attributes:
        address: Where they are.
        opcodes: Them.
        mine: How often the thread that called ran them.
        every: How often all threads did.
        place: Library and symbol.
    """

    address: int
    opcodes: tuple[int, ...]
    mine: int
    every: int
    place: tuple[str, str]

    @property
    def waits(self) -> bool:
        """Whether a thread spins here until another is ready: OpenBLAS's do, on eight nops and little else.

        Generated code has nops too, in front of its loops: they are few there.
        """
        nops = self.opcodes.count(_NOP)
        return _YIELD in self.opcodes or (nops >= 4 and 2 * nops >= len(self.opcodes))

    @property
    def kernel(self) -> str:
        """The Compute Library's name of the kernel that it is of; empty elsewhere."""
        found = _KERNEL.search(self.place[1])
        return found[1].replace("_x1", "") if found and "arm_gemm" in self.place[1] else ""


@dataclass(frozen=True)
class Cycles:
    """What the instructions of a call need, if all data is in the first level of cache.

    Attributes:
        instructions: Of the thread that called, without those with which it waits for others.
        cycles: Of the same.
        blocks: Of the same: how many different ones.
        instructions_of_all: Of all threads.
        cycles_of_all: Of all threads.
        regions: Parallel regions that it opened.
    """

    instructions: int
    cycles: float
    blocks: int
    instructions_of_all: int
    cycles_of_all: float
    regions: int


def blocks_of(result: Mapping[str, Any], core: str) -> list[Block]:
    """The blocks that clock_region.py found, with the functions that they are of, less those of an empty call."""
    sysroot = PreparedFolder.default().path / "cores" / core
    mapped = [(start, end, offset, _on_host(path, sysroot)) for start, end, offset, path in result["mappings"]]
    places = profile.symbols([block[0] for block in result["blocks"]], mapped)
    empty = {(address, code): runs for address, code, runs, _ in result["empty"]}
    found = []
    for (address, code, mine, every), place in zip(result["blocks"], places, strict=True):
        none = empty.get((address, code), 0)
        if every > none:
            opcodes_of = tuple(int(code[i : i + 8], 16) for i in range(0, len(code), 8))
            found.append(Block(address, opcodes_of, max(mine - none, 0), every - none, place))
    return found


def without_python(blocks: Sequence[Block]) -> list[Block]:
    """Those that a program in C would run as well."""
    return [block for block in blocks if not block.place[0].startswith(_PYTHON)]


def by_class(blocks: Sequence[Block]) -> list[int]:
    """Instructions of the thread that called, in the order of the classes."""
    found: Counter[str] = Counter()
    for block in blocks:
        for opcode in block.opcodes:
            found[opcodes.classify(opcode)] += block.mine
    return [found[name] for name in opcodes.CLASSES]


def _on_host(path: str, sysroot: Path) -> str:
    there = sysroot / path.lstrip("/")
    return str(there) if path.startswith("/") and there.exists() else path


def cycles(blocks: Sequence[Block], cpu: str) -> Cycles:
    """What they need on a core (by LLVM's name)."""
    working = [block for block in blocks if not block.waits]
    working.sort(key=lambda block: -block.every * len(block.opcodes))
    total = sum(block.every * len(block.opcodes) for block in working)
    known, seen = [], 0
    for block in working:
        known.append(block)
        seen += block.every * len(block.opcodes)
        if seen >= _SHARE * total:
            break
    costs = {id(block): _cost(block, found, cpu) for block, found in zip(known, _of_llvm(cpu, known), strict=True)}
    mean = sum(costs[id(b)] * b.every for b in known) / max(seen, 1)

    def needed(runs: str) -> float:
        return sum(getattr(b, runs) * costs.get(id(b), mean * len(b.opcodes)) for b in working)

    return Cycles(
        sum(b.mine * len(b.opcodes) for b in working),
        needed("mine"),
        sum(b.mine > 0 for b in working),
        total,
        needed("every"),
        _regions(blocks),
    )


_known: dict[tuple[str, tuple[int, ...]], float] = {}


def _of_llvm(cpu: str, blocks: Sequence[Block]) -> list[float]:
    missing = list({block.opcodes: None for block in blocks if (cpu, block.opcodes) not in _known})
    _known.update(zip([(cpu, codes) for codes in missing], llvm.cycles(cpu, missing), strict=True))
    return [_known[cpu, block.opcodes] for block in blocks]


def _cost(block: Block, cost: float, cpu: str) -> float:
    rate = rate_of(block.kernel, cpu)
    if not rate:
        return cost
    vectors = 2 if cpu == "neoverse-v1" else 1  # of 128 bits in a register of SVE
    multiplied = sum(
        _MULTIPLIED.get(kind, 0) * (vectors if block.kernel.startswith("sve") else 1)
        for kind in map(opcodes.classify, block.opcodes)
    )
    return max(cost, multiplied / rate)


@cache
def rate_of(kernel: str, cpu: str) -> float:
    """Multiply-adds in a cycle of one of the Compute Library's kernels; 0 where arm_gemm says nothing of it."""
    if cpu in _OF_FOUR_PIPES:
        return _V1_RATES.get(kernel) or _FIXED_FORMAT.get(kernel, 0.0)
    return _RATES.get(kernel) or _FIXED_FORMAT.get(kernel, 0.0) / 2


def _regions(blocks: Sequence[Block]) -> int:
    """How often OpenMP or OpenBLAS gave work to threads: the runs of the first block of what does so."""
    found = 0
    for name in _PARALLEL:
        entries = [block for block in blocks if block.place[1] == name]
        found += min(entries, key=lambda block: block.address).mine if entries else 0
    return found
