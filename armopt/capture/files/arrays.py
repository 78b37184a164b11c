"""NumPy's .npz: arrays by name, each as large as what is stored of it, and no pickled objects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy

from armopt.capture.files.archive import Archive, read_storage

_MOST_HEADER = 1 << 16


def load_npz(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of a file.

    Raises:
        Exception: It is damaged, or holds something other than arrays of numbers.
    """
    with Archive.opened(path) as archive:
        found = {}
        for name in sorted(archive.names):
            with archive.open(name) as file:
                found[name.removesuffix(".npy")] = _load(file, archive.size(name), name)
        return found


def _load(file: IO[bytes], size: int, name: str) -> torch.Tensor:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(file, max_header_size=_MOST_HEADER)
    if dtype.hasobject or dtype.fields or dtype.subdtype:
        raise ValueError(f"{name} holds {dtype}, not numbers")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > size:
        raise ValueError(f"{name} of shape {shape} has {size} bytes")
    data = torch.empty(0, dtype=torch.uint8).set_(read_storage(file, nbytes)).numpy()
    array: Any = np.ndarray(shape, dtype, data, order="F" if by_columns else "C")
    return torch.from_numpy(np.array(array, dtype.newbyteorder("="), order="C"))
