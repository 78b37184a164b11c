"""Facts about the installed torch, read from its files, and about the libraries of this process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import mmap
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from armopt.environment.threads import affinity, threads_for_host
from armopt.files import read_or_empty

#: The torch whose aarch64 wheel from PyPI is for CPUs alone and holds OpenBLAS and ACL; later ones are CUDA builds.
CPU_TORCH = "2.10.0"


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
        "affinity": lambda: str(len(affinity())),
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


def library_identity() -> str:
    """What tells one build of libtorch_cpu.so from another: its size, and a hash of its beginning, where its build id
    stands. Empty where there is none."""
    with suppress(OSError, StopIteration):
        library = next(iter(sorted((Path(package_folder() or "") / "lib").glob("libtorch_cpu.*"))))
        with library.open("rb") as file:
            return f"{library.stat().st_size}-{hashlib.sha256(file.read(1 << 14)).hexdigest()[:16]}"
    return ""


def thp_setting() -> str:
    """The kernel's transparent huge pages: ``always``, ``madvise`` or ``never``; empty where unknown."""
    chosen = re.search(r"\[(\w+)\]", read_or_empty(Path("/sys/kernel/mm/transparent_hugepage/enabled")))
    return chosen[1] if chosen else ""


def _fact(name: str, probe: Callable[[], str]) -> dict[str, str]:
    # A host may lack any file, symbol or permission a probe looks for; a fact that can't be had is left out.
    with suppress(Exception):
        if value := probe():
            return {name: value}
    return {}


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


def holds(path: Path, name: bytes) -> bool:
    """Whether the file holds `name` as a word of its own."""
    return _search(path, name, rb"(?<![A-Za-z0-9_])" + re.escape(name) + rb"(?![A-Za-z0-9_])") is not None


def package_folder(framework: str = "pytorch") -> Path | None:
    """Where the installed torch or TensorFlow is; None where there is none. Doesn't import it."""
    spec = importlib.util.find_spec("tensorflow" if framework == "tensorflow" else "torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def libraries(package: Path) -> list[Path]:
    """The shared libraries of torch (in lib and torch.libs) or of TensorFlow (beside its __init__.py)."""
    folders = (package, package / "lib", package.with_name(f"{package.name}.libs"))
    return sorted(p for folder in folders if folder.is_dir() for p in folder.iterdir() if ".so" in p.suffixes)


def needle(variable: str) -> bytes:
    """What a library that reads `variable` holds of its name: oneDNN puts its prefix before it at run time."""
    return re.sub(r"^(ONEDNN|DNNL)_", "", variable).encode()


def _installed(folder: Path, deep: bool) -> dict[str, str]:
    facts = _version_facts(read_or_empty(folder / "version.py"))
    for library in libraries(folder):
        facts |= _library_facts(library, deep)
    return facts


def _version_facts(text: str) -> dict[str, str]:
    """What torch/version.py says."""
    facts: dict[str, str] = {}
    for key, name in (("torch", "__version__"), ("torch_git", "git_version"), ("torch_build", "cuda")):
        if found := re.search(rf"^{name}\b[^=\n]*=\s*'([^']*)'", text, re.MULTILINE):
            facts[key] = found[1]
    if "torch" in facts:
        facts["torch_build"] = f"cuda {facts['torch_build']}" if "torch_build" in facts else "cpu"
    return facts


def _library_facts(library: Path, deep: bool) -> dict[str, str]:
    """What one of torch's libraries says of the build."""
    name = library.name
    if name.startswith("libopenblas"):
        number = _search(library, b"OpenBLAS 0.", rb"OpenBLAS (\d+\.\d+\.\d+)")
        sbgemm = "yes" if holds(library, b"sbgemm_") else "no"
        return {"blas": f"OpenBLAS {number}" if number else "OpenBLAS", "sbgemm": sbgemm}
    if name.startswith("libnvpl_blas"):  # of its two files the last one has the functions' names
        return {"blas": "NVPL", "sbgemm": "yes" if holds(library, b"sbgemm_") else "no"}
    if name.startswith("libmkl_core"):
        return {"blas": "MKL"}
    if name.startswith("libc10.so"):
        if _search(library, b"mimalloc_") is None:
            switch = "THP_MEM_ALLOC_ENABLE" if holds(library, b"THP_MEM_ALLOC_ENABLE") else "none"
            return {"allocator": "posix_memalign", "thp_switch": switch}
        switch = "MIMALLOC_ALLOW_THP" if holds(library, b"allow_thp") else "none"
        return {"allocator": "mimalloc", "thp_switch": switch}
    if name.startswith("libarm_compute") or (deep and name.startswith("libtorch_cpu")):
        acl = _search(library, b"arm_compute_version=", rb"[^=]+=v?([\w.\-]+)")
        return {"acl": acl} if acl else {}
    return {}


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
    paths = {line.split(maxsplit=5)[5] for line in read_or_empty(Path("/proc/self/maps")).splitlines() if "/" in line}
    return sorted(p for p in paths if any(part in Path(p).name for part in parts))


def _malloc() -> str:
    loaded = ", ".join(Path(p).name for p in _loaded("libtcmalloc", "libjemalloc", "libmimalloc"))
    return loaded or os.confstr("CS_GNU_LIBC_VERSION") or ""


def _openblas_core() -> str:
    # numpy and scipy load an OpenBLAS of their own, so the one beside torch is asked.
    folder = package_folder()
    # the kernel tells where a link leads to
    own = {str(p.resolve()) for p in libraries(folder)} if folder else set()
    for path in _loaded("openblas"):
        if path in own:
            corename = ctypes.CDLL(path).openblas_get_corename
            corename.restype = ctypes.c_char_p
            return str(corename().decode())
    return ""
