"""Tensors with equal content are held once, for as long as some program uses them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from armopt.ir import graph as g


class _Alive:
    """Packed forms of one weight, held weakly: see :class:`armopt.runtime.bind.Packings`."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[int, ...], weakref.ref[torch.Tensor]]] = []

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        for shape, reference in self._entries:
            tensor = reference()
            if tensor is not None:
                yield shape, tensor

    def append(self, entry: tuple[tuple[int, ...], torch.Tensor], /) -> None:
        shape, tensor = entry
        self._entries = [(s, r) for s, r in self._entries if r() is not None]
        self._entries.append((shape, weakref.ref(tensor)))

    def __bool__(self) -> bool:
        return any(reference() is not None for _, reference in self._entries)


class WeightPool:
    """Stored and packed weights of all programs of a process. Holds nothing alive itself."""

    def __init__(self) -> None:
        self._stored: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._packed: dict[tuple[Any, ...], _Alive] = {}
        self._known: Any = WeakTensorKeyDictionary()

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This tensor, or one of the same content that is held already."""
        return self._stored.setdefault(self.identify("", tensor), tensor)

    def identify(self, name: str, tensor: torch.Tensor) -> str:
        """The content of a weight; its name says nothing, since graphs name theirs as they like."""
        digest: str | None = self._known.get(tensor)
        if digest is None:
            state = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}:{tensor.stride()}".encode())
            state.update(g.tensor_bytes(tensor))
            digest = self._known[tensor] = state.hexdigest()
        return digest

    def __getitem__(self, key: tuple[Any, ...], /) -> _Alive:
        """Packed forms by kernel, content and geometry: see :class:`armopt.runtime.bind.PackedWeights`."""
        if len(self._packed) > 2 * sum(map(bool, self._packed.values())) + 64:
            self._packed = {k: held for k, held in self._packed.items() if held}
        return self._packed.setdefault(key, _Alive())
