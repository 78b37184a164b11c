"""The prepared folder: what it is made of, where everything is in it, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from armopt.errors import HostError, InputError

CACHE_VARIABLE = "ARMOPT_ARM64_CACHE"
PREPARE_COMMAND = "python -m armopt.emulation.prepare"

TORCH_VERSIONS = ("2.10.0", "2.13.0")  # the last CPU-only wheel with OpenBLAS, and a CUDA build with NVPL
DEFAULT_TORCH = "2.10.0"
#: The newest that armopt takes. Nothing prepares it unless it is asked for.
NEWEST_TORCH = "2.15.0"
_LAST_PAIRED = 14  # of torch 2.N, which torchvision 0.(N+15) goes with; that one goes with all later ones
_NEWEST_TORCHVISION = "0.29.2"


@dataclass(frozen=True)
class Core:
    """A core that QEMU models.

    Attributes:
        name: QEMU's name of it.
        midr: The MIDR_EL1 that QEMU's model reports.
        caches_kib: Sizes of L1d, L1i, L2 and the last level, of the product that users have.
    """

    name: str
    midr: int
    caches_kib: tuple[int, int, int, int]


# Neoverse TRMs for L1 and L2; the last level as published for Graviton2, Graviton3 and Yitian 710.
CORES = {
    core.name: core
    for core in (
        Core("neoverse-n1", 0x414FD0C1, (64, 64, 1024, 32768)),
        Core("neoverse-v1", 0x411FD402, (64, 64, 1024, 32768)),
        Core("neoverse-n2", 0x410FD493, (64, 64, 1024, 65536)),
    )
}

# --- what the folder is made of: a change of any of these rebuilds that part and no other ---------

# 7.2 (bookworm) has no neoverse-v1, and 11.1 (sid) hides its bf16.
QEMU = {"package": "qemu-user", "suite": "trixie", "version": "10.0."}
ROOT = {"packages": ["python3.11", "libgomp1", "libstdc++6", "libtcmalloc-minimal4"], "suite": "bookworm"}
BASE_REQUIREMENTS = (
    # What PyTorch and torchvision need
    *("filelock==4.2.11", "fsspec==2026.9.0", "jinja2==3.1.6", "networkx==3.6.1", "sympy==1.14.0"),
    *("numpy==2.4.6", "pillow==13.0.0", "setuptools==84.2.1", "typing_extensions==4.16.0"),
    # what armopt needs
    *("msgspec==0.22.0", "onnx==1.23.2", "packaging==26.3", "rich==15.0.0", "safetensors==0.8.0", "typer==0.29.2"),
    # what models come from and go to
    *("onnxruntime==1.32.0", "transformers==5.24.0"),
)
TENSORFLOW_REQUIREMENTS = ("tensorflow==2.21.0",)  # with all it needs; it shares nothing with PyTorch
_STUBS_REVISION = 2  # raise it when stubs.py writes something else than before

_WRAPPER = """\
#!/bin/sh
# The emulated Python. The host's kernel cannot run an aarch64 program, so `python` and sys.executable of an
# emulated process are this file, and what such a process starts is emulated as well.
here="${0%/*}"
core="${ARMOPT_EMULATED_CPU:-neoverse-v1}"
ulimit -c 0  # QEMU would dump gigabytes
exec "$here/../qemu/qemu-aarch64" -0 "$0" -cpu "$core" -L "$here/../cores/$core" \\
    "$here/../cores/$core/usr/bin/python3.11" "$@"
