"""Builds QEMU's user-mode emulator with plugins, and those that count: ``python -m benchmarks.arm64.build_qemu``.

Debian's binary is static and cannot load plugins, so the same QEMU is built from Debian's source package: about
5 minutes on two cores, once, into the prepared folder (see armopt.emulation.prepare). It multiplies BF16 with this
host's arithmetic, five times as fast as QEMU does in software: last bits differ, counts don't. What judges numerics is
the emulator of armopt.emulation, never this one. All comes from this machine's
Debian mirror and PyPI, into private folders: nothing is installed and no privilege is needed. Of the host it needs gcc.
An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from armopt.emulation.debian import Apt, find_mirror
from armopt.emulation.folder import QEMU, Component, PreparedFolder, write_stamp
from armopt.emulation.prepare import exclusive
from armopt.errors import ArmoptError, HostError, InputError

HERE = Path(__file__).resolve().parent
COMMAND = "python -m benchmarks.arm64.build_qemu"

SOURCE_SUITE = QEMU["suite"]
LIBRARY_SUITE = "bookworm"  # glib for a C library as old as this one's; the binary finds it by its rpath
LIBRARIES = ("libglib2.0-0", "libglib2.0-dev", "libpcre2-8-0", "libpcre2-dev", "zlib1g", "zlib1g-dev")
PKG_CONFIG = ("pkgconf-bin", "libpkgconf3")
PLUGINS = ("counter.c", "clock.c")
TOOLS = ("meson==1.8.2", "ninja==1.13.2", "pycotap==1.3.1")  # QEMU's configure takes these from its Python
FLAGS = (
    *("--target-list=aarch64-linux-user", "--enable-plugins", "--without-default-features", "--disable-system"),
    *("--disable-tools", "--disable-docs", "--disable-install-blobs", "--disable-werror", "--disable-download"),
)
#: Where QEMU adds the product of two pairs of BF16 values, and what stands there instead.
DOT_PRODUCT = (
    "target/arm/tcg/vec_helper.c",
    """    t1 = float32_mul(e1 << 16, e2 << 16, fpst);
    t2 = float32_mul(e1 & 0xffff0000u, e2 & 0xffff0000u, fpst);
    t1 = float32_add(t1, t2, fpst);
    t1 = float32_add(sum, t1, fpst);
""",
    """    union { uint32_t bits; float value; } a = { e1 << 16 }, b = { e2 << 16 };
    union { uint32_t bits; float value; } c = { e1 & 0xffff0000u }, d = { e2 & 0xffff0000u }, total = { sum };
    total.value += a.value * b.value + c.value * d.value;
    t1 = t2 = total.bits;
""",
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class CountingQemu:
    """Where the built emulator and the plugin are."""

    folder: PreparedFolder

    @property
    def part(self) -> Component:
        """QEMU itself."""
        recipe = [SOURCE_SUITE, QEMU["version"], LIBRARY_SUITE, LIBRARIES, TOOLS, FLAGS, DOT_PRODUCT]
        return Component("qemu-plugins", json.dumps(recipe))

    @property
    def plugin_part(self) -> Component:
        """The plugins: made again when their sources change."""
        digest = hashlib.sha256()
        for name in (*PLUGINS, "opcodes.def"):
            digest.update((HERE / name).read_bytes())
        return Component("qemu-counter", json.dumps([self.part.recipe, digest.hexdigest()]))

    @property
    def path(self) -> Path:
        """The folder of the emulator, its libraries and the headers for plugins."""
        return self.folder.path / self.part.name

    @property
    def binary(self) -> Path:
        """qemu-aarch64 with plugins."""
        return self.path / "qemu-aarch64"

    @property
    def plugin(self) -> Path:
        """The plugin that counts."""
        return self.folder.path / self.plugin_part.name / "counter.so"

    @property
    def clock(self) -> Path:
        """The plugin that notes what a time depends on."""
        return self.plugin.with_name("clock.so")

    def version(self) -> str:
        """QEMU's name and version."""
        first = subprocess.run([self.binary, "--version"], capture_output=True, text=True, check=True).stdout
        return "QEMU " + first.splitlines()[0].split("version ")[1].split()[0]


