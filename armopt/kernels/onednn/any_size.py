"""A layer of dynamic size: a primitive for each size, made when that is first met, and not too many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from armopt.kernels.onednn.arguments import Arguments
from armopt.kernels.onednn.layer import Layer, Wanted
from armopt.kernels.onednn.primitives import buffer
from armopt.kernels.onednn.workspaces import Workspace, memory_format

#: Sizes of one layer that are kept, those met first are dropped first.
_MOST_SIZES = 32

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Sizes:
    """What one call at a time needs: by the shape of the input, arguments and a result without memory.

    Attributes:
        place: Where results that fit may lie, whatever their size.
        seen: The input of the last call where that lies where it did, with what was known of it.
        lent: What the caller of the program gave for the result of this call.
    """

    threads: int
    scratch: torch.Tensor
    place: torch.Tensor | None
    known: dict[Shape, tuple[Arguments | None, torch.Tensor]] = field(default_factory=dict)
    seen: tuple[torch.Tensor | None, Arguments | None] = (None, None)
    lent: torch.Tensor | None = None

    def lend(self, y: torch.Tensor | None) -> None:
        """Takes what the next result is to be, if it is of its size; None where the call makes one."""
        self.lent = y

    def run(self, arguments: Arguments) -> torch.Tensor:
        """The result of a size."""
        if self.lent is None:
            return arguments.run()
        arguments.lend(self.lent)
        y = arguments.run()
        arguments.lend(None)
        return y


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
        dims: int,
        *,
        channels_last: bool,
    ) -> None:
        """Takes what tells sizes apart.

        Args:
            layer: The layer at the size that it was planned for.
            wanted: Of an input's shape the primitive, and the shape of the result as PyTorch has it.
            otherwise: The layer as a function, for inputs that oneDNN offers no primitive for.
            dims: Dimensions of input and result.
            channels_last: Whether they lie so; else their rows are in their order.
        """
        self.layer, self._wanted, self._otherwise = layer, wanted, otherwise
        self._layout = memory_format(range(dims), channels_last=channels_last)
        self._channels_last = channels_last
        self._layers: dict[Shape, Layer | None] = {}

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """The bytes of its weight, in each layout that is wanted."""
        return self.layer.packed

    @property
    def size(self) -> int:
        """Bytes of its result, at the size that was planned."""
        return self.layer.wanted.result_size

    def prepare(self, threads: int) -> int:
        """Makes the layer at its planned size; returns the size of its scratchpad."""
        return self.layer.prepare(threads)

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> _Sizes:
        """What one call at a time needs, of whatever size."""
        return _Sizes(threads, scratch, place)

    def function(self, index: int) -> Callable[[Workspace, torch.Tensor], torch.Tensor]:
        """A function of a workspace, in which its arguments are at `index`, and the input."""
        dtype, layout, channels_last = self.layer.wanted.activations, self._layout, self._channels_last

        def run(workspace: Workspace, x: torch.Tensor) -> torch.Tensor:
            sizes: _Sizes = workspace.arguments[index]
            seen, arguments = sizes.seen
            if x is seen and arguments is not None:
                return sizes.run(arguments)
            arguments, like = sizes.known.get(x.shape) or self._meet(sizes, x.shape)
            if x.dtype != dtype:
                raise ValueError(f"expected {dtype}, found {x.dtype}")
            if not x.is_contiguous(memory_format=layout):
                if channels_last and arguments is not None:
                    x = arguments.channels_last(x)
                else:
                    x = x.contiguous(memory_format=layout)
            if arguments is not None:
                arguments.take(x)
                sizes.seen = arguments.seen, arguments
                return sizes.run(arguments)
            y = torch.empty_like(like)
            return y.copy_(self._otherwise(x)) if y.numel() else y

        return run

    @torch.inference_mode(False)  # as the memory of a workspace is
    def _meet(self, sizes: _Sizes, shape: torch.Size) -> tuple[Arguments | None, torch.Tensor]:
        """The entry of a size that was not met in this workspace."""
        wanted, result = self._wanted(shape)
        like = wanted.like(result, channels_last=self._channels_last)
        layer, arguments = self._layers.get(shape), None
        if layer is None and 0 not in (*shape, *result):
            drop_first(self._layers)
            layer = self._layers[shape] = self.layer.resized(wanted)
        if layer is not None:
            need = layer.prepare(sizes.threads)
            if need > sizes.scratch.numel() - buffer(0).numel():
                sizes.scratch = buffer(1 << (need - 1).bit_length())
            arguments = layer.arguments(sizes.threads, sizes.scratch, like)
            arguments.keep(sizes.place)
        drop_first(sizes.known)
        entry = sizes.known[shape] = arguments, like
        return entry


def drop_first(known: dict[Any, Any]) -> None:
    """Makes room for another size; other threads may do so too."""
    if len(known) >= _MOST_SIZES:
        for first in list(known)[:1]:
            known.pop(first, None)
