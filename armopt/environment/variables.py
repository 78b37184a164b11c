"""The variables that a target wants, each with its value and why.

True to the builds of torch 2.10 to 2.15, found in their libraries and under emulation:

- ``DNNL_DEFAULT_FPMATH_MODE`` is read while torch is imported; set from Python later, it is lost silently.
  oneDNN also takes the prefix ``ONEDNN_``, which wins where both are set.
- ``THP_MEM_ALLOC_ENABLE`` has no effect on aarch64: mimalloc allocates there and asks for huge pages itself,
  unless, from 2.13, ``MIMALLOC_ALLOW_THP=0`` forbids it (QEMU's log of system calls, see docs/knobs.md).
- ``OMP_PROC_BIND`` other than ``false`` (``OMP_PLACES`` alone implies it) binds the main thread, and so every
  thread that Python starts from it, to one core. Hence it is off; ``OMP_PLACES``, void then, isn't set.
- oneDNN and ACL make some hundred small objects on each call of a packed layer, by glibc's malloc: nearly half of
  what a small one costs. Allocators with a cache for each thread take a third off (docs/knobs.md).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from armopt.environment.build import holds, libraries, needle
from armopt.environment.fpmath import FPMATH
from armopt.errors import BundleError, InputError
from armopt.ir.records import Target

FRAMEWORKS = ("pytorch", "tensorflow")
#: Read by the OpenMP runtime, which may lie outside torch's own folders, and by the dynamic loader.
_READ_ELSEWHERE = ("OMP_", "LD_")
PRELOAD = "LD_PRELOAD"
#: By what a call of a packed layer takes with each, the least first.
_ALLOCATORS = ("tcmalloc_minimal", "tcmalloc", "jemalloc", "mimalloc")
#: Debian's, Fedora's and Amazon's, and one's own builds.
_LIBRARY_FOLDERS = (
    *("usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib"),
    *("usr/local/lib/aarch64-linux-gnu", "usr/local/lib64", "usr/local/lib"),
)

#: What it costs not to have a variable as the bundle wants it.
COSTS: Mapping[str, str] = {
    FPMATH: "oneDNN multiplies in FP32: 2.2 times the time at batch 256 (tutorial, Graviton3)",
    "LRU_CACHE_CAPACITY": "oneDNN builds its primitives anew when layers alternate: 20-35 % more if small",
    "OMP_NUM_THREADS": "more threads than CPUs wait for each other at every layer; fewer leave CPUs idle",
    "OMP_PROC_BIND": "the main thread and all threads that Python starts share one core",
    "TORCH_MKLDNN_MATMUL_MIN_DIM": "Linears left to ATen pack their weights on each call: 2-3 times "
    "the time at batch 10 to 32 (tutorial, Graviton3)",
    PRELOAD: "each call of a packed layer retires 50 to 80 thousand instructions more",
    "THP_MEM_ALLOC_ENABLE": "large tensors live in small pages: 8 % more time at batch 256 (tutorial)",
}
_THREADS_WHY = "one thread for each CPU that this worker may use, so that none waits for another"
_PRELOAD_WHY = (
    "oneDNN and ACL make some hundred small objects on each call of a packed layer: with glibc's malloc a small one "
    "retires 250 thousand instructions, with tcmalloc 163, mimalloc 172, jemalloc 174"
)
_FPMATH_WHY = "oneDNN multiplies FP32 operands in BF16 (BFMMLA on Arm) and accumulates in FP32"


@dataclass(frozen=True, slots=True)
class Variable:
    """The value of an environment variable, and one sentence on its effect."""

    value: str
    why: str


def wanted(
    target: Target,
    *,
    threads: int | None = None,
    build: Mapping[str, str] | None = None,
    framework: str = "pytorch",
    left_to_aten: bool = True,
    allocator: str = "",
) -> dict[str, Variable]:
    """What to set before torch, or TensorFlow, is imported.

    Args:
        target: The product that will run.
        threads: Threads of one worker, see :func:`threads_for_host`; None leaves the number open, as for a
            host that isn't known yet.
        build: The torch build that will run, see :func:`installed`; None leaves out what only some want.
        framework: ``pytorch`` or ``tensorflow``.
        left_to_aten: Whether any Linear or product runs as plain ATen, which alone looks at the size of a product.
        allocator: The library to preload, see :func:`allocator_library`; TensorFlow gets none.

    Raises:
        InputError: Another framework.
    """
    if framework == "tensorflow":
        return _tensorflow(target, threads)
    if framework != "pytorch":
        raise InputError(f"unknown framework {framework!r}", hint=f"Known are {', '.join(FRAMEWORKS)}")
    chosen: dict[str, Variable] = {}
    if target.bf16:
        chosen[FPMATH] = Variable("BF16", _FPMATH_WHY)
    chosen["LRU_CACHE_CAPACITY"] = Variable(
        "1024",
        "keeps oneDNN's primitives: on aarch64 torch keeps one only, so alternating layers rebuild theirs",
    )
    chosen["OMP_PROC_BIND"] = Variable(
        "false", "binding would put the main thread, and all threads that Python starts, on one core"
    )
    if threads is not None:
        chosen["OMP_NUM_THREADS"] = Variable(str(threads), _THREADS_WHY)
    if left_to_aten and build and build.get("blas", "").startswith("OpenBLAS"):
        # NVPL's sgemm does three times the work of oneDNN's at a batch of 32, so there the default is right.
        chosen["TORCH_MKLDNN_MATMUL_MIN_DIM"] = Variable(
            "64", "small Linears left to ATen go to OpenBLAS: oneDNN would pack their weights on each call"
        )
    if build and (build.get("allocator"), build.get("thp_switch")) == ("posix_memalign", "THP_MEM_ALLOC_ENABLE"):
        chosen["THP_MEM_ALLOC_ENABLE"] = Variable("1", "torch asks for huge pages for large tensors: fewer TLB misses")
    if allocator:
        chosen[PRELOAD] = Variable(allocator, _PRELOAD_WHY)
    return chosen


def _tensorflow(target: Target, threads: int | None) -> dict[str, Variable]:
    """Checked on the emulated Graviton3 with TensorFlow 2.21.0 for aarch64 from PyPI: tests/arm64."""
    chosen = {
        "TF_ENABLE_ONEDNN_OPTS": Variable("1", "TensorFlow calls oneDNN, and so the Arm Compute Library, not Eigen"),
        "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": Variable(
            "1", "convolutions pack their filter once for ACL, else oneDNN's gemm:ref runs; unset it for training"
        ),
    }
    if target.bf16:
        chosen[FPMATH] = Variable("BF16", _FPMATH_WHY)
    if threads is not None:
        chosen["TF_NUM_INTRAOP_THREADS"] = Variable(str(threads), "oneDNN runs in TensorFlow's own pool of threads")
        chosen["OMP_NUM_THREADS"] = Variable(str(threads), _THREADS_WHY)
    return chosen


#: What a bundle may say of each variable that it records. An allocator's path is this host's own, never a bundle's.
_RECORDED: Mapping[str, str] = {
    FPMATH: "BF16",
    "LRU_CACHE_CAPACITY": r"[1-9]\d{0,8}",
    "OMP_NUM_THREADS": r"[1-9]\d{0,3}",
    "OMP_PROC_BIND": "false|true",
    "THP_MEM_ALLOC_ENABLE": "[01]",
    "TORCH_MKLDNN_MATMUL_MIN_DIM": r"\d{1,9}",
}


def recorded(entries: Mapping[str, Variable], where: str) -> dict[str, Variable]:
    """The variables that a bundle records, if each is one that armopt sets, with a value of its grammar.

    Whoever changes a bundle could otherwise have a process start with a library or a module of theirs.

    Args:
        entries: As the manifest has them.
        where: The bundle, for the error.

    Raises:
        BundleError: Naming the variable.
    """
    for name, variable in entries.items():
        if name not in _RECORDED:
            what = f"wants the variable {name!r}, which armopt never sets"
        elif not re.fullmatch(_RECORDED[name], variable.value):
            what = f"wants {name}={variable.value!r}, which is no value of it"
        elif not variable.why.isprintable():
            what = f"gives a reason for {name} that is no line of text"
        else:
            continue
        raise BundleError(what, where=where, hint="The bundle was changed: make it again, and trust its source")
    return dict(entries)


def only_read(wanted: Mapping[str, Variable], folder: Path | None) -> dict[str, Variable]:
    """Those of `wanted` that some library of the installed framework reads.

    All of them where there is no such framework here; OMP_* and LD_* always: the OpenMP runtime may be the system's,
    and the dynamic loader is.

    Args:
        wanted: See :func:`armopt.environment.wanted`.
        folder: Of the framework's package, see :func:`package_folder`.
    """
    if not folder or not (found := libraries(folder)):
        return dict(wanted)
    largest_first = sorted(found, key=lambda p: -p.stat().st_size)
    return {
        name: variable
        for name, variable in wanted.items()
        if name.startswith(_READ_ELSEWHERE) or any(holds(library, needle(name)) for library in largest_first)
    }


def allocator_library(*, root: Path = Path("/")) -> str:
    """The allocator to preload on this host: the first of tcmalloc, jemalloc, mimalloc that is installed.

    Empty where there is none, and on machines other than aarch64, where no packed layer runs.

    Args:
        root: Where /usr is found; for tests.
    """
    if platform.machine() != "aarch64":
        return ""
    for name in _ALLOCATORS:
        for folder in _LIBRARY_FOLDERS:
            for library in sorted((root / folder).glob(f"lib{name}.so.*")):
                if _is_aarch64(library):
                    return str(library)
    return ""


def _is_aarch64(library: Path) -> bool:
    """Whether the file is an ELF file for aarch64, not one of another machine in a folder they share."""
    try:
        with library.open("rb") as stream:
            header = stream.read(20)
    except OSError:  # a link to nowhere
        return False
    return header.startswith(b"\x7fELF\x02\x01") and header[18:20] == b"\xb7\x00"  # 64 bits, EM_AARCH64
