"""Zip files as torch writes them, read without torch: each member is as large as it says, and what was stored."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from armopt.errors import InputError, first_line
from armopt.files import COMPRESSIONS

#: Bytes of a member that is no tensor: a graph of a hundred thousand nodes has some hundred million.
MOST_TEXT = 1 << 28
#: By how much an archive larger than that may be compressed. torch compresses nothing.
_MOST_RATIO = 20
_CHUNK = 1 << 24


@contextlib.contextmanager
def one_error(
    where: str,
    what: str = "is truncated or damaged",
    hint: str = "Copy or save the model again",
    *,
    passing: type[Exception] = InputError,
) -> Iterator[None]:
    """Whatever a file makes a reader say, as one error; what is of the type `passing` goes through.

    Raises:
        InputError: The reader failed.
    """
    try:
        yield
    except InputError as error:
        raise error if error.where else InputError(error.what, where=where, hint=error.hint) from error
    except passing:
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}", where=where, hint=hint) from error


class Archive:
    """A zip file whose members stand in one folder.

    Args:
        file: The file, or its path.
        size: Of the file, in bytes.

    Raises:
        zipfile.BadZipFile: It is damaged, a name is there twice, or it would be far larger than the file.
    """

    def __init__(self, file: Path | IO[bytes], size: int) -> None:
        self._zip = zipfile.ZipFile(file)
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        if any(member.compress_type not in COMPRESSIONS for member in members):
            raise zipfile.BadZipFile("it is compressed by a method that may take any memory")
        stored = sum(member.file_size for member in members)
        if stored > max(MOST_TEXT, _MOST_RATIO * size):
            raise zipfile.BadZipFile(f"a file of {size} bytes says that it holds {stored}")
        names = [member.filename for member in members]
        folders = {name.partition("/")[0] for name in names}
        root = f"{folders.pop()}/" if len(folders) == 1 and all("/" in name for name in names) else ""
        self._members = {name.removeprefix(root): member for name, member in zip(names, members, strict=True)}
        if len(self._members) < len(names):
            ((name, _),) = Counter(names).most_common(1)
            raise zipfile.BadZipFile(f"{name} is in it twice")

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path) -> Iterator[Archive]:
        """The archive at a path."""
        with path.open("rb") as file:
            yield cls(file, path.stat().st_size)

    @property
    def names(self) -> frozenset[str]:
        """Of its members, without the folder that holds all of them."""
        return frozenset(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Bytes of a member; KeyError where it isn't there."""
        return self._members[name].file_size

    def read(self, name: str, most: int = MOST_TEXT) -> bytes:
        """A member of at most so many bytes.

        Raises:
            zipfile.BadZipFile: It is damaged, missing or larger.
        """
        if name not in self._members:
            raise zipfile.BadZipFile(f"there is no {name} in it")
        if self.size(name) > most:
            raise zipfile.BadZipFile(f"{name} has {self.size(name)} bytes")
        return self._zip.read(self._members[name])

    def open(self, name: str) -> IO[bytes]:
        """A member, to be read bit by bit."""
        if name not in self._members:
            raise zipfile.BadZipFile(f"there is no {name} in it")
        return self._zip.open(self._members[name])

    def storage(self, name: str) -> torch.UntypedStorage:
        """A member as the memory of tensors."""
        with self.open(name) as file:
            return read_storage(file, self.size(name))


def read_storage(file: IO[bytes], size: int) -> torch.UntypedStorage:
    """The next bytes of a file as the memory of tensors.

    Raises:
        EOFError: There are fewer.
    """
    tensor = torch.empty(size, dtype=torch.uint8)
    array: Any = tensor.numpy()
    into = memoryview(array)
    done = 0
    while done < size:
        data = file.read(min(_CHUNK, size - done))
        if not data:
            raise EOFError(f"{size - done} bytes of a tensor are missing")
        into[done : done + len(data)] = data
        done += len(data)
    if isinstance(file, zipfile.ZipExtFile):
        file.read(1)  # at its end the checksum is compared
    return tensor.untyped_storage()


def view(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A tensor in this memory, all of it inside.

    Raises:
        ValueError: See :func:`check_view`.
    """
    check_view(storage.nbytes(), dtype, offset, size, stride)
    tensor: torch.Tensor = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
    return tensor


def check_view(nbytes: int, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Looks whether a tensor is all in a memory of so many bytes.

    Raises:
        ValueError: It reaches out of it, or repeats a few values very often.
    """
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a tensor's place in its memory is no list of numbers")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
    if (last + 1) * dtype.itemsize > nbytes:
        raise ValueError(f"a tensor of size {size} has {nbytes} bytes")
    if count * dtype.itemsize > max(1 << 26, nbytes):
        raise ValueError(f"a tensor of size {size} repeats {nbytes} bytes")