def require(folder: PreparedFolder) -> CountingQemu:
    """The built emulator, with a plugin as its source is now.

    Raises:
        HostError: QEMU has not been built.
    """
    qemu = CountingQemu(folder)
    if not folder.is_complete(qemu.part):
        raise HostError(
            "QEMU with plugins is not built",
            where=str(qemu.path),
            hint=f"Run `{COMMAND}`; it takes about 5 minutes once",
        )
    if not folder.is_complete(qemu.plugin_part):
        build(folder)
    return qemu


def build(folder: PreparedFolder | None = None, report: Report = lambda line: None) -> CountingQemu:
    """Builds whatever is missing.

    Raises:
        HostError: A download or a tool is missing, or a step failed.
    """
    qemu = CountingQemu(folder or PreparedFolder.default())
    qemu.folder.path.mkdir(parents=True, exist_ok=True)
    with exclusive(qemu.folder.path / ".lock-qemu-plugins", report):
        work = qemu.folder.path / ".work-qemu-plugins"
        if not qemu.folder.is_complete(qemu.part):
            _start_or_resume(work, qemu.part.recipe)
            _install(qemu, _build_qemu(qemu, work, report), qemu.part)
            shutil.rmtree(work)
        if not qemu.folder.is_complete(qemu.plugin_part):
            report("compiling the plugins")
            built = qemu.folder.path / ".work-qemu-counter"
            shutil.rmtree(built, ignore_errors=True)
            built.mkdir()
            _compile_plugins(qemu, built)
            _install(qemu, built, qemu.plugin_part)
    report(f"ready: {qemu.binary}")
    return qemu


def _start_or_resume(work: Path, recipe: str) -> None:
    mark = work / "recipe"
    if not mark.exists() or mark.read_text() != recipe:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        mark.write_text(recipe)


def _build_qemu(qemu: CountingQemu, work: Path, report: Report) -> Path:
    """Downloads, configures and builds; returns a folder with what is to be kept."""
    if not shutil.which("gcc"):
        raise HostError("gcc is missing", where="QEMU", hint="Install a C compiler (apt-get install gcc)")
    source, libraries, tools, build = (work / name for name in ("source", "libraries", "tools", "build"))
    for name, folder, step in (
        ("QEMU's source", source, _fetch_source),
        ("glib", libraries, _fetch_libraries),
        ("meson", tools, _fetch_tools),
    ):
        if not folder.exists():
            report(f"downloading {name}")
            partial = work / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            step(partial, folder)
    environment = _environment(libraries, tools)
    if not (build / "build.ninja").exists():
        report("configuring QEMU")
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir()
        configure = [
            *(str(source / "configure"), f"--python={tools / 'bin' / 'python3'}", *FLAGS),
            f"--extra-ldflags=-Wl,--disable-new-dtags,-rpath,{qemu.path / 'lib'}",
        ]
        _run(configure, "configure", cwd=build, env=environment)
    report("building QEMU: about 5 minutes on two cores")
    _run(["nice", str(tools / "bin" / "ninja"), "qemu-aarch64"], "ninja", cwd=build, env=environment)
    kept = work / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    (kept / "lib").mkdir(parents=True)
    shutil.copy(build / "qemu-aarch64", kept)
    for pattern in ("libglib-2.0.so.0", "libgmodule-2.0.so.0", "libpcre2-8.so.0", "libz.so.1"):
        for library in libraries.rglob(pattern):
            shutil.copy(library, kept / "lib" / pattern)
    headers = kept / "include"
    shutil.copytree(libraries / "usr" / "include" / "glib-2.0", headers)
    (config,) = libraries.rglob("glibconfig.h")
    shutil.copy(config, headers)
    shutil.copy(source / "include" / "qemu" / "qemu-plugin.h", headers)
    return kept


