"""The tensors of a safetensors file over its mapped pages, which can leave memory while the tensors stay."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
from io import BufferedIOBase
from pathlib import Path

import torch

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

    safetensors' own load_file maps too, but can't let a page go before its last tensor does.

    Attributes:
        tensors: By name.
    """

    def __init__(self, path: Path, file: BufferedIOBase | None = None) -> None:
        """Maps a file; `file`, where it is open already.

        Raises:
            BundleError: It is not in that format.
        """
        try:
            with contextlib.nullcontext(file) if file is not None else path.open("rb") as opened:
                self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
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

    def release(self, tensor: torch.Tensor) -> None:
        """Lets the pages of one of the tensors leave memory; reading it again brings them back from the file."""
        begin = tensor.data_ptr() - self._address
        if 0 <= begin < len(self._map) and hasattr(self._map, "madvise"):
            first = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, begin + tensor.nbytes - first)