"""
_ARMOPT_WRAPPER = """\
#!/bin/sh
exec "${0%/*}/python3" -m armopt "$@"
"""
WRAPPERS = {"python": _WRAPPER, "python3": _WRAPPER, "python3.11": _WRAPPER, "armopt": _ARMOPT_WRAPPER}


def torch_requirements(torch_version: str) -> list[str]:
    """Returns PyTorch and the torchvision that goes with it: 0.(N+15).P with 2.N.P, and 0.29 with all from 2.14 on."""
    try:
        major, minor, patch = (int(part) for part in torch_version.split("."))
    except ValueError:
        major = minor = patch = 0
    if major != 2:
        raise InputError(f"{torch_version!r} is not a version of PyTorch 2", where="--torch", hint="Say e.g. 2.10.0")
    vision = f"0.{minor + 15}.{patch}" if minor <= _LAST_PAIRED else _NEWEST_TORCHVISION
    return [f"torch=={torch_version}", f"torchvision=={vision}"]


@dataclass(frozen=True)
class Component:
    """One part of the folder: the subfolder it fills and what it is made from."""

    name: str
    recipe: str


@dataclass(frozen=True)
class PreparedFolder:
    """Where everything is."""

    path: Path

    @classmethod
    def default(cls) -> PreparedFolder:
        """The folder named by ARMOPT_ARM64_CACHE, or ``~/.cache/armopt/arm64``."""
        chosen = os.environ.get(CACHE_VARIABLE)
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(chosen).expanduser().absolute() if chosen else base / "armopt" / "arm64")

    @property
    def qemu(self) -> Path:
        """QEMU's static binary."""
        return self.path / "qemu" / "qemu-aarch64"

    @property
    def root(self) -> Path:
        """The arm64 Debian: the C library, Python."""
        return self.path / "root"

    @property
    def wrappers(self) -> Path:
        """The folder of ``python`` and ``armopt`` that start emulated."""
        return self.path / "bin"

    def sysroot(self, core: Core) -> Path:
        """What QEMU shows as / to a program on that core: the arm64 Debian plus the core's own /sys."""
        return self.path / "cores" / core.name

    def site(self, torch_version: str) -> Path:
        """The site folder that holds that PyTorch and its torchvision."""
        return self.path / "site" / f"torch-{torch_version}"

    @property
    def base_site(self) -> Path:
        """The site folder of everything that does not depend on the PyTorch version."""
        return self.path / "site" / "base"

    @property
    def tensorflow_site(self) -> Path:
        """The site folder of TensorFlow, which is only there if it was asked for."""
        return self.path / "site" / "tensorflow"

    @property
    def tensorflow_part(self) -> Component:
        """The optional part with TensorFlow: 1.3 GB."""
        return Component("site/tensorflow", _recipe(TENSORFLOW_REQUIREMENTS))

    def parts(self, torch_version: str) -> tuple[Component, ...]:
        """Returns what emulation with that PyTorch needs, in the order in which it is made."""
        return (
            Component("qemu", _recipe(QEMU)),
            Component("root", _recipe(ROOT)),
            Component("cores", _recipe([asdict(core) for core in CORES.values()])),
            Component("bin", _recipe(WRAPPERS)),
            Component("site/base", _recipe(BASE_REQUIREMENTS)),
            Component(f"site/torch-{torch_version}", _recipe([torch_requirements(torch_version), _STUBS_REVISION])),
        )

    def is_complete(self, part: Component) -> bool:
        """Whether the part was finished, from today's recipe, and still has its libraries and programs."""
        folder = self.path / part.name
        try:
            stamp = json.loads(_stamp(folder).read_text())
            return stamp["recipe"] == part.recipe and all(
                (folder / name).stat().st_size == size for name, size in stamp["sizes"].items()
            )
        except (OSError, ValueError, KeyError):
            return False

    def is_intact(self, part: Component) -> bool:
        """Whether the part is complete and its libraries and programs are those that were made, byte by byte."""
        folder = self.path / part.name
        try:
            return self.is_complete(part) and all(
                digest(folder / name) == known
                for name, known in json.loads(_stamp(folder).read_text())["sha256"].items()
            )
        except (OSError, KeyError):
            return False

    def downloads(self, part: Component) -> Path:
        """The folder of what was downloaded for the part; another recipe has another."""
        return self.path / "downloads" / part.name / hashlib.sha256(part.recipe.encode()).hexdigest()[:12]

    def missing(self, torch_version: str) -> list[str]:
        """Returns the names of the parts that have to be prepared first."""
        return [part.name for part in self.parts(torch_version) if not self.is_complete(part)]

    def require(self, torch_version: str) -> None:
        """Checks that emulation with that PyTorch can start.

        Raises:
            HostError: something is missing.
        """
        if missing := self.missing(torch_version):
            raise HostError(
                f"the emulated Arm machine is not prepared ({', '.join(missing)})",
                where=str(self.path),
                hint=f"Run `{PREPARE_COMMAND} --torch {torch_version}`; it takes about 2 minutes once",
            )


def write_stamp(folder: Path, recipe: str) -> None:
    """Marks a part as finished. Python files are left out of it: what breaks there says so by itself."""
    files = {str(file.relative_to(folder)): file for file in sorted(_binaries(folder))}
    stamp = {
        "recipe": recipe,
        "sizes": {name: file.stat().st_size for name, file in files.items()},
        "sha256": {name: digest(file) for name, file in files.items()},
    }
    _stamp(folder).write_text(json.dumps(stamp, indent=1, sort_keys=True))


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _binaries(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        is_binary = ".so" in file.suffixes or os.access(file, os.X_OK)
        if is_binary and file.is_file() and not file.is_symlink():
            yield file


def _stamp(folder: Path) -> Path:
    return folder / ".armopt-complete.json"


def _recipe(value: object) -> str:
    return json.dumps(value, sort_keys=True)
