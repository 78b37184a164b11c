"""Which functions a counted call spent its instructions in: blocks of instructions -> library and symbol."""

from __future__ import annotations

import bisect
import struct
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

#: Start, end, offset in the file, file.
Mapping = tuple[int, int, int, str]

_PT_LOAD, _SHT_SYMTAB, _SHT_DYNSYM, _STT_FUNC, _STT_GNU_IFUNC = 1, 2, 11, 2, 10


class _Elf:
    """Function symbols of one 64-bit little-endian ELF file."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        program, section = struct.unpack_from("<QQ", data, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
        self.segments = []  # (offset in the file, address, size)
        for at in range(program, program + program_size * program_count, program_size):
            kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, at)
            if kind == _PT_LOAD:
                self.segments.append((offset, address, size))
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, section + i * section_size) for i in range(section_count)]
        found: dict[int, bytes] = {}
        for header in sections:
            if header[1] not in (_SHT_SYMTAB, _SHT_DYNSYM):
                continue
            strings = sections[header[6]][4]
            for name, info, _, _, value, _ in struct.iter_unpack("<IBBHQQ", data[header[4] : header[4] + header[5]]):
                if info & 15 in (_STT_FUNC, _STT_GNU_IFUNC) and value:
                    found[value] = data[strings + name : data.index(0, strings + name)]
        self.addresses = sorted(found)
        self.names = [found[address].decode(errors="replace") for address in self.addresses]

    def symbol(self, offset: int) -> str:
        """The function that holds an offset of the file; the one in front of it where functions have no names."""
        for start, address, size in self.segments:
            if start <= offset < start + size:
                place = bisect.bisect_right(self.addresses, offset - start + address) - 1
                return self.names[place] if place >= 0 else "?"
        return "?"


def by_symbol(blocks: Iterable[tuple[int, int, int]]) -> list[tuple[str, str, int]]:
    """(library, mangled symbol, instructions), the most first, of (address, instructions, runs) of each block.

    Runs in the process that was counted. Static functions have no symbol in a stripped library: they count for the
    exported one in front of them.
    """
    found: Counter[tuple[str, str]] = Counter()
    held = list(blocks)
    for (_, length, runs), place in zip(held, symbols([block[0] for block in held], mappings()), strict=True):
        found[place] += length * runs
    return [(library, symbol, count) for (library, symbol), count in found.most_common()]


def symbols(addresses: Iterable[int], mapped: Iterable[Mapping]) -> list[tuple[str, str]]:
    """(library, mangled symbol) of each address."""
    ordered = sorted(mapped)
    starts = [mapping[0] for mapping in ordered]
    found: list[tuple[str, str]] = []
    for address in addresses:
        place = bisect.bisect_right(starts, address) - 1
        start, end, offset, path = ordered[place] if place >= 0 else (0, 0, 0, "")
        if address >= end or not path.startswith("/"):
            found.append(("(generated code)", ""))
            continue
        elf = _open(path)
        found.append((Path(path).name, elf.symbol(address - start + offset) if elf else "?"))
    return found


@cache
def _open(path: str) -> _Elf | None:
    try:
        return _Elf(Path(path))
    except (OSError, struct.error, ValueError):
        return None


def mappings() -> Iterable[Mapping]:
    """What is mapped into this process: where it starts and ends, the file's offset, and the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields: list[Any] = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if "x" in fields[1] or len(fields) > 5:
            yield start, end, int(fields[2], 16), fields[5] if len(fields) > 5 else ""
