"""What a result depends on outside the model: recorded in a bundle, set by ``armopt run``, compared at load.

True to the builds of torch 2.10 to 2.13, found in their libraries and under emulation:

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

import ctypes
import functools
import importlib.util
import json
import mmap
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from armopt.errors import InputError
from armopt.ir import Target

FPMATH = "DNNL_DEFAULT_FPMATH_MODE"
FORMATS = ("shell", "docker", "systemd", "k8s", "json")
FRAMEWORKS = ("pytorch", "tensorflow")
#: The torch whose aarch64 wheel from PyPI is for CPUs alone and holds OpenBLAS and ACL; later ones are CUDA builds.
CPU_TORCH = "2.10.0"
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
_COSTS: Mapping[str, str] = {
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


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a host differs from what a bundle wants.

    Attributes:
        severity: ``hard`` (refuse), ``soft`` (probe again and warn), ``info``.
        what: The feature, variable or version concerned.
        expected: By the bundle.
        found: On the host.
        cost: What is lost.
        remedy: The next step; empty where there is none.
    """

    severity: Literal["hard", "soft", "info"]
    what: str
    expected: str
    found: str
    cost: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.what}: expected {self.expected}, found {self.found}: {self.cost}"
        return f"{text}. {self.remedy}" if self.remedy else text


