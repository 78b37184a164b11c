"""Looks at a TorchScript archive before torch compiles it, and at what was compiled before anything of it runs.

torch.jit.load runs code of the file: methods that restore an object, and values of defaults; it takes the sizes of
tensors as given. So what it gets is an archive written anew, of code that only declares and of tensors that fit their
memory.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from armopt.capture.files.archive import Archive, check_view
from armopt.capture.files.pickles import (
    FUNCTIONS,
    MOST_PICKLE,
    CodeError,
    DataUnpickler,
    check_nesting,
    parts_of,
    sizes_of,
)
from armopt.capture.files.script_calls import check_sizes
from armopt.capture.files.script_code import UnshownError, check_source

_TYPE = re.compile(r"[\w\[\], .]{1,2000}", re.ASCII)
_OBJECT = re.compile(r"__torch__(?:\.\w+)*", re.ASCII)
_MOST_CODE = 1 << 23


def rewritten(archive: Archive, path: Path) -> None:
    """Writes what torch needs of an archive to `path`, once it was looked at; what is for other uses is left out.

    Raises:
        UnshownError: It runs more than operations on tensors and numbers.
        Exception: It is damaged.
    """
    sources = {name: archive.read(name, _MOST_CODE) for name in archive.names if _is_code(name)}
    if sum(map(len, sources.values())) > _MOST_CODE:
        raise ValueError(f"its code has more than {_MOST_CODE} bytes")
    check_sizes({name: check_source(sources[name], name) for name in sorted(sources)})
    used = _check_objects(archive, "constants") | _check_objects(archive, "data")
    kept = {name: archive.read(name, MOST_PICKLE) for name in ("constants.pkl", "data.pkl")} | sources
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in kept.items():
        writer.write_record(name, data, len(data))
    for name in sorted(used):
        storage = archive.storage(name)
        writer.write_record(name, storage, storage.nbytes())  # type: ignore[arg-type]
    writer.set_min_version(_version(archive))
    writer.write_end_of_file()


def _is_code(name: str) -> bool:
    return name.startswith("code/") and name.endswith(".py")


def _version(archive: Archive) -> int:
    number = int(archive.read(next((name for name in ("version", ".data/version") if name in archive), "version"), 16))
    if not 1 <= number <= 100:
        raise ValueError(f"it is of the version {number}")
    return number


class _Object:
    """Stands for an object of the file's own class."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None


class _ObjectUnpickler(DataUnpickler):
    """Reads the objects of TorchScript as far as to see that they are data; tensors are looked at by size."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if module.startswith("__torch__"):
            whole = f"{module}.{name}"
            if not _OBJECT.fullmatch(whole) or whole.startswith("__torch__.torch.classes"):
                raise CodeError(whole[:200])
            return _Object(whole)
        return super().find_class(module, name)

    def _make(self) -> None:
        args, kind = self.stack.pop(), self.stack[-1]
        if args != () or not isinstance(kind, _Object):
            raise pickle.UnpicklingError("it makes what is no object")
        self.stack[-1] = _Object(kind.name)

    def _state(self) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if not isinstance(value, _Object) or value.state is not None or not isinstance(state, dict):
            raise CodeError("the state of an object")
        value.state = state

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **DataUnpickler.dispatch,
        ord(pickle.NEWOBJ): _make,
        ord(pickle.BUILD): _state,
    }


def _fits(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> str:
    check_view(storage[0], storage[1], offset, tuple(size), tuple(stride))
    return "a tensor"


def _list_of(*kinds: type) -> Callable[[Any], list[Any]]:
    def check(items: Any) -> list[Any]:
        if type(items) is not list or not all(type(item) in kinds for item in items):
            raise pickle.UnpicklingError("a list of something else")
        return items

    return check


def _tagged(value: Any, kind: Any) -> Any:
    if (
        not isinstance(kind, str)
        or not _TYPE.fullmatch(kind)
        or "classes" in kind
        or not isinstance(value, (list, dict))
    ):
        raise pickle.UnpicklingError("a container of an unknown type")
    return value


_ObjectUnpickler.functions = {
    **FUNCTIONS,
    ("torch._utils", "_rebuild_tensor_v2"): _fits,
    ("torch.jit._pickle", "build_intlist"): _list_of(int),
    ("torch.jit._pickle", "build_doublelist"): _list_of(float),
    ("torch.jit._pickle", "build_boollist"): _list_of(bool),
    ("torch.jit._pickle", "build_tensorlist"): _list_of(str),
    ("torch.jit._pickle", "restore_type_tag"): _tagged,
}


def _check_objects(archive: Archive, part: str) -> set[str]:
    """Looks at the pickle of a part, and gives the members that its tensors stand in."""
    find, used = sizes_of(archive, part)
    try:
        content = _ObjectUnpickler(io.BytesIO(archive.read(f"{part}.pkl", MOST_PICKLE)), find).load()
    except CodeError as error:
        raise UnshownError(f"a pickle of {error} in {part}.pkl") from None
    check_nesting(content, _parts_of)
    return used


def _parts_of(value: Any) -> Iterable[Any]:
    return (value.state,) if isinstance(value, _Object) else parts_of(value)
