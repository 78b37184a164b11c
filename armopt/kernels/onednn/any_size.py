"""A layer of dynamic size: a primitive for each size, made when that is first met, and not too many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from armopt.kernels.onednn.layer import Arguments, Layer, Wanted, Workspace, memory_format
from armopt.kernels.onednn.primitives import buffer

#: Sizes of one layer that are kept, those met first are dropped first.
_MOST_SIZES = 32

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Sizes:
    """What one call at a time needs: by the shape of the input, arguments and a result without memory."""

    threads: int
    scratch: torch.Tensor
    known: dict[Shape, tuple[Arguments | None, torch.Tensor]] = field(default_factory=dict)


class AnySize:
    """A layer for inputs of any size.

    Attributes:
        layer: The layer at the size that it was planned for.
    """

    def __init__(
        self,
        layer: Layer,
        wanted: Callable[[Shape], tuple[Wanted, Shape]],
        otherwise: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Takes what tells sizes apart.

        Args:
            layer: The layer at the size that it was planned for.
            wanted: Of an input's shape the primitive, and the shape of the result as PyTorch has it.
            otherwise: The layer as a function, for inputs that oneDNN offers no primitive for.
        """
        self.layer, self._wanted, self._otherwise = layer, wanted, otherwise
        self._layers: dict[Shape, Layer | None] = {}

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """The bytes of its weight, in each layout that is wanted."""
        return self.layer.packed

    def prepare(self, threads: int) -> int:
        """Makes the layer at its planned size; returns the size of its scratchpad."""
        return self.layer.prepare(threads)

    def arguments(self, threads: int, scratch: torch.Tensor) -> _Sizes:
        """What one call at a time needs, of whatever size."""
        return _Sizes(threads, scratch)

    def call(self, index: int, dims: int, *, channels_last: bool) -> Callable[[Workspace, torch.Tensor], torch.Tensor]:
        """The layer as a function of a workspace and its input: see :meth:`Layer.call`."""
        execute, empty, dtype = self.layer.executor(), torch.empty_like, self.layer.wanted.activations
        layout = memory_format(range(dims), channels_last=channels_last)

        def run(workspace: Workspace, x: torch.Tensor) -> torch.Tensor:
            sizes: _Sizes = workspace.arguments[index]
            arguments, like = sizes.known.get(x.shape) or self._meet(sizes, x.shape, channels_last)
            if x.dtype != dtype:
                raise ValueError(f"expected {dtype}, found {x.dtype}")
            if not x.is_contiguous(memory_format=layout):
                if channels_last and arguments is not None:
                    x = arguments.channels_last(x)
                else:
                    x = x.contiguous(memory_format=layout)
            y = empty(like)
            if arguments is not None:
                execute(arguments, x, y)
            elif y.numel():
                y.copy_(self._otherwise(x))
            return y

        return run

    def _meet(self, sizes: _Sizes, shape: torch.Size, channels_last: bool) -> tuple[Arguments | None, torch.Tensor]:
        """The entry of a size that was not met in this workspace."""
        wanted, result = self._wanted(shape)
        layer, arguments = self._layers.get(shape), None
        if layer is None and 0 not in (*shape, *result):
            _drop_first(self._layers)
            layer = self._layers[shape] = self.layer.resized(wanted)
        if layer is not None:
            need = layer.prepare(sizes.threads)
            if need > sizes.scratch.numel() - buffer(0).numel():
                sizes.scratch = buffer(1 << (need - 1).bit_length())
            arguments = layer.arguments(sizes.threads, sizes.scratch)
        _drop_first(sizes.known)
        entry = sizes.known[shape] = arguments, wanted.like(result, channels_last=channels_last)
        return entry


def _drop_first(known: dict[Shape, Any]) -> None:
    if len(known) >= _MOST_SIZES:
        known.pop(next(iter(known)), None)
