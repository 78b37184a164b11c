"""Stand-ins for the CUDA libraries that an aarch64 CUDA build of PyTorch links against.

PyPI's aarch64 PyTorch is a CUDA build from 2.11 on. Its CPU side needs none of CUDA, but the dynamic loader
wants every library named in DT_NEEDED and every versioned symbol before ``import torch`` returns. This module
reads from the wheel's own libraries what is missing and writes ELF files that export exactly that; every
function returns 0. No compiler: an aarch64 library with two instructions is small enough to write by hand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from armopt.errors import InputError

# What a function of a stub returns unless named here: 0, which is "success" everywhere in CUDA.
# A machine without a GPU says so (cudaErrorNoDevice): torch.cuda.is_available() is then False, not a guess.
NO_DEVICE = 100
RETURN_VALUES: Mapping[str, int] = {"cudaGetDeviceCount": NO_DEVICE, "cuInit": NO_DEVICE}

_ET_DYN, _EM_AARCH64 = 3, 183
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_DT_NULL, _DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB = 0, 1, 4, 5, 6
_DT_STRSZ, _DT_SYMENT, _DT_SONAME = 10, 11, 14
_DT_VERSYM, _DT_VERDEF, _DT_VERDEFNUM = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_SHT_DYNSYM, _SHT_DYNAMIC, _SHT_VERNEED, _SHT_VERSYM = 11, 6, 0x6FFFFFFE, 0x6FFFFFFF
_STB_GLOBAL, _STB_WEAK, _STT_FUNC = 1, 2, 2
_PAGE = 0x10000  # aarch64 kernels may use 64 KiB pages


@dataclass(frozen=True)
class Import:
    """A symbol taken from another library; ``library`` and ``version`` are "" where it is unversioned."""

    name: str
    library: str
    version: str
    weak: bool


@dataclass(frozen=True)
class Interface:
    """What one ELF file needs and offers, as the dynamic loader sees it."""

    needed: tuple[str, ...]
    imports: tuple[Import, ...]
    exports: frozenset[str]


def read_interface(path: Path) -> Interface:
    """Reads the dynamic symbols of one 64-bit little-endian ELF file.

    Raises:
        InputError: the file is not such an ELF file.
    """
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise InputError("not a 64-bit little-endian ELF file", where=str(path))
        (table_offset,) = struct.unpack_from("<Q", header, 40)
        entry_size, count = struct.unpack_from("<HH", header, 58)
        file.seek(table_offset)
        table = file.read(entry_size * count)
        # name, type, flags, addr, offset, size, link, info, addralign, entsize
        sections = [struct.unpack_from("<IIQQQQIIQQ", table, index * entry_size) for index in range(count)]

        def content(index: int) -> bytes:
            file.seek(sections[index][4])
            return file.read(sections[index][5])

        by_type = {section[1]: index for index, section in enumerate(sections)}
        if _SHT_DYNSYM not in by_type or _SHT_DYNAMIC not in by_type:
            return Interface((), (), frozenset())
        symbols = content(by_type[_SHT_DYNSYM])
        strings = content(sections[by_type[_SHT_DYNSYM]][6])
        dynamic = content(by_type[_SHT_DYNAMIC])
        versym = content(by_type[_SHT_VERSYM]) if _SHT_VERSYM in by_type else b""
        verneed = content(by_type[_SHT_VERNEED]) if _SHT_VERNEED in by_type else b""

    def text(offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    needed = tuple(text(value) for tag, value in struct.iter_unpack("<qQ", dynamic) if tag == _DT_NEEDED)
    versions = {index: (text(library), text(version)) for index, library, version in _required_versions(verneed)}
    imports: list[Import] = []
    exports: set[str] = set()
    for position, (name, info, _, section, _, _) in enumerate(struct.iter_unpack("<IBBHQQ", symbols)):
        if not name:
            continue
        if section:
            exports.add(text(name))
            continue
        index = struct.unpack_from("<H", versym, 2 * position)[0] & 0x7FFF if versym else 0
        library, version = versions.get(index, ("", ""))
        imports.append(Import(text(name), library, version, weak=info >> 4 == _STB_WEAK))
    return Interface(needed, tuple(imports), frozenset(exports))


def _required_versions(verneed: bytes) -> Iterable[tuple[int, int, int]]:
    """Yields (version index, offset of the library's name, offset of the version's) of .gnu.version_r."""
    entry = 0
    while verneed:
        _, aux_count, library, aux, next_entry = struct.unpack_from("<HHIII", verneed, entry)
        position = entry + aux
        for _ in range(aux_count):
            _, _, index, version, next_aux = struct.unpack_from("<IHHII", verneed, position)
            yield index, library, version
            position += next_aux
        if not next_entry:
            return
        entry += next_entry


def missing_symbols(users: Iterable[Path], providers: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Finds what ``users`` need and neither they nor ``providers`` have.

    Args:
        users: the shared libraries of the wheel.
        providers: the libraries and programs that will be there: the C library, Python, ...

    Returns:
        For each missing library its symbols, each with its version ("" when unversioned). An unversioned
        symbol names no library, and the loader looks everywhere for it: it goes to the first missing library.
    """
    interfaces = {path.name: read_interface(path) for path in users}
    present = {path.name: read_interface(path) for path in providers}
    offered = frozenset().union(*(item.exports for item in (*interfaces.values(), *present.values())))
    needed = {name for item in interfaces.values() for name in item.needed}
    missing: dict[str, dict[str, str]] = {name: {} for name in sorted(needed - interfaces.keys() - present.keys())}
    if not missing:
        return missing
    catch_all = next(iter(missing))
    for item in interfaces.values():
        for symbol in item.imports:
            if symbol.library in missing:
                missing[symbol.library][symbol.name] = symbol.version
            elif not symbol.library and not symbol.weak and symbol.name not in offered:
                missing[catch_all].setdefault(symbol.name, "")
    return missing


