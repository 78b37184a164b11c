"""The tensors of a safetensors file over its mapped pages, and copies of them that no longer need the file."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import weakref
from io import BufferedIOBase
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from armopt.bundle.files import Stamp, changed, stamp
from armopt.errors import BundleError, CaptureError
from armopt.ir import graph as g

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
}


def check_storable(tensor: torch.Tensor, name: str) -> None:
    """Refuses a tensor that a file of weights can't hold.

    Raises:
        CaptureError: It is not dense, or of a dtype that safetensors lacks.
    """
    g.check_dense(tensor, name)
    if tensor.dtype not in _DTYPES.values():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CaptureError(
            f"the constant {name} is {dtype}, which a bundle can't hold", hint="Give the model a copy in another dtype"
        )


class MappedTensors:
    """Tensors of a file that is mapped privately: writing to one would not change the file.

    They are for looking at, and for commands that end soon. What works with the values later takes a :meth:`copy`: who
    cuts a mapped file short ends every process that reads what was behind, and who writes to it changes their values.

    Attributes:
        tensors: By name.
    """

    def __init__(self, path: Path, file: BufferedIOBase | None = None, opened_as: Stamp | None = None) -> None:
        """Maps a file; `file`, where it is open already, and its stamp at that time.

        Raises:
            BundleError: It is not in that format.
        """
        self._path = path
        self._copies: dict[int, StorageWeakRef] = {}
        try:
            with contextlib.nullcontext(file) if file is not None else path.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                self._file = os.dup(opened.fileno())
            weakref.finalize(self, os.close, self._file)
            self._stamp = opened_as or stamp(self._file)
            self._address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
            self.tensors = self._read()
        except OSError:
            raise
        except Exception as error:  # whatever a wrong file makes torch or Python say
            raise BundleError(
                f"is no file of tensors: {error!r}", where=str(path), hint="Make the bundle again"
            ) from error

    def _read(self) -> dict[str, torch.Tensor]:
        data = 8 + int.from_bytes(self._map[:8], "little")
        if data > len(self._map):
            raise ValueError("cut short")
        header = json.loads(self._map[8:data])
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if not 0 <= begin <= end or count * dtype.itemsize != end - begin:
                raise ValueError(f"{name} of {shape} at {begin} to {end}")
            if count:
                found[name] = torch.frombuffer(self._map, dtype=dtype, count=count, offset=data + begin).view(shape)
            else:
                found[name] = torch.empty(shape, dtype=dtype)
        return found

    def check_unchanged(self) -> None:
        """Refuses a file that was written to since it was opened.

        Raises:
            BundleError: It was.
        """
        if stamp(self._file) != self._stamp:
            raise changed(self._path)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """One of the tensors in memory of its own, read from the file; the one from last time as long as it lives.

        Raises:
            BundleError: The file was cut short.
        """
        begin = tensor.data_ptr() - self._address
        if not 0 <= begin < len(self._map):
            return tensor
        if (held := self._copies.get(begin)) is not None and (storage := _alive(held)) is not None:
            return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
        made = torch.empty_like(tensor)
        left, at = made.reshape(-1).view(torch.uint8).numpy().data, begin
        while left:
            count = os.preadv(self._file, [left], at)
            if not count:
                raise changed(self._path)
            left, at = left[count:], at + count
        self._copies[begin] = StorageWeakRef(made.untyped_storage())  # type: ignore[no-untyped-call]
        return made


def _alive(storage: StorageWeakRef) -> torch.UntypedStorage | None:
    found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
    return found
