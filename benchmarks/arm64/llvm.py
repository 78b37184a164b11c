"""LLVM's model of a core: how many cycles a block of instructions takes. llvm-mca from Debian, in a folder of its own.

Older releases have no model of some cores and take another's, or dispatch more in a cycle than the core does: 22 is the
first whose widths are the cores' own. It runs with the C library that comes with it, so nothing is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from armopt.emulation.debian import Apt, find_mirror
from armopt.emulation.folder import Component, PreparedFolder, write_stamp
from armopt.emulation.prepare import exclusive
from armopt.errors import HostError

RELEASE, SUITE = "22", "forky"
_PROGRAMS = ("llvm-mc", "llvm-mca")
#: Blocks in one run of the program, and turns of a block in its loop.
_AT_ONCE, _TURNS = 200, 100
#: Of no use to a model of the inside of a block, or unknown to it.
_CONTROL = {
    "bl",
    "blr",
    "ret",
    "br",
    "svc",
    "b",
    "mrs",
    "msr",
    "dmb",
    "isb",
    "dsb",
    "bti",
    "paciasp",
    "autiasp",
    "retaa",
}
_LANE = re.compile(r"ld1\s*\{ v(\d+)\.([bhsd]) \}\[(\d+)\], \[(\w+)\]")


def _folder(prepared: PreparedFolder) -> tuple[Path, Component]:
    part = Component("llvm", json.dumps([RELEASE, SUITE, _PROGRAMS]))
    return prepared.path / part.name, part


def prepare(prepared: PreparedFolder | None = None) -> Path:
    """The folder of the programs; downloads them (60 MB) where they are not there.

    Raises:
        HostError: They can't be had.
    """
    prepared = prepared or PreparedFolder.default()
    place, part = _folder(prepared)
    if not prepared.is_complete(part):
        with exclusive(prepared.path / ".lock-llvm", lambda line: None):
            if not prepared.is_complete(part):  # another process may have made it meanwhile
                _make(prepared, place, part)
    return place


def _make(prepared: PreparedFolder, place: Path, part: Component) -> None:
    work = prepared.path / ".work-llvm"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    apt = Apt.create(work / "apt", find_mirror(), SUITE, "amd64")
    packages = apt.fetch([f"libllvm{RELEASE}"], dependencies=True)
    for package in [*packages, *apt.fetch([f"llvm-{RELEASE}"], dependencies=False)]:
        subprocess.run(["dpkg", "-x", str(package), str(work / "root")], check=True, capture_output=True)
    kept = work / "kept"
    kept.mkdir()
    for name in _PROGRAMS:
        shutil.copy(work / "root" / "usr" / "lib" / f"llvm-{RELEASE}" / "bin" / name, kept)
    for library in sorted((work / "root").rglob("*.so*")):
        if library.is_file() and "gconv" not in library.parts:
            real = library.resolve()
            if not (kept / real.name).exists():
                shutil.copy(real, kept)
            if not (kept / library.name).exists():
                (kept / library.name).symlink_to(real.name)
    write_stamp(kept, part.recipe)
    shutil.rmtree(place, ignore_errors=True)
    kept.rename(place)
    shutil.rmtree(work)


def _run(program: str, arguments: Sequence[str], text: str) -> str:
    place = prepare()
    command = [str(place / "ld-linux-x86-64.so.2"), "--library-path", str(place), str(place / program), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout:
        raise HostError(f"{program} failed: {done.stderr[-300:]}", where=str(place))
    return done.stdout


def cycles(cpu: str, blocks: Sequence[Sequence[int]]) -> list[float]:
    """What LLVM says of blocks of instructions, as if each ran again and again: it waits for its own results too.

    Args:
        cpu: A core, as LLVM calls it (``neoverse-v1``).
        blocks: Their opcodes.

    Raises:
        HostError: The program can't be had, or fails.
    """
    found: list[float] = []
    for at in range(0, len(blocks), _AT_ONCE):
        found += _cycles(cpu, blocks[at : at + _AT_ONCE])
    return found


def _cycles(cpu: str, blocks: Sequence[Sequence[int]]) -> Iterator[float]:
    lines = iter(_disassemble([opcode for block in blocks for opcode in block]))
    text = []
    for number, block in enumerate(blocks):
        text.append(f"# LLVM-MCA-BEGIN {number}")
        for line in [next(lines) for _ in block]:
            text += ["nop"] if line.split()[0] in _CONTROL else parts(line)
        text.append("# LLVM-MCA-END")
    arguments = ["-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+all", f"-iterations={_TURNS}", "-json"]
    arguments.append("-skip-unsupported-instructions=any")
    regions = json.loads(_run("llvm-mca", arguments, "\n".join(text) + "\n"))["CodeRegions"]
    by_name = {region["Name"]: region["SummaryView"] for region in regions}
    for number in range(len(blocks)):
        view = by_name.get(str(number))  # a block without an instruction that it knows has none
        yield max(view["BlockRThroughput"], view["TotalCycles"] / view["Iterations"]) if view else 0.0


def parts(line: str) -> list[str]:
    """A load of one lane as the two operations that LLVM's model says it is (``1L_1V``), each with its own operands.

    As one instruction it would wait for the register that it puts the lane into before it loads at all.
    """
    found = _LANE.fullmatch(line)
    if not found:
        return [line]
    register, size, lane, address = found.groups()
    return [f"ldr {size}31, [{address}]", f"mov v{register}.{size}[{lane}], v31.{size}[0]"]


def _disassemble(opcodes: Sequence[int]) -> list[str]:
    """One line for each; nothing where LLVM doesn't know it."""
    text = "\n".join(" ".join(f"0x{byte:02x}" for byte in opcode.to_bytes(4, "little")) for opcode in opcodes)
    out = _run("llvm-mc", ["--disassemble", "-triple=aarch64", "-mattr=+all"], text)
    lines = [line.strip() for line in out.splitlines() if line.strip() and not line.strip().startswith(".")]
    if len(lines) == len(opcodes):
        return lines
    if len(opcodes) == 1:
        return ["nop"]
    half = len(opcodes) // 2
    return [*_disassemble(opcodes[:half]), *_disassemble(opcodes[half:])]