def variables(
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
    if build and build.get("allocator") == "posix_memalign":
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


def for_process(
    wanted: Mapping[str, Variable], environ: Mapping[str, str], *, limit: int
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment of a process that is to have the variables `wanted`, and what is worth saying about it.

    Whatever else is in `environ` stays, LD_PRELOAD too, even if empty: there the user chose. oneDNN's own prefix would
    win, so it goes where it says something else.

    Args:
        wanted: See :func:`variables`.
        environ: Of this process.
        limit: CPUs that all workers on this host share, see :func:`threads_for_host`.
    """
    found, remarks = dict(environ), []
    for name, variable in sorted(wanted.items()):
        if name != PRELOAD or name not in environ:
            found[name] = variable.value
    own = "ONEDNN" + FPMATH.removeprefix("DNNL")
    if FPMATH in wanted and own in found and not _agree(FPMATH, wanted[FPMATH].value, found[own]):
        remarks.append(f"{own}={found.pop(own)} would win over {FPMATH}={wanted[FPMATH].value}: removed")
    threads = found.get("OMP_NUM_THREADS", "")
    if "OMP_NUM_THREADS" in wanted and threads.isdecimal() and int(threads) > limit:
        remarks.append(f"OMP_NUM_THREADS={threads} on {limit} CPUs: {_COSTS['OMP_NUM_THREADS']}")
    return found, tuple(remarks)


def only_read(wanted: Mapping[str, Variable], folder: Path | None) -> dict[str, Variable]:
    """Those of `wanted` that some library of the installed framework reads.

    All of them where there is no such framework here; OMP_* and LD_* always: the OpenMP runtime may be the system's,
    and the dynamic loader is.

    Args:
        wanted: See :func:`variables`.
        folder: Of the framework's package, see :func:`package_folder`.
    """
    if not folder or not (libraries := _libraries(folder)):
        return dict(wanted)
    largest_first = sorted(libraries, key=lambda p: -p.stat().st_size)
    return {
        name: variable
        for name, variable in wanted.items()
        if name.startswith(_READ_ELSEWHERE) or any(_holds(library, _needle(name)) for library in largest_first)
    }


def threads_for_host(workers: int = 1, *, root: Path = Path("/")) -> int:
    """Threads for each of `workers` processes: never more, in all, than the CPUs this process may use.

    The least of the cgroup's CPU quota (v1 and v2, rounded down), the scheduler affinity and the physical
    cores within it (of two hyperthreads one counts; Arm servers have one thread per core), divided by
    `workers`; at least 1.

    Args:
        workers: Processes that will run at the same time on this host.
        root: Where /proc and /sys are found; for tests.
    """
    cpus = _affinity()
    limits = [len(cpus), _physical(cpus, root)]
    if (quota := _cgroup_quota(root)) is not None:
        limits.append(int(quota))
    return max(1, min(limits) // max(1, workers))


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


def installed(*, deep: bool = False) -> dict[str, str]:
    """Facts about the installed torch, read from its files without importing it; empty where there is none.

    Keys, each only where known: ``torch``, ``torch_git``, ``torch_build`` (``cpu``, ``cuda 13.0``…), ``acl``
    (version), ``blas`` (``OpenBLAS 0.3.30``, ``NVPL``), ``sbgemm`` (``yes``, ``no``: whether that BLAS
    multiplies BF16), ``allocator`` (``mimalloc``, ``posix_memalign``), ``thp_switch`` (the variable that decides on
    huge pages for tensors, or ``none``).

    Args:
        deep: Also search libtorch_cpu.so itself (hundreds of MB), where a build may hold ACL or its BLAS.
    """
    with suppress(Exception):  # a half-installed torch is reported by what is missing here
        folder = package_folder()
        if folder:
            return _installed(folder, deep)
    return {}


def record(*, deep: bool = False) -> dict[str, str]:
    """Versions and build facts of this process, for a manifest or a comparison; imports torch, never raises.

    Beyond those of :func:`installed`: ``python``, ``machine``, ``system``, ``torchvision`` and
    ``transformers`` where installed, ``cpu_capability``, ``onednn``, ``openmp`` (file of each runtime loaded),
    ``blas_core`` (the kernels OpenBLAS picked), ``threads`` (as torch uses now), ``threads_for_host``,
    ``affinity``, ``thp`` (the kernel's setting), ``malloc`` (the allocator's library that is loaded, else ``glibc
    2.36``).

    Args:
        deep: See :func:`installed`.
    """
    facts = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        **installed(deep=deep),
    }
    probes: Mapping[str, Callable[[], str]] = {
        "torchvision": lambda: _distribution("torchvision"),
        "transformers": lambda: _distribution("transformers"),
        "cpu_capability": _cpu_capability,
        "onednn": lambda: _config(r"MKL-DNN v([\d.]+)"),
        "threads": _torch_threads,
        "threads_for_host": lambda: str(threads_for_host()),
        "affinity": lambda: str(len(_affinity())),
        "thp": thp_setting,
        # After those that import torch, since these look at what is loaded.
        "openmp": lambda: ", ".join(Path(p).name for p in _loaded("gomp", "libomp", "iomp5")),
        "blas_core": _openblas_core,
        "malloc": _malloc,
    }
    for name, probe in probes.items():
        facts |= _fact(name, probe)
    if "blas" not in facts:
        facts |= _fact("blas", _linked_blas)
    return facts


def compare(
    manifest_environment: Mapping[str, Mapping[str, str]],
    required_features: Collection[str],
    recorded_versions: Mapping[str, str],
    host: Target,
    environ: Mapping[str, str],
    *,
    record: Mapping[str, str],
    late: Collection[str] = (),
) -> tuple[Difference, ...]:
    """How this host differs from what the bundle wants, hard differences first.

    Args:
        manifest_environment: Name -> ``{"value": …, "why": …}``, as in the manifest.
        required_features: CPU features that the plan relies on.
        recorded_versions: :func:`record` of the machine that made the bundle.
        host: This machine, see :func:`armopt.targets.host`.
        environ: Of this process.
        record: :func:`record` of this process.
        late: Variables set after the process started, see :func:`late_variables`.
    """
    found = [
        *_features(required_features, host),
        *_variables(manifest_environment, environ, host, record, late),
        *_threads(environ, record),
        *_versions(recorded_versions, record),
        *_backends(required_features, host, record),
        *_huge_pages(record, environ),
        *_small_objects(host, record),
    ]
    return tuple(sorted(found, key=lambda d: ("hard", "soft", "info").index(d.severity)))


def late_variables(
    names: Iterable[str],
    *,
    environ: Mapping[str, str] | None = None,
    initial: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Those of `names` whose value isn't the one this process started with.

    Whether that was too late depends on when torch was imported: whatever changed after that has no effect.

    Args:
        names: Variables to look at.
        environ: Now; None takes os.environ.
        initial: At the start; None takes the kernel's copy, and where it keeps none, nothing counts as late.
    """
    now = os.environ if environ is None else environ
    start = _initial_environment() if initial is None else initial
    if start is None:
        return ()
    return tuple(n for n in names if n in now and now[n] != start.get(n))


def variables_read(names: Iterable[str], folder: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Which shared libraries of the installed torch hold the name of each variable: who could read it.

    oneDNN puts its prefix before the name at run time, so for its variables the rest is searched. Reads every
    library whole (some 0.3 GB).

    Args:
        names: Variables to look for.
        folder: Of the torch package; None takes the installed one.
    """
    readers: dict[str, list[str]] = {name: [] for name in names}
    folder = folder or package_folder()
    for library in _libraries(folder) if folder else []:
        for name, libraries in readers.items():
            if _holds(library, _needle(name)):
                libraries.append(library.name)
    return {name: tuple(libraries) for name, libraries in readers.items()}


def import_remark(
    host: Target, environ: Mapping[str, str] | None = None, *, started: Mapping[str, str] | None = None
) -> str:
    """What a process loses that imported torch without fast math on an Arm core with BF16; empty where nothing.

    Cheap, and imports nothing: for ``import armopt`` itself.

    Args:
        host: This machine.
        environ: Now; None takes os.environ.
        started: The environment at the start of the process; None asks the kernel.
    """
    now = os.environ if environ is None else environ
    start = _initial_environment() if started is None else started
    if "torch" not in sys.modules or not _is_arm(host) or not host.bf16:
        return ""
    if _agree(FPMATH, "BF16", _effective(FPMATH, now if start is None else start, host)):
        return ""
    how = "set after the process started" if _effective(FPMATH, now, host) else "not set"
    return (
        f"torch was imported before armopt, and {FPMATH} was {how}: {_COSTS[FPMATH]}. "
        "Start the process with: armopt run BUNDLE -- CMD"
    )


def thp_setting() -> str:
    """The kernel's transparent huge pages: ``always``, ``madvise`` or ``never``; empty where unknown."""
    chosen = re.search(r"\[(\w+)\]", _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    return chosen[1] if chosen else ""


def render(chosen: Mapping[str, Variable], format: str) -> str:
    """The variables as text for `format`, quoted for it, each with its reason as a comment.

    Args:
        chosen: See :func:`variables`.
        format: ``shell`` (to be sourced), ``docker`` (ENV lines), ``systemd`` (for [Service]), ``k8s`` (items
            of a container's ``env:``), ``json``.

    Raises:
        InputError: An unknown format, or a name or value that the format can't carry.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}", hint=f"Known are {', '.join(FORMATS)}")
    for name, variable in chosen.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError("not a name for an environment variable", where=repr(name))
        if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", variable.value):
            raise InputError("the value holds a line break or another control character", where=name)
    if format == "json":
        return json.dumps({n: asdict(v) for n, v in sorted(chosen.items())}, indent=2) + "\n"
    quote = _QUOTES[format]
    return "".join(
        f"# {' '.join(variable.why.split())}\n{quote(name, variable.value)}\n"
        for name, variable in sorted(chosen.items())
    )


def _docker(name: str, value: str) -> str:
    escaped = re.sub(r'(["\\$])', r"\\\1", value)
    return f'ENV {name}="{escaped}"'


def _systemd(name: str, value: str) -> str:
    # Environment= expands specifiers (%h) but no variables: systemd.exec(5), systemd.syntax(7).
    escaped = re.sub(r'(["\\])', r"\\\1", value).replace("%", "%%")
    return f'Environment="{name}={escaped}"'


_QUOTES: Mapping[str, Callable[[str, str], str]] = {
    "shell": lambda name, value: f"export {name}={shlex.quote(value)}",
    "docker": _docker,
    "systemd": _systemd,
    # A JSON string is a YAML double-quoted one; unquoted, `false` and `64` wouldn't be strings.
    "k8s": lambda name, value: f"- name: {name}\n  value: {json.dumps(value, ensure_ascii=False)}",
}


def _features(required: Collection[str], host: Target) -> list[Difference]:
    missing = sorted(set(required) - host.isa_features)
    if not missing:
        return []
    expected, found = " ".join(sorted(required)), f"no {' '.join(missing)}"
    if not _is_arm(host):
        cost = "the portable twins run: the target's rounding, but not its speed"
        return [Difference("info", "CPU", "an Arm server", host.core, cost, "")]
    products = host.provenance.get("product", host.name).split(", ")
    remedy = f"Re-export with --target {' or '.join(products)}"
    cost = "the kernels of this bundle would stop with an illegal instruction, or run as reference code"
    return [Difference("hard", "CPU features", expected, f"{host.core} with {found}", cost, remedy)]


def _variables(
    manifest: Mapping[str, Mapping[str, str]],
    environ: Mapping[str, str],
    host: Target,
    record: Mapping[str, str],
    late: Collection[str],
) -> list[Difference]:
    differences = []
    for name, entry in sorted(manifest.items()):
        expected, found = entry.get("value", ""), _effective(name, environ, host)
        cost = _COSTS.get(name) or entry.get("why", "")
        remedy = "Start with: armopt run BUNDLE -- CMD"
        if name == "OMP_NUM_THREADS" or (name == FPMATH and not host.bf16):
            continue  # the first is judged by this host's CPUs; without BF16 the second changes nothing
        if name == "THP_MEM_ALLOC_ENABLE" and record.get("allocator") == "mimalloc":
            continue
        if not _agree(name, expected, found):
            differences.append(Difference("soft", name, expected, found or "unset", cost, remedy))
        elif name in late and name in environ:
            reason = f"if torch was imported before, it has no effect: {cost}"
            differences.append(
                Difference("soft", name, f"{expected} from the start", "set by the process itself", reason, remedy)
            )
    return differences


def _effective(name: str, environ: Mapping[str, str], host: Target) -> str:
    if name == FPMATH:
        return environ.get("ONEDNN_DEFAULT_FPMATH_MODE") or environ.get(FPMATH, "")
    if name == "LRU_CACHE_CAPACITY" and name not in environ and not _is_arm(host):
        return "1024"
    if name == "OMP_PROC_BIND" and name not in environ:
        # libgomp binds where places are given and binding isn't mentioned.
        return "true" if environ.keys() & {"OMP_PLACES", "GOMP_CPU_AFFINITY"} else "false"
    return environ.get(name, "")


def _agree(name: str, expected: str, found: str) -> bool:
    if name == FPMATH and found.lower() == "any":
        return True
    if name == "LRU_CACHE_CAPACITY" and found.isdecimal() and expected.isdecimal():
        return int(found) >= int(expected)
    return expected.lower() == found.lower()


def _threads(environ: Mapping[str, str], record: Mapping[str, str]) -> list[Difference]:
    cpus, threads = record.get("threads_for_host", ""), record.get("threads", "")
    if not (cpus.isdecimal() and threads.isdecimal()) or int(threads) == int(cpus):
        return []
    few = int(threads) < int(cpus)
    if few and environ.get("OMP_NUM_THREADS"):
        return []  # someone shares the host out among several workers
    return [
        Difference(
            "info" if few else "soft",
            "OMP_NUM_THREADS",
            cpus,
            f"{threads} threads",
            f"{cpus} CPUs for {threads} threads: {_COSTS['OMP_NUM_THREADS']}",
            f"Set OMP_NUM_THREADS={cpus}, or start with: armopt run BUNDLE -- CMD",
        )
    ]


def _versions(recorded: Mapping[str, str], record: Mapping[str, str]) -> list[Difference]:
    # The bundle is mostly made on another architecture, whose libraries say nothing about this one's.
    same_machine = recorded.get("machine") == record.get("machine")
    differences = []
    for name in ("torch", "torch_build", "onednn", "acl", "blas"):
        expected, found = recorded.get(name, ""), record.get(name, "")
        if not expected or expected == found or not (same_machine or name == "torch"):
            continue
        if name == "torch" and expected.partition("+")[0] == found.partition("+")[0]:
            continue  # the flavour is compared on its own
        cost = "kernels may answer differently, so each is probed again at load"
        remedy = f"Install torch {expected.partition('+')[0]}" if name == "torch" else ""
        differences.append(Difference("soft", name, expected, found or "unknown", cost, remedy))
    return differences


def _backends(required: Collection[str], host: Target, record: Mapping[str, str]) -> list[Difference]:
    if not _is_arm(host) or not record.get("torch"):
        return []
    differences = []
    if not record.get("acl"):
        cost = "Linears and convolutions run reference or FP32 kernels"
        remedy = "Install torch from PyPI: its aarch64 wheels hold ACL"
        found = "none in this torch"
        differences.append(Difference("soft", "Arm Compute Library", "present", found, cost, remedy))
    if "bf16" in required and record.get("sbgemm") == "no":
        differences.append(
            Difference(
                "info",
                "BF16 in BLAS",
                "sbgemm",
                f"none in {record.get('blas', 'this BLAS')}",
                "a BF16 product left to BLAS takes up to 13 times the instructions of OpenBLAS's, at M = 256",
                "",
            )
        )
    return differences


def _huge_pages(record: Mapping[str, str], environ: Mapping[str, str]) -> list[Difference]:
    cost = _COSTS["THP_MEM_ALLOC_ENABLE"]
    if record.get("thp") == "never":
        remedy = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return [Difference("info", "transparent huge pages", "madvise or always", "never", cost, remedy)]
    switch = "MIMALLOC_ALLOW_THP"
    if record.get("thp_switch") == switch and environ.get(switch, "1").lower() in ("0", "false", "no", "off"):
        return [Difference("soft", switch, "1 or unset", environ[switch], cost, f"unset {switch}")]
    return []


def _small_objects(host: Target, record: Mapping[str, str]) -> list[Difference]:
    found = record.get("malloc", "")
    if not _is_arm(host) or not found.startswith("glibc"):
        return []
    remedy = (
        "Install libtcmalloc-minimal4 (Debian, Ubuntu) or gperftools-libs (Amazon Linux, Fedora), "
        "then start with: armopt run BUNDLE -- CMD"
    )
    return [Difference("info", "malloc", "tcmalloc, jemalloc or mimalloc", found, _COSTS[PRELOAD], remedy)]


def _is_arm(host: Target) -> bool:
    return "asimd" in host.isa_features  # every aarch64 has Advanced SIMD, and the name is Arm's


def _fact(name: str, probe: Callable[[], str]) -> dict[str, str]:
    # A host may lack any file, symbol or permission a probe looks for; a fact that can't be had is left out.
    with suppress(Exception):
        if value := probe():
            return {name: value}
    return {}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@functools.lru_cache  # a load asks twice; the libraries of a process don't change
def _search(path: Path, literal: bytes, pattern: bytes = b"") -> str | None:
    """The first group of `pattern` where it matches at an occurrence of `literal`, None where it doesn't.

    Looking for a literal first is what makes this fast: memmem at some GB/s, a regular expression at 0.05.
    """
    with (
        suppress(OSError, ValueError),
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        compiled = re.compile(pattern)
        at = content.find(literal)
        while at >= 0:
            # From the start of the file, so that a look behind sees what stands before.
            if match := compiled.match(content, at):
                return match[match.lastindex or 0].decode(errors="replace")
            at = content.find(literal, at + 1)
    return None


def _holds(path: Path, name: bytes) -> bool:
    """Whether the file holds `name` as a word of its own."""
    return _search(path, name, rb"(?<![A-Za-z0-9_])" + re.escape(name) + rb"(?![A-Za-z0-9_])") is not None


def package_folder(framework: str = "pytorch") -> Path | None:
    """Where the installed torch or TensorFlow is; None where there is none. Doesn't import it."""
    spec = importlib.util.find_spec("tensorflow" if framework == "tensorflow" else "torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _libraries(package: Path) -> list[Path]:
    """The shared libraries of torch (in lib and torch.libs) or of TensorFlow (beside its __init__.py)."""
    folders = (package, package / "lib", package.with_name(f"{package.name}.libs"))
    return sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if ".so" in p.suffixes)


def _needle(variable: str) -> bytes:
    """What a library that reads `variable` holds of its name: oneDNN puts its prefix before it at run time."""
    return re.sub(r"^(ONEDNN|DNNL)_", "", variable).encode()


def _installed(folder: Path, deep: bool) -> dict[str, str]:
    facts: dict[str, str] = {}
    version = _read(folder / "version.py")
    for key, name in (("torch", "__version__"), ("torch_git", "git_version"), ("torch_build", "cuda")):
        if found := re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", version, re.MULTILINE):
            facts[key] = found[1]
    if "torch" in facts:
        facts["torch_build"] = f"cuda {facts['torch_build']}" if "torch_build" in facts else "cpu"
    libraries = _libraries(folder)
    for library in libraries:
        name = library.name
        if name.startswith("libopenblas"):
            number = _search(library, b"OpenBLAS 0.", rb"OpenBLAS (\d+\.\d+\.\d+)")
            facts["blas"] = f"OpenBLAS {number}" if number else "OpenBLAS"
            facts["sbgemm"] = "yes" if _holds(library, b"sbgemm_") else "no"
        elif name.startswith("libnvpl_blas"):
            facts |= {"blas": "NVPL", "sbgemm": "no"}
        elif name.startswith("libmkl_core"):
            facts["blas"] = "MKL"
        elif name.startswith("libc10.so"):
            if _search(library, b"mimalloc_") is None:
                facts |= {"allocator": "posix_memalign", "thp_switch": "THP_MEM_ALLOC_ENABLE"}
            else:
                switch = "MIMALLOC_ALLOW_THP" if _holds(library, b"allow_thp") else "none"
                facts |= {"allocator": "mimalloc", "thp_switch": switch}
        may_hold_acl = name.startswith("libarm_compute") or (deep and name.startswith("libtorch_cpu"))
        if may_hold_acl and (acl := _search(library, b"arm_compute_version=", rb"[^=]+=v?([\w.\-]+)")):
            facts["acl"] = acl
    return facts


def _distribution(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _cpu_capability() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _torch_threads() -> str:
    import torch

    return str(torch.get_num_threads())


def _config(pattern: str) -> str:
    import torch

    found = re.search(pattern, torch.__config__.show())
    return found[1] if found else ""


def _linked_blas() -> str:
    name = {"mkl": "MKL", "open": "OpenBLAS", "nvpl": "NVPL"}
    blas = _config(r"BLAS_INFO=(\w+)").lower()
    number = _config(r"Math Kernel Library Version ([\d.]+)") if blas == "mkl" else ""
    return f"{name.get(blas, blas)} {number}".strip()


def _loaded(*parts: str) -> list[str]:
    paths = {line.split(maxsplit=5)[5] for line in _read(Path("/proc/self/maps")).splitlines() if "/" in line}
    return sorted(p for p in paths if any(part in Path(p).name for part in parts))


def _malloc() -> str:
    loaded = ", ".join(Path(p).name for p in _loaded("libtcmalloc", "libjemalloc", "libmimalloc"))
    return loaded or os.confstr("CS_GNU_LIBC_VERSION") or ""


def _is_aarch64(library: Path) -> bool:
    """Whether the file is an ELF file for aarch64, not one of another machine in a folder they share."""
    try:
        with library.open("rb") as stream:
            header = stream.read(20)
    except OSError:  # a link to nowhere
        return False
    return header.startswith(b"\x7fELF\x02\x01") and header[18:20] == b"\xb7\x00"  # 64 bits, EM_AARCH64


def _openblas_core() -> str:
    # numpy and scipy load an OpenBLAS of their own, so the one beside torch is asked.
    folder = package_folder()
    # the kernel tells where a link leads to
    own = {str(p.resolve()) for p in _libraries(folder)} if folder else set()
    for path in _loaded("openblas"):
        if path in own:
            corename = ctypes.CDLL(path).openblas_get_corename
            corename.restype = ctypes.c_char_p
            return str(corename().decode())
    return ""


def _initial_environment() -> dict[str, str] | None:
    try:
        content = Path("/proc/self/environ").read_bytes()
    except OSError:
        return None
    entries = (entry.partition(b"=") for entry in content.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}


def _affinity() -> frozenset[int]:
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical(cpus: frozenset[int], root: Path) -> int:
    base = root / "sys/devices/system/cpu"
    siblings = {cpu: _read(base / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu) for cpu in cpus}
    return len(set(siblings.values()))


def _cgroup_quota(root: Path) -> float | None:
    """CPUs that the cgroups of this process allow it, None where none limits it."""
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / f"sys/fs/cgroup/{name}" for name in (controllers, "cpu", "cpu,cpuacct")]
        else:
            continue
        # Any ancestor may set the limit; in a container the path may be the host's, which isn't mounted.
        inner = Path(path.strip().lstrip("/"))
        for mount in mounts:
            for folder in (mount / inner, *(mount / p for p in inner.parents), mount):
                quota, period = (*_read(folder / "cpu.max").split(), "", "")[:2]
                if not quota:
                    quota = _read(folder / "cpu.cfs_quota_us").strip()
                    period = _read(folder / "cpu.cfs_period_us").strip()
                if quota.isdecimal() and period.isdecimal() and int(period):
                    quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
