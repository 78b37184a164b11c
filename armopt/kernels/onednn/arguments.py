"""What one call of a primitive needs of its own: where its tensors lie, as oneDNN and as PyTorch have it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from armopt.kernels.onednn.primitives import check

#: The attribute of tensors that are the same in every call of a workspace.
_KEPT = "_armopt_kept"


def keep(tensor: torch.Tensor) -> None:
    """Marks a tensor that is the same, and lies at the same place, in every call of a workspace."""
    setattr(tensor, _KEPT, True)


def kept_in(place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor in the first bytes of a place that lies as another."""
    made = place[: like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())
    keep(made)
    return made


def lies_as(y: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether a tensor is of the shape, strides and dtype of another."""
    return (y.shape, y.stride(), y.dtype) == (like.shape, like.stride(), like.dtype)


@dataclass(slots=True)
class Arguments:
    """What a call of a layer needs of its own: no other call may use it meanwhile.

    Attributes:
        execute: Executes the primitive and returns oneDNN's status; nothing where it can't fail.
        place: Says where the memory of a tensor is.
        source: The memory that is its input.
        result: The memory that is its output.
        owned: What these point to.
        channels_last: Lays out an input that lies otherwise.
        like: A result without memory, to make others like it.
        kept: The result, where it has a place in the arena: the same for each call. Else each call makes one.
        lent: The result of this call, where its caller gave one that lies as results do.
        seen: The input of the last call where that is the same in every call: it lies where it did, and as it did.
        x: Where its input was last.
        y: Where its output was last.
    """

    execute: Callable[[], int | None]
    place: Callable[[ctypes.c_void_p, int], int]
    source: ctypes.c_void_p
    result: ctypes.c_void_p
    owned: Any
    channels_last: Callable[[torch.Tensor], torch.Tensor]
    like: torch.Tensor
    kept: torch.Tensor | None = None
    lent: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    x: int = 0
    y: int = 0

    def take(self, x: torch.Tensor) -> None:
        """Makes a tensor of the size and strides that are wanted the input."""
        if self.x != (at := x.data_ptr()):
            self.place(self.source, at)
            self.x = at
        self.seen = x if hasattr(x, _KEPT) else None

    def keep(self, arena: torch.Tensor | None) -> None:
        """Gives the result the first bytes of a part of an arena, where it fits."""
        if arena is not None and self.like.nbytes <= arena.numel():
            self.kept = kept_in(arena, self.like)
            self.place(self.result, self.kept.data_ptr())

    def lend(self, y: torch.Tensor | None) -> None:
        """Takes what the next result is to be, where it is as that lies; None where the call makes one."""
        self.lent = y if y is not None and lies_as(y, self.like) else None

    def run(self) -> torch.Tensor:
        """The result for the input that was taken last."""
        y = self.kept
        if y is None:
            y = torch.empty_like(self.like) if self.lent is None else self.lent
            if self.y != (at := y.data_ptr()):
                self.place(self.result, at)
                self.y = at
        if status := self.execute():
            check(status, "primitive_execute")
        return y
