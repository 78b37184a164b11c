"""Pickles that hold data alone: containers, numbers, text and tensors. Nothing that a file names is called.

torch.load(weights_only=True) believes the sizes that a file declares, and allocates that much memory. Here a
tensor is as large as what is stored of it, and reaches nowhere else.
"""

from __future__ import annotations

import collections
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from armopt.capture.files.archive import Archive, read_storage, view
from armopt.errors import InputError

#: Bytes of a pickle without its tensors: a state dict of ten thousand has some two million.
MOST_PICKLE = 1 << 25
_MOST_DEPTH, _MOST_VALUES = 100, 10_000_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {name: each for name in dir(torch) if isinstance(each := getattr(torch, name), torch.dtype)}
_OPCODES = """
PROTO STOP FRAME MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
GLOBAL STACK_GLOBAL BINPERSID
"""
_KEPT = {
    ord(getattr(pickle, name)): pickle._Unpickler.dispatch[ord(getattr(pickle, name))] for name in _OPCODES.split()
}


#: The memory of a tensor, and what it holds.
Storage = tuple[Any, torch.dtype]


class CodeError(Exception):
    """A pickle that takes more than data: what it names."""


def _tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    return view(storage[0], storage[1], offset, tuple(size), tuple(stride))


def _tensor_of(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    return view(storage[0], rest[2], offset, tuple(size), tuple(stride))


def _parameter(data: torch.Tensor, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(data, requires_grad is True)


def _versions(found: Any) -> dict[str, dict[str, int]]:
    """What a state dict says of its modules: the version of each."""
    items = found.items() if isinstance(found, dict) else ()
    versions = {name: about.get("version") for name, about in items if isinstance(about, dict)}
    return {name: {"version": version} for name, version in versions.items() if type(version) is int}


def _ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    if not all(isinstance(key, (str, int)) for key, _ in items):
        raise pickle.UnpicklingError("a dictionary by something other than names and numbers")
    return collections.OrderedDict(items)


def _set(items: Any) -> frozenset[Any]:
    if not all(isinstance(item, (str, int, float)) for item in items):
        raise pickle.UnpicklingError("a set of something other than names and numbers")
    return frozenset(items)


def _device(kind: Any, *index: Any) -> str:
    if not isinstance(kind, str):
        raise pickle.UnpicklingError("a device by something other than a name")
    return kind


def _bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding}")
    return text.encode("latin1")


def _quantized(*args: Any) -> Any:
    raise InputError("the model is quantized (int8)", hint="Give the FP32 model")


FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
}


class DataUnpickler(pickle._Unpickler):
    """Reads a pickle without calling anything that it names.

    This is Python's reader in Python. The one in C believes the numbers of the memo, and allocates that much.

    Args:
        file: Where the pickle stands.
        find: The memory of tensors, by key and bytes.
    """

    def __init__(self, file: IO[bytes], find: Callable[[str, int], Any]) -> None:
        super().__init__(file, encoding="utf-8")
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name: a dtype, or a function of this module."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        found = self.functions.get((module, name))
        if found is None:
            raise CodeError(f"{module}.{name}"[:200])
        return found

    def persistent_load(self, pid: Any) -> Storage:
        """The memory of a tensor."""
        kind, dtype, key, _, count, *rest = pid
        plain = kind == "storage" and type(key) is str and type(dtype) is torch.dtype and type(count) is int
        if not plain or any(each is not None for each in rest):
            raise pickle.UnpicklingError("a tensor's memory is described otherwise")
        if count < 0:
            raise pickle.UnpicklingError(f"a tensor of {count} values")
        return self._find(key, count * dtype.itemsize), dtype

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if function not in self.functions.values():
            raise pickle.UnpicklingError("it calls what can't be called")
        self.stack[-1] = function(*args)

    def _build(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if type(value) is not collections.OrderedDict or not isinstance(state, dict):
            raise CodeError(f"the state of a {type(value).__name__}")
        value._metadata = _versions(state.get("_metadata"))  # type: ignore[attr-defined]

    def _append(self) -> None:
        value = self.stack.pop()
        self._list(self.stack).append(value)

    def _appends(self) -> None:
        items = self.pop_mark()
        self._list(self.stack).extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        if not isinstance(self.stack[-1], dict) or not isinstance(key, (str, int, float, bytes)):
            raise pickle.UnpicklingError("a dictionary by something other than names and numbers")
        self.stack[-1][key] = value

    @staticmethod
    def _list(stack: list[Any]) -> list[Any]:
        if type(stack[-1]) is not list:
            raise pickle.UnpicklingError("something other than a list grows")
        return stack[-1]

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    functions: ClassVar[Mapping[tuple[str, str], Callable[..., Any]]] = FUNCTIONS
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **_KEPT,
        ord(pickle.REDUCE): _reduce,
        ord(pickle.BUILD): _build,
        ord(pickle.APPEND): _append,
        ord(pickle.APPENDS): _appends,
        ord(pickle.SETITEM): _set_item,
        ord(pickle.SETITEMS): _set_items,
    }


