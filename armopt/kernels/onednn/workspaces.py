"""The layers of a program as functions, and what its calls need of their own: one workspace for each call at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from armopt.kernels.onednn import views
from armopt.kernels.onednn.arguments import Arguments
from armopt.kernels.onednn.layer import Layer
from armopt.kernels.onednn.primitives import aligned, buffer
from armopt.kernels.onednn.views import View

#: More workspaces than calls at once are not kept.
_MOST_WORKSPACES = 64


class Call(Protocol):
    """A layer, of one size or of any, in a program."""

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """The bytes of its weight, in each layout that is wanted."""

    @property
    def size(self) -> int:
        """Bytes of its result, at the size that was planned."""

    def prepare(self, threads: int) -> int:
        """Makes it for as many threads as this thread works with; returns the size of its scratchpad."""

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> Any:
        """What one call at a time needs; `place` is where results that fit may lie."""

    def function(self, index: int) -> Callable[..., torch.Tensor]:
        """A function of a workspace, in which its arguments are at `index`, and the input."""


class OneSize:
    """A layer for inputs of one size."""

    def __init__(self, layer: Layer, shape: tuple[int, ...], *, channels_last: bool) -> None:
        """Takes what a call needs to know.

        Args:
            layer: The layer.
            shape: Of the result, as PyTorch has it.
            channels_last: Whether input and result lie so; else their rows are in their order.
        """
        self._layer, self._channels_last = layer, channels_last
        self._layout = memory_format(shape, channels_last=channels_last)
        self._like = layer.wanted.like(shape, channels_last=channels_last)

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """See :class:`Call`."""
        return self._layer.packed

    @property
    def size(self) -> int:
        """See :class:`Call`."""
        return self._layer.wanted.result_size

    def prepare(self, threads: int) -> int:
        """See :class:`Call`."""
        return self._layer.prepare(threads)

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> Arguments:
        """See :class:`Call`."""
        made = self._layer.arguments(threads, scratch, self._like)
        made.keep(place)
        return made

    def function(self, index: int) -> Callable[[Workspace, torch.Tensor], torch.Tensor]:
        """See :class:`Call`."""
        wanted, channels_last, layout = self._layer.wanted, self._channels_last, self._layout
        size = math.prod(wanted.source) * wanted.activations.itemsize

        def run(workspace: Workspace, x: torch.Tensor) -> torch.Tensor:
            arguments: Arguments = workspace.arguments[index]
            if x is not arguments.seen:
                if x.nbytes != size:
                    raise ValueError(f"expected {size} bytes for {wanted.source}, found {x.nbytes}")
                if channels_last:
                    if not x.is_contiguous(memory_format=layout):
                        x = arguments.channels_last(x)
                elif not x.is_contiguous():
                    x = x.contiguous()
                arguments.take(x)
            return arguments.run()

        return run


class Workspace:
    """What one call of a program needs of its own: arguments of each layer, and a scratchpad that they share.

    Attributes:
        arguments: Of each layer.
        views: Of results that have a place, in the order of the program's.
        threads: With which its primitives work.
        lent: The arguments of layers that write to what the caller gave.
    """

    __slots__ = ("arguments", "lent", "threads", "views")

    def __init__(self, arguments: list[Any], threads: int) -> None:
        self.arguments, self.threads = arguments, threads
        self.views: list[Any] = []
        self.lent: list[Any] = []

    @property
    def results(self) -> dict[int, torch.Tensor]:
        """Of the layers whose result is the same tensor in every call, by index."""
        kept = {index: getattr(each, "kept", None) for index, each in enumerate(self.arguments)}
        return {index: result for index, result in kept.items() if result is not None}


class Workspaces:
    """The layers of one program, and the workspaces in which calls run: as many as there were calls at once.

    Attributes:
        layers: In the order in which programs have them.
        arena: Bytes that results share.
        places: The first byte of a layer's result there, by the layer's index; those of what a caller gets have none.
        outputs: Which output of the program a layer's result is, by the layer's index.
        views: Of results that have a place.
    """

    def __init__(self) -> None:
        self.layers: list[Call] = []
        self.arena = 0
        self.places: Mapping[int, int] = {}
        self.outputs: Mapping[int, int] = {}
        self.views: Sequence[View] = ()
        self._free: defaultdict[int, list[Workspace]] = defaultdict(list)

    def take(self, out: Sequence[torch.Tensor | None] | None = None) -> Workspace:
        """A workspace that no other call uses, for as many threads as this thread works with now.

        Args:
            out: What the caller gives for the outputs of the program.

        Raises:
            OneDnnError: oneDNN offers no primitive for that number.
        """
        # asking is also what tells OpenMP's runtime of a new thread how many it has
        threads = torch.get_num_threads()
        try:
            workspace = self._free[threads].pop()
        except IndexError:
            workspace = self._new(threads)
        if out is not None:
            for index, output in self.outputs.items():
                workspace.arguments[index].lend(out[output])
                workspace.lent.append(workspace.arguments[index])
        return workspace

    @torch.inference_mode(False)  # in which what is made could not be written to out of it
    def _new(self, threads: int) -> Workspace:
        workspace = Workspace(self._arguments(threads), threads)
        workspace.views = views.make(self.views, workspace.results)
        return workspace

    def _arguments(self, threads: int) -> list[Any]:
        """Those of a new workspace. With it go its scratchpad and its arena."""
        scratch = buffer(max((layer.prepare(threads) for layer in self.layers), default=0))
        arena = buffer(self.arena) if self.places else None
        made = []
        for index, layer in enumerate(self.layers):
            place = None
            if arena is not None and index in self.places:
                first = aligned(arena) - arena.data_ptr() + self.places[index]
                place = arena[first : first + layer.size]
            made.append(layer.arguments(threads, scratch, place))
        return made

    def give(self, workspace: Workspace) -> None:
        """Gives a workspace back, without what the caller lent it."""
        if workspace.lent:
            for arguments in workspace.lent:
                arguments.lend(None)
            workspace.lent.clear()
        free = self._free[workspace.threads]
        if len(free) < _MOST_WORKSPACES:
            free.append(workspace)


def memory_format(shape: Sequence[int], *, channels_last: bool) -> torch.memory_format:
    """How PyTorch calls the layout of a tensor of that many dimensions."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return layouts[len(shape)] if channels_last else torch.contiguous_format