def _fetch_source(partial: Path, into: Path) -> None:
    mirror = find_mirror()
    apt = Apt.create(partial / "apt", mirror, SOURCE_SUITE, "amd64")
    (apt.folder / "sources.list").write_text(mirror.line(SOURCE_SUITE).replace("deb ", "deb-src ", 1))
    what = f"the source package of QEMU in Debian {SOURCE_SUITE}"
    _run(["apt-get", "update", "-q", "--error-on=any"], what, env=apt.environment)
    _run(
        ["apt-get", "source", "--download-only", "--only-source", "-q", "qemu"], what, cwd=partial, env=apt.environment
    )
    archives = list(partial.glob("qemu_*.orig.tar.*"))
    if len(archives) != 1 or not archives[0].name.startswith(f"qemu_{QEMU['version']}"):
        raise HostError(
            f"Debian {SOURCE_SUITE} has {[a.name for a in archives]}, not {QEMU['version']}x",
            where="QEMU",
            hint="Set ARMOPT_DEBIAN_MIRROR to a mirror that has it",
        )
    _run(["tar", "-xf", str(archives[0])], what, cwd=partial)
    (source,) = partial.glob("qemu-*/")
    name, exact, quick = DOT_PRODUCT
    text = (source / name).read_text()
    if text.count(exact) != 1:
        raise HostError(f"{name} is not as expected", where="QEMU", hint="Write DOT_PRODUCT anew for this version")
    (source / name).write_text(text.replace(exact, quick))
    source.rename(into)


def _fetch_libraries(partial: Path, into: Path) -> None:
    """Glib with its headers, and the pkg-config that tells where they are; unpacked, not installed."""
    apt = Apt.create(partial / "apt", find_mirror(), LIBRARY_SUITE, "amd64")
    for package in apt.fetch([*LIBRARIES, *PKG_CONFIG], dependencies=False):
        _run(["dpkg", "-x", str(package), str(partial / "root")], package.name)
    program = partial / "root" / "pkg-config"
    program.write_text(
        "#!/bin/sh\n"
        'root="${0%/*}"\n'
        'export PKG_CONFIG_SYSROOT_DIR="$root" PKG_CONFIG_ALLOW_SYSTEM_LIBS=1\n'
        'export PKG_CONFIG_LIBDIR="$root/usr/lib/x86_64-linux-gnu/pkgconfig"\n'
        'LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu" exec "$root/usr/bin/pkgconf" "$@"\n'
    )
    program.chmod(0o755)
    (partial / "root").rename(into)


def _fetch_tools(partial: Path, into: Path) -> None:
    """A virtual environment with meson: QEMU's configure makes its own from it."""
    try:
        venv.create(into, with_pip=True, symlinks=True)
        pip = [str(into / "bin" / "python3"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *TOOLS], "PyPI: " + " ".join(TOOLS))
    except (HostError, subprocess.CalledProcessError):
        shutil.rmtree(into, ignore_errors=True)
        raise


def _environment(libraries: Path, tools: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PKG_CONFIG", "PYTHON"))}
    return {
        **inherited,
        "PKG_CONFIG": str(libraries / "pkg-config"),
        "PATH": os.pathsep.join([str(tools / "bin"), os.environ.get("PATH", os.defpath)]),
    }


def _compile_plugins(qemu: CountingQemu, into: Path) -> None:
    include = qemu.path / "include"
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC", "-shared", f"-I{include}"]
    for name in PLUGINS:
        _run(["gcc", *flags, "-o", str((into / name).with_suffix(".so")), str(HERE / name)], name)


def _install(qemu: CountingQemu, built: Path, part: Component) -> None:
    write_stamp(built, part.recipe)
    place = qemu.folder.path / part.name
    shutil.rmtree(place, ignore_errors=True)
    built.rename(place)


def _run(command: Sequence[str], what: str, *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise HostError(f"{command[0]} is missing", where=what, hint="This needs Debian or Ubuntu, and gcc") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR")) or " error: " in line] or lines[-5:]
        raise HostError(
            f"{Path(command[0]).name} failed with {done.returncode}: {' | '.join(errors[:5])}",
            where=what,
            hint="Check that this machine reaches its registries. Then run it again: what is done is kept",
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    try:
        if arguments:
            raise InputError(f"unknown argument {arguments[0]}", where=COMMAND, hint="It takes none")
        build(report=lambda line: print(line, file=sys.stderr, flush=True))
    except ArmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