def stub_library(soname: str, symbols: Mapping[str, str]) -> bytes:
    """Returns an aarch64 shared library whose functions do nothing and return 0.

    Args:
        soname: the name the loader knows it by.
        symbols: name -> version ("" for none) of every function.
    """
    strings = _Strings()
    names = sorted(symbols)
    versions = sorted({version for version in symbols.values() if version})
    version_index = {"": 1} | {version: 2 + index for index, version in enumerate(versions)}

    hash_table = _sysv_hash_table(names)
    versym = struct.pack(f"<{1 + len(names)}H", 0, *(version_index[symbols[name]] for name in names))
    verdef = _version_definitions([soname, *versions], strings)
    soname_offset = strings.add(soname)
    name_offsets = [strings.add(name) for name in names]

    # One read-only, executable segment, in this order; the dynamic section has a writable one, because the
    # loader relocates the addresses in it.
    code_offsets, code = _functions(names)
    layout = _Layout(start=64 + 4 * 56)
    hash_at = layout.place(hash_table)
    symbols_at = layout.place(b"\0" * 24 * (1 + len(names)))
    strings_at = layout.place(strings.content)
    versym_at = layout.place(versym)
    verdef_at = layout.place(verdef)
    code_at = layout.place(code)
    text_end = layout.end
    dynamic_at = -(-text_end // 8) * 8
    dynamic_address = dynamic_at + _PAGE  # a page of its own in memory, none in the file

    global_function = _STB_GLOBAL << 4 | _STT_FUNC
    layout.fill(
        symbols_at,
        b"\0" * 24
        + b"".join(
            # The section index only has to differ from 0 (undefined): there is no section table.
            struct.pack("<IBBHQQ", offset, global_function, 0, 1, code_at + code_offset, 8)
            for offset, code_offset in zip(name_offsets, code_offsets, strict=True)
        ),
    )
    dynamic = b"".join(
        struct.pack("<qQ", tag, value)
        for tag, value in (
            (_DT_SONAME, soname_offset),
            (_DT_HASH, hash_at),
            (_DT_STRTAB, strings_at),
            (_DT_SYMTAB, symbols_at),
            (_DT_STRSZ, len(strings.content)),
            (_DT_SYMENT, 24),
            (_DT_VERSYM, versym_at),
            (_DT_VERDEF, verdef_at),
            (_DT_VERDEFNUM, 1 + len(versions)),
            (_DT_NULL, 0),
        )
    )
    read, write, execute = 4, 2, 1
    header = (
        struct.pack("<16sHHI", b"\x7fELF\x02\x01\x01", _ET_DYN, _EM_AARCH64, 1)
        + struct.pack("<QQQI", 0, 64, 0, 0)  # no entry point; program headers follow this one; no sections, flags
        + struct.pack("<HHHHHH", 64, 56, 4, 64, 0, 0)  # sizes and counts of headers: 4 segments
        + _segment(_PT_LOAD, read | execute, 0, 0, text_end, _PAGE)
        + _segment(_PT_LOAD, read | write, dynamic_at, dynamic_address, len(dynamic), _PAGE)
        + _segment(_PT_DYNAMIC, read | write, dynamic_at, dynamic_address, len(dynamic), 8)
        + _segment(_PT_GNU_STACK, read | write, 0, 0, 0, 16)
    )
    layout.fill(0, header)
    return layout.content + b"\0" * (dynamic_at - text_end) + dynamic


def write_stubs(users: Iterable[Path], providers: Iterable[Path], folder: Path) -> dict[str, int]:
    """Writes one stub per missing library into ``folder``; returns library -> number of symbols."""
    missing = missing_symbols(users, providers)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    for soname, symbols in missing.items():
        (folder / soname).write_bytes(stub_library(soname, symbols))
    return {soname: len(symbols) for soname, symbols in missing.items()}


class _Strings:
    """A string table: offset 0 is the empty string."""

    def __init__(self) -> None:
        self.content = b"\0"
        self._offsets: dict[str, int] = {}

    def add(self, value: str) -> int:
        if value not in self._offsets:
            self._offsets[value] = len(self.content)
            self.content += value.encode() + b"\0"
        return self._offsets[value]


class _Layout:
    """Bytes at 8-aligned offsets, which are the addresses too: the segment is mapped as the file is."""

    def __init__(self, start: int) -> None:
        self._buffer = bytearray(start)

    @property
    def end(self) -> int:
        return len(self._buffer)

    @property
    def content(self) -> bytes:
        return bytes(self._buffer)

    def place(self, part: bytes) -> int:
        self._buffer.extend(b"\0" * (-len(self._buffer) % 8))
        offset = len(self._buffer)
        self._buffer.extend(part)
        return offset

    def fill(self, offset: int, part: bytes) -> None:
        self._buffer[offset : offset + len(part)] = part


def _segment(kind: int, flags: int, offset: int, address: int, size: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, align)


def _functions(names: Iterable[str]) -> tuple[list[int], bytes]:
    """One function per distinct return value; returns where each name's function is, and the code."""
    code = b""
    at: dict[int, int] = {}
    offsets = []
    for name in names:
        value = RETURN_VALUES.get(name, 0)
        if value not in at:
            at[value] = len(code)
            mov_x0, ret = 0xD2800000 | value << 5, 0xD65F03C0
            code += struct.pack("<II", mov_x0, ret)
        offsets.append(at[value])
    return offsets, code


def _version_definitions(names: list[str], strings: _Strings) -> bytes:
    """.gnu.version_d: the first name is the library's own (the base), the others are its versions."""
    entries = []
    for index, name in enumerate(names, start=1):
        is_base, is_last = index == 1, index == len(names)
        entries.append(
            struct.pack("<HHHHIII", 1, int(is_base), index, 1, _elf_hash(name), 20, 0 if is_last else 28)
            + struct.pack("<II", strings.add(name), 0)
        )
    return b"".join(entries)


def _sysv_hash_table(names: list[str]) -> bytes:
    """.hash: buckets of chains over the symbol indices 1..n (0 ends a chain)."""
    bucket_count = max(1, len(names) // 2)
    buckets, chains = [0] * bucket_count, [0] * (1 + len(names))
    for index, name in enumerate(names, start=1):
        bucket = _elf_hash(name) % bucket_count
        chains[index], buckets[bucket] = buckets[bucket], index
    return struct.pack(f"<{2 + bucket_count + len(chains)}I", bucket_count, len(chains), *buckets, *chains)


def _elf_hash(name: str) -> int:
    """The hash of the System V ABI."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return value
