"""Finds functions of oneDNN's C API in the libtorch_cpu.so that this process has loaded.

The wheels hide them from the dynamic linker and keep them in the file's full symbol table. Reading that takes half a
second, so the places in the table are remembered for each build, by its build id. A place is only a hint: the entry
that it leads to has to have the name that is sought, or the table is read again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from armopt.files import cache_folder, read_regular, write_whole

LIBRARY = "libtorch_cpu.so"
_SCHEMA = 1
_MOST_BYTES = 1 << 20
_SYMTAB, _NOTE, _BUILD_ID = 2, 4, 3
#: With which the names of all functions of oneDNN begin.
_PREFIX = b"dnnl_"
#: How much of the names is looked through at once, and more than the longest name sought has.
_PIECE, _LONGEST = 1 << 20, 256
_ENTRY = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size


@dataclass(frozen=True, slots=True)
class Loaded:
    """A library of this process: its file, how far it lies from the addresses in it, and its build id in memory."""

    path: str
    bias: int
    build_id: bytes


class _Header(ctypes.Structure):
    """One segment: Elf64_Phdr."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("type", "flags")),
        *((name, ctypes.c_uint64) for name in ("offset", "address", "physical", "size", "memory", "align")),
    ]


class _Info(ctypes.Structure):
    """The beginning of dl_phdr_info."""

    _fields_ = [
        ("bias", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_Header)),
        ("count", ctypes.c_uint16),
    ]


def loaded(name: str = LIBRARY) -> Loaded | None:
    """The library of that name in this process; None where there is none, or this is not Linux."""
    try:
        iterate = ctypes.CDLL(None).dl_iterate_phdr
    except (AttributeError, OSError):
        return None
    found: list[Loaded] = []

    def look(info: Any, size: int, data: Any) -> int:
        path = os.fsdecode(info.contents.name or b"")
        if os.path.basename(path) != name:
            return 0
        segments = [info.contents.headers[i] for i in range(info.contents.count)]
        notes = (ctypes.string_at(info.contents.bias + s.address, s.memory) for s in segments if s.type == _NOTE)
        found.append(Loaded(path, info.contents.bias, _build_id(notes)))
        return 1

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Info), ctypes.c_size_t, ctypes.c_void_p)
    iterate(kind(look), None)
    return found[0] if found else None


def addresses(library: Loaded, names: Sequence[str], cache: Path | None = None) -> Mapping[str, int]:
    """Where functions are in this process's memory.

    Args:
        library: The library.
        names: The functions.
        cache: A folder in which places are remembered; by default where verdicts of probes are.

    Returns:
        Addresses by name; empty where the file is another than the one loaded, or lacks any of the functions.
    """
    try:
        with open(library.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as image:
            table = _Table.of(image)
            if table is None or not library.build_id or _build_id(table.notes) != library.build_id:
                return {}
            found = _values(table, names, _cache_file(library, cache))
    except (OSError, ValueError, struct.error, IndexError):
        return {}
    return {name: library.bias + found[name] for name in names} if all(map(found.get, names)) else {}


def _values(table: _Table, names: Sequence[str], path: Path | None) -> Mapping[str, int]:
    """Values of symbols, by the places that are remembered where these are right; those sought are remembered."""
    places = _remembered(path)
    found = {name: table.value(places[name], name) for name in names if name in places}
    if not all(map(found.get, names)):
        places = table.find(names)
        found = {name: table.value(place, name) for name, place in places.items()}
        _remember(path, places)
    return found


@dataclass(frozen=True, slots=True)
class _Table:
    """The symbol table of a file: where it and its names begin and end."""

    image: mmap.mmap
    start: int
    end: int
    names: int
    names_end: int
    notes: Sequence[bytes]

    @staticmethod
    def of(image: mmap.mmap) -> _Table | None:
        """That of an ELF file of 64 bits, little-endian; None where there is none."""
        if image[:6] != b"\x7fELF\x02\x01":
            return None
        (offset,) = struct.unpack_from("<Q", image, 0x28)
        size, count = struct.unpack_from("<HH", image, 0x3A)
        # of a section: name, type, flags, address, offset, size, link, info, alignment, size of an entry
        sections = [struct.unpack_from("<IIQQQQIIQQ", image, offset + i * size) for i in range(count)]
        notes = [image[s[4] : s[4] + s[5]] for s in sections if s[1] == 7]
        for section in sections:
            if section[1] == _SYMTAB:
                names = sections[section[6]]
                return _Table(image, section[4], section[4] + section[5], names[4], names[4] + names[5], notes)
        return None

    def find(self, names: Sequence[str]) -> Mapping[str, int]:
        """The places of symbols in the table, by name, of those that it has.

        All begin alike, and few others do: one pass over the names finds them.
        """
        prefix, wanted = b"\0" + _PREFIX, {name.encode() for name in names}
        offsets: dict[str, int] = {}
        for start in range(self.names, self.names_end, _PIECE):
            piece = self.image[start : min(start + _PIECE + _LONGEST, self.names_end)]
            at = piece.find(prefix)
            while at >= 0:
                name = piece[at + 1 : piece.find(b"\0", at + 1)]
                if name in wanted:
                    offsets[name.decode()] = start + at + 1 - self.names
                at = piece.find(prefix, at + 1)
        size = _ENTRY.size // 4
        count = (self.end - self.start) // _ENTRY.size * size
        entries = torch.frombuffer(self.image, dtype=torch.int32, offset=self.start, count=count)[::size]
        found = torch.isin(entries, torch.tensor(sorted(offsets.values()), dtype=torch.int32)).nonzero().flatten()
        at_offsets = {int(entries[place]): place for place in found.tolist()}
        return {name: at_offsets[offset] for name, offset in offsets.items() if offset in at_offsets}

    def value(self, place: int, name: str) -> int:
        """The value of the symbol at a place; 0 where that is another symbol, or none."""
        at = self.start + place * _ENTRY.size
        if not self.start <= at <= self.end - _ENTRY.size:
            return 0
        offset, info, _, _, value, _ = _ENTRY.unpack_from(self.image, at)
        wanted = name.encode() + b"\0"
        start = self.names + offset
        is_function = info & 0xF == 2
        return int(value) if is_function and self.image[start : start + len(wanted)] == wanted else 0


def _build_id(notes: Iterator[bytes] | Sequence[bytes]) -> bytes:
    """The build id among notes; empty where there is none."""
    for note in notes:
        at = 0
        while at + 12 <= len(note):
            name, size, kind = struct.unpack_from("<III", note, at)
            start = at + 12 + (name + 3) // 4 * 4
            if kind == _BUILD_ID and note[at + 12 : at + 16] == b"GNU\0":
                return note[start : start + size]
            at = start + (size + 3) // 4 * 4
    return b""


def _cache_file(library: Loaded, folder: Path | None) -> Path | None:
    root = folder or cache_folder()
    return None if root is None else root / "symbols" / f"{library.build_id.hex()}.json"


def _remembered(path: Path | None) -> Mapping[str, int]:
    """Places by name; none where the file can't be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if path is not None:
            content = json.loads(read_regular(path, _MOST_BYTES))
            if content["schema"] == _SCHEMA:
                return {k: v for k, v in content["places"].items() if type(v) is int}
    return {}


def _remember(path: Path | None, places: Mapping[str, int]) -> None:
    """A place that can't be written is no error: the next start reads the table again."""
    with contextlib.suppress(OSError):
        if path is not None and places:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"schema": _SCHEMA, "places": places}))
