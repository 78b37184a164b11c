"""The stub libraries, read back as the dynamic loader reads them; the arm64 tests load them for real."""

import _ctypes
import struct
from pathlib import Path

import pytest

from armopt.emulation.stubs import RETURN_VALUES, missing_symbols, read_interface, stub_library, write_stubs
from armopt.errors import InputError

SYMBOLS = {
    "cudaMalloc": "libcudart.so.13",
    "cudaGetDeviceCount": "libcudart.so.13",
    "plain": "",
    "newer": "V2",
}


class Loaded:
    """A shared library as the loader maps it: addresses, not file offsets."""

    def __init__(self, data: bytes) -> None:
        self.memory = bytearray(0x20000)
        self.machine = struct.unpack_from("<H", data, 18)[0]
        dynamic = 0
        (offset,), (count,) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<H", data, 56)
        for index in range(count):
            kind, _, at, address, _, size = struct.unpack_from("<IIQQQQ", data, offset + 56 * index)
            if kind == 1:
                assert at % 0x10000 == address % 0x10000, "a loader maps whole pages"
                self.memory[address : address + size] = data[at : at + size]
            elif kind == 2:
                dynamic = address
        self.tags = {}
        while (entry := struct.unpack_from("<qQ", self.memory, dynamic))[0]:
            self.tags[entry[0]] = entry[1]
            dynamic += 16

    def text(self, offset: int) -> str:
        start = self.tags[5] + offset
        return self.memory[start : self.memory.index(b"\0", start)].decode()

    def versions(self) -> dict[int, str]:
        names, at = {}, self.tags[0x6FFFFFFC]
        for _ in range(self.tags[0x6FFFFFFD]):
            _, _, index, _, _, aux, following = struct.unpack_from("<HHHHIII", self.memory, at)
            names[index] = self.text(struct.unpack_from("<I", self.memory, at + aux)[0])
            at += following
        return names

    def find(self, name: str) -> tuple[str, bytes] | None:
        """The version and the code of a symbol, through the hash table."""
        value = 0
        for byte in name.encode():  # the System V ABI's own wording of its hash
            value = (value << 4) + byte
            if high := value & 0xF0000000:
                value ^= high >> 24
            value &= ~high
        table = self.tags[4]
        buckets, _ = struct.unpack_from("<II", self.memory, table)
        (index,) = struct.unpack_from("<I", self.memory, table + 8 + 4 * (value % buckets))
        while index:
            symbol = struct.unpack_from("<IBBHQQ", self.memory, self.tags[6] + 24 * index)
            if self.text(symbol[0]) == name:
                (version,) = struct.unpack_from("<H", self.memory, self.tags[0x6FFFFFF0] + 2 * index)
                return self.versions()[version], bytes(self.memory[symbol[4] : symbol[4] + symbol[5]])
            (index,) = struct.unpack_from("<I", self.memory, table + 8 + 4 * buckets + 4 * index)
        return None


def returns(value: int) -> bytes:
    mov_x0, ret = 0xD2800000 | value << 5, 0xD65F03C0
    return struct.pack("<II", mov_x0, ret)


def test_every_symbol_is_found_with_its_version_and_returns_its_value():
    library = Loaded(stub_library("libcudart.so.13", SYMBOLS))
    assert library.machine == 183  # aarch64
    assert library.text(library.tags[14]) == "libcudart.so.13"
    for name, version in SYMBOLS.items():
        # Version 1 is the library itself: that is what an unversioned symbol carries.
        assert library.find(name) == (version or "libcudart.so.13", returns(RETURN_VALUES.get(name, 0)))
    assert library.find("absent") is None
    assert library.find("cudaGetDeviceCount") != library.find("cudaMalloc")  # no GPU, and said so


def test_many_symbols_share_buckets_and_are_all_found():
    symbols = {f"function_{index}": "V1" for index in range(500)}
    library = Loaded(stub_library("libmany.so", symbols))
    assert all(library.find(name) == ("V1", returns(0)) for name in symbols)


def test_a_library_without_symbols_is_still_one():
    library = Loaded(stub_library("libcuda.so.1", {}))
    assert library.text(library.tags[14]) == "libcuda.so.1"
    assert library.find("cuInit") is None


def test_a_real_library_is_read_with_its_needs_and_versions():
    interface = read_interface(Path(_ctypes.__file__))
    assert "libc.so.6" in interface.needed
    assert "PyInit__ctypes" in interface.exports
    imports = {symbol.name: symbol for symbol in interface.imports}
    assert imports["PyErr_Format"].library == ""
    versioned = [symbol for symbol in interface.imports if symbol.library == "libc.so.6"]
    assert versioned
    assert all(symbol.version.startswith("GLIBC_") for symbol in versioned)


def test_what_is_missing_is_what_nobody_has(tmp_path):
    user = Path(_ctypes.__file__)
    missing = missing_symbols([user], [])
    libc = missing["libc.so.6"]
    assert any(version.startswith("GLIBC_") for version in libc.values())
    unversioned = [name for symbols in missing.values() for name, version in symbols.items() if not version]
    assert "PyErr_Format" in unversioned
    assert "PyInit__ctypes" not in unversioned

    counts = write_stubs([user], [], tmp_path / "stubs")
    assert {file.name for file in (tmp_path / "stubs").iterdir()} == set(missing) == set(counts)


def test_nothing_missing_writes_nothing(tmp_path):
    assert write_stubs([], [], tmp_path / "stubs") == {}
    assert not (tmp_path / "stubs").exists()


def test_another_file_is_refused(tmp_path):
    (tmp_path / "libfake.so").write_text("INPUT(libreal.so)")  # a linker script, as in development packages
    with pytest.raises(InputError, match="libfake"):
        read_interface(tmp_path / "libfake.so")
