"""Makes each part of the emulated Arm machine: programs and C library of Debian, cores, Python packages of PyPI."""

from __future__ import annotations

import compileall
import os
import shutil
import sys
from pathlib import Path

from armopt.emulation import stubs
from armopt.emulation.commands import run_command
from armopt.emulation.debian import MIRROR_VARIABLE, Apt, find_mirror
from armopt.emulation.folder import (
    BASE_REQUIREMENTS,
    CORES,
    QEMU,
    ROOT,
    TENSORFLOW_REQUIREMENTS,
    WRAPPERS,
    Component,
    Core,
    PreparedFolder,
    torch_requirements,
)
from armopt.emulation.wheels import install_wheels
from armopt.errors import HostError


def build(part: Component, into: Path, folder: PreparedFolder, work: Path) -> None:
    """Makes one part.

    Args:
        part: What to make.
        into: An empty folder for it.
        folder: Where it goes afterwards, and what is made already.
        work: A folder for what is needed meanwhile.

    Raises:
        HostError: A download or a tool is missing.
    """
    kind, _, torch_version = part.name.partition("-")
    downloads = folder.downloads(part)
    if kind == "qemu":
        _build_qemu(into, work, downloads)
    elif kind == "root":
        _build_root(into, work, downloads)
    elif kind == "cores":
        for core in CORES.values():
            _build_sysroot(into / core.name, core)
    elif kind == "bin":
        for name, text in WRAPPERS.items():
            (into / name).write_text(text)
            (into / name).chmod(0o755)
    elif kind == "site/base":
        install_wheels(BASE_REQUIREMENTS, into, downloads)
        _compile(into, folder.base_site)
    elif kind == "site/tensorflow":
        install_wheels(TENSORFLOW_REQUIREMENTS, into, downloads)
        shutil.rmtree(into / "tensorflow" / "include", ignore_errors=True)  # for compilers; there is none
        _compile(into, folder.tensorflow_site)
    else:
        install_wheels(torch_requirements(torch_version), into, downloads, "--no-deps")
        shutil.rmtree(into / "torch" / "include", ignore_errors=True)  # for compilers; there is none
        _stub_cuda(into, folder.root)
        _compile(into, folder.site(torch_version))


def _build_qemu(into: Path, work: Path, downloads: Path) -> None:
    apt = Apt.create(work / "apt", find_mirror(), QEMU["suite"], "amd64", downloads)
    (package,) = apt.fetch([QEMU["package"]], dependencies=False)
    _unpack(package, work / "unpacked")
    binary = into / "qemu-aarch64"
    shutil.move(str(work / "unpacked" / "usr" / "bin" / "qemu-aarch64"), binary)
    version = run_command([str(binary), "--version"], "qemu-aarch64").splitlines()[0]
    if f"version {QEMU['version']}" not in version:
        raise HostError(
            f"Debian {QEMU['suite']} has {version!r}, not {QEMU['version']}x (others differ in their cores)",
            where=QEMU["package"],
            hint=f"Set {MIRROR_VARIABLE} to a mirror that has it",
        )


def _build_root(into: Path, work: Path, downloads: Path) -> None:
    apt = Apt.create(work / "apt", find_mirror(), str(ROOT["suite"]), "arm64", downloads)
    for package in apt.fetch(ROOT["packages"], dependencies=True):
        _unpack(package, into)
    # Absolute links would lead to the host's files.
    for link in into.rglob("*"):
        if link.is_symlink() and os.path.isabs(target := os.readlink(link)):
            link.unlink()
            link.symlink_to(os.path.relpath(into / target.lstrip("/"), link.parent))


def _unpack(package: Path, into: Path) -> None:
    run_command(["dpkg", "-x", str(package), str(into)], package.name)


def _build_sysroot(into: Path, core: Core) -> None:
    """Makes what a program on that core sees as /.

    QEMU answers /proc/cpuinfo itself, but ACL and oneDNN also read /sys, where they would find the x86 host.
    """
    into.mkdir()
    for name in ("bin", "etc", "lib", "usr"):
        (into / name).symlink_to(f"../../root/{name}")
    cpus = into / "sys" / "devices" / "system" / "cpu"
    first = cpus / "cpu0"
    registers = first / "regs" / "identification"
    registers.mkdir(parents=True)
    (registers / "midr_el1").write_text(f"0x{core.midr:016x}\n")
    kinds = ((1, "Data"), (1, "Instruction"), (2, "Unified"), (3, "Unified"))
    for index, ((level, kind), kib) in enumerate(zip(kinds, core.caches_kib, strict=True)):
        cache = first / "cache" / f"index{index}"
        cache.mkdir(parents=True)
        fields = {
            "level": level,
            "type": kind,
            "size": f"{kib}K",
            "coherency_line_size": 64,
            "shared_cpu_list": "0" if level < 3 else "0-63",
        }
        for name, value in fields.items():
            (cache / name).write_text(f"{value}\n")
    for other in range(1, 64):
        (cpus / f"cpu{other}").symlink_to("cpu0")


# --- Python ---------------------------------------------------------------------------------------


def _compile(built: Path, final: Path) -> None:
    """Byte-compiles on the host where it runs the same Python: under emulation it takes minutes."""
    if sys.version_info[:2] == (3, 11):
        compileall.compile_dir(built, maxlevels=50, ddir=str(final), quiet=2, workers=os.cpu_count() or 1)


def _stub_cuda(site: Path, root: Path) -> None:
    patterns = ("torch/lib/*.so*", "torch/_C*.so", "torchvision/*.so", "torchvision.libs/*.so*")
    wheels = [file for pattern in patterns for file in site.glob(pattern)]
    folders = ("lib", "lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu")
    system = [file for name in folders for file in (root / name).glob("*.so*") if file.is_file()]
    # torch's libraries look there for every part of CUDA. A CPU-only wheel misses nothing and gets no stub.
    stubs.write_stubs(wheels, [*system, root / "usr/bin/python3.11"], site / "nvidia" / "cu13" / "lib")