def load_archive(archive: Archive, name: str = "data.pkl") -> Any:
    """What torch.save wrote into a zip file.

    Raises:
        CodeError: It is more than data.
        Exception: It is damaged.
    """
    if "byteorder" in archive and archive.read("byteorder", 16) != sys.byteorder.encode():
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    content = DataUnpickler(io.BytesIO(archive.read(name, MOST_PICKLE)), storages_of(archive)).load()
    check_nesting(content, parts_of)
    return content


def check_nesting(value: Any, parts_of: Callable[[Any], Iterable[Any]]) -> None:
    """Refuses values that nest deeply, and those that few parts make very many of by standing in each other twice.

    Args:
        value: What a pickle holds.
        parts_of: What a value is made of.

    Raises:
        ValueError: It does.
    """
    known: dict[int, int] = {}
    inside: set[int] = set()

    def count(each: Any) -> int:
        if id(each) in inside or len(inside) > _MOST_DEPTH:
            raise ValueError("its values nest without end")
        if id(each) not in known:
            inside.add(id(each))
            known[id(each)] = 1 + sum(map(count, parts_of(each)))
            inside.discard(id(each))
        if known[id(each)] > _MOST_VALUES:
            raise ValueError(f"it holds {known[id(each)]} values")
        return known[id(each)]

    count(value)


def parts_of(value: Any) -> Iterable[Any]:
    """What a container holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple, frozenset)) else ()


def storages_of(archive: Archive, folder: str = "data") -> Callable[[str, int], torch.UntypedStorage]:
    """Finds the memory of tensors in an archive; what has one key is one memory."""
    held: dict[str, torch.UntypedStorage] = {}
    sizes, _ = sizes_of(archive, folder)

    def find(key: str, size: int) -> torch.UntypedStorage:
        sizes(key, size)
        if key not in held:
            held[key] = archive.storage(f"{folder}/{key}")
        return held[key]

    return find


def sizes_of(archive: Archive, folder: str) -> tuple[Callable[[str, int], int], set[str]]:
    """Compares the size of tensors' memory with what is stored; and the members that were asked for."""
    used: set[str] = set()

    def find(key: str, size: int) -> int:
        name = f"{folder}/{key}"
        if name not in archive or archive.size(name) != size:
            raise pickle.UnpicklingError(f"{name} is missing, or has another size than the tensor in it")
        used.add(name)
        return size

    return find, used


def load_bytes(data: bytes) -> Any:
    """What torch.save wrote, in memory: see :func:`load_archive`."""
    return load_archive(Archive(io.BytesIO(data), len(data)))


def load(path: Path) -> Any:
    """What torch.save wrote into a file, in either form: see :func:`load_archive`."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return load_archive(Archive(file, path.stat().st_size))
        file.seek(0)
        return _load_stream(file, path.stat().st_size)


def _load_stream(file: IO[bytes], size: int) -> Any:
    """The form before zip files: some pickles, and the memory of all tensors behind them."""
    held: dict[str, torch.UntypedStorage] = {}
    declared = 0

    def find(key: str, nbytes: int) -> torch.UntypedStorage:
        nonlocal declared
        if key not in held:
            declared += nbytes
            if declared > size:
                raise pickle.UnpicklingError(f"a file of {size} bytes says that it holds {declared}")
            held[key] = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        if held[key].nbytes() != nbytes:
            raise pickle.UnpicklingError("a tensor's memory has two sizes")
        return held[key]

    head = io.BytesIO(file.read(MOST_PICKLE))
    reader = (DataUnpickler(head, find).load() for _ in range(5))
    magic, protocol, about = next(reader), next(reader), next(reader)
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise CodeError("another object than torch.save writes")
    if not about.get("little_endian", True):
        raise pickle.UnpicklingError("it was written on a machine of another byte order")
    content, keys = next(reader), next(reader)
    file.seek(head.tell())
    check_nesting(content, parts_of)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(held):
        raise pickle.UnpicklingError("its tensors have other keys")
    for key in keys:
        count, storage = int.from_bytes(file.read(8), "little"), held[key]
        if bool(count) != bool(storage.nbytes()) or (count and storage.nbytes() % count):
            raise pickle.UnpicklingError("a tensor's memory has two sizes")
        storage.copy_(read_storage(file, storage.nbytes()))
    return content
