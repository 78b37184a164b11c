"""One layer as a primitive of its own: made once for a shape, its weight packed, and executed by one call of C."""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from armopt.kernels.onednn import implementations
from armopt.kernels.onednn.images import ChannelsLast
from armopt.kernels.onednn.primitives import (
    BIAS,
    DST,
    SCRATCHPAD,
    SCRATCHPAD_DESC,
    SRC,
    WEIGHTS,
    WEIGHTS_DESC,
    Api,
    Argument,
    Handle,
    OneDnnError,
    View,
    aligned,
    buffer,
    check,
)

#: More workspaces than calls at once are not kept.
_MOST_WORKSPACES = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """A primitive for one layer of one shape. Shapes are as oneDNN has them: groups stand in front of a weight.

    Attributes:
        source: Shape of the input.
        weight: Shape of the weight.
        result: Shape of the output.
        activations: Dtype of input, bias and output.
        products: What the multiplier sees: BF16 with FP32 activations is fast math, of this primitive alone.
        geometry: Of a convolution stride, dilation less 1 and padding; None for a plain product.
        post_op: The pointwise function behind it; empty for none.
        preferred: Parts of names of implementations, the best first; where none is offered, oneDNN's first.
    """

    source: tuple[int, ...]
    weight: tuple[int, ...]
    result: tuple[int, ...]
    activations: torch.dtype
    products: torch.dtype
    geometry: tuple[tuple[int, ...], ...] | None
    post_op: str = ""
    preferred: tuple[str, ...] = ()

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How a tensor of activations lies in memory: a convolution's channels last."""
        if self.geometry is None:
            return in_rows(shape)
        batch, channels, *spatial = shape
        first, *others, last = in_rows((batch, *spatial, channels))
        return (first, last, *others)

    def like(self, shape: tuple[int, ...], *, channels_last: bool) -> torch.Tensor:
        """A result without memory, to make others like it: that takes less than telling how they lie."""
        strides = self.strides(shape) if channels_last else in_rows(shape)
        tensor = torch.empty_strided(shape, strides, dtype=self.activations)
        tensor.untyped_storage().resize_(0)
        return tensor


@dataclass(frozen=True, slots=True)
class Description:
    """A primitive that could be made: who does its arithmetic, and how it wants its weight."""

    api: Api
    handle: Handle
    implementation: str

    @property
    def layout(self) -> View:
        """The descriptor of the packed weight."""
        return self.api.part(self.handle, WEIGHTS_DESC)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The bytes of a weight of the shape that is wanted, in this layout."""
        return self.api.reorder(
            self.api.strided(weight.shape, weight.stride(), weight.dtype), weight.data_ptr(), self.layout
        )


def describe(api: Api, wanted: Wanted, *, bias: bool) -> Description | None:
    """What oneDNN offers in this thread; None where that is nothing, or only a reference.

    Args:
        api: oneDNN.
        wanted: The primitive.
        bias: Whether there is one.
    """
    source, result = (
        api.strided(shape, wanted.strides(shape), wanted.activations) for shape in (wanted.source, wanted.result)
    )
    weight = api.anyhow(wanted.weight, wanted.activations)
    added = api.strided((wanted.result[1],), (1,), wanted.activations) if bias else None
    half = wanted.products == torch.bfloat16
    attributes = api.attributes(fast_math=half and wanted.activations == torch.float32, post_op=wanted.post_op)
    tensors = (source, weight, added, result)

    def make() -> Handle:
        if wanted.geometry is None:
            return api.inner_product(tensors, attributes)
        return api.convolution(tensors, wanted.geometry, attributes)

    def takes(description: Handle) -> bool:
        return api.is_bf16(api.part(description, WEIGHTS_DESC)) == half

    try:
        chosen = implementations.choose(api, make, wanted.preferred, takes)
    except OneDnnError:
        return None
    return None if chosen is None else Description(api, *chosen)


@dataclass(slots=True)
class Arguments:
    """What a call of a layer needs of its own: no other call may use it meanwhile.

    Attributes:
        primitive: For oneDNN.
        array: The address of its arguments, `count` of them.
        source: The memory that is its input.
        result: The memory that is its output.
        x: Where its input was last.
        y: Where its output was last.
        kept: What these point to.
        channels_last: Lays out an input that lies otherwise.
    """

    primitive: ctypes.c_void_p
    count: int
    array: ctypes.c_void_p
    source: ctypes.c_void_p
    result: ctypes.c_void_p
    kept: Any
    channels_last: ChannelsLast
    x: int = 0
    y: int = 0


@dataclass(frozen=True, slots=True)
class _Made:
    """A primitive for one number of threads, and the bytes of its weight."""

    description: Description
    primitive: Handle
    packed: torch.Tensor
    scratch: int


class Layer:
    """A primitive with its packed weight and bias.

    Attributes:
        wanted: The primitive.
        implementation: Who does its arithmetic, as oneDNN names it.
    """

    def __init__(
        self, wanted: Wanted, description: Description, packed: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """Makes it.

        Args:
            wanted: The primitive.
            description: What was chosen for it, in this thread.
            packed: The weight, packed for that.
            bias: In the dtype of the activations; nothing else may change or free its memory.

        Raises:
            OneDnnError: oneDNN can't make it.
        """
        self.wanted, self.implementation = wanted, description.implementation
        self._api = description.api
        self._bias = bias
        self._first = self._make(description, packed)
        self._made = {torch.get_num_threads(): self._first}
        self._packed = {self._api.key(description.layout): packed}

    def _make(self, description: Description, packed: torch.Tensor) -> _Made:
        api = self._api
        scratch = api.size(api.part(description.handle, SCRATCHPAD_DESC))
        return _Made(description, api.primitive(description.handle), packed, scratch)

    def prepare(self, threads: int) -> int:
        """Makes the primitive for as many threads as this thread works with; returns the size of its scratchpad.

        Raises:
            OneDnnError: oneDNN offers nothing for that number.
        """
        if threads not in self._made:
            description = describe(self._api, self.wanted, bias=self._bias is not None)
            if description is None:
                raise OneDnnError(f"nothing but a reference for {self.wanted} on {threads} threads")
            self._made[threads] = self._make(description, self._packed_for(description))
        return self._made[threads].scratch

    def _packed_for(self, description: Description) -> torch.Tensor:
        """The weight in the layout of another primitive; packed again at most once for each layout."""
        key = self._api.key(description.layout)
        if key not in self._packed:
            first = self._first
            self._packed[key] = self._api.reorder(first.description.layout, aligned(first.packed), description.layout)
        return self._packed[key]

    def resized(self, wanted: Wanted) -> Layer | None:
        """The same layer for other sizes; None where oneDNN offers nothing for them.

        With a post-op only by the same implementation: others may swallow NaN in it.
        """
        wanted = replace(wanted, preferred=(self.implementation,))
        description = describe(self._api, wanted, bias=self._bias is not None)
        if description is None or (wanted.post_op and description.implementation != self.implementation):
            return None
        made = Layer(wanted, description, self._packed_for(description), self._bias)
        made._packed = self._packed
        return made

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """The bytes of its weight, in each layout that is wanted."""
        return tuple(self._packed.values())

    def weight(self) -> torch.Tensor:
        """The values of the packed weight, in the shape that is wanted."""
        api, first = self._api, self._first
        dtype = torch.bfloat16 if api.is_bf16(first.description.layout) else torch.float32
        plain = api.strided(self.wanted.weight, in_rows(self.wanted.weight), dtype)
        values = api.reorder(first.description.layout, aligned(first.packed), plain)
        start = aligned(values) - values.data_ptr()
        size = math.prod(self.wanted.weight) * dtype.itemsize
        return values[start : start + size].view(dtype).view(self.wanted.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """As it was given."""
        return self._bias

    def arguments(self, threads: int, scratch: torch.Tensor) -> Arguments:
        """What one call at a time needs, after :meth:`prepare`; `scratch` holds what it asked for."""
        made, api, wanted = self._made[threads], self._api, self.wanted
        memories = {
            SRC: api.memory(api.strided(wanted.source, wanted.strides(wanted.source), wanted.activations)),
            DST: api.memory(api.strided(wanted.result, wanted.strides(wanted.result), wanted.activations)),
            WEIGHTS: api.memory(made.description.layout, aligned(made.packed)),
        }
        if self._bias is not None:
            bias = api.strided(self._bias.shape, self._bias.stride(), self._bias.dtype)
            memories[BIAS] = api.memory(bias, self._bias.data_ptr())
        if made.scratch:
            memories[SCRATCHPAD] = api.memory(api.part(made.description.handle, SCRATCHPAD_DESC), aligned(scratch))
        array = (Argument * len(memories))(*(Argument(which, memory.pointer) for which, memory in memories.items()))
        return Arguments(
            made.primitive.pointer,
            len(memories),
            ctypes.c_void_p(ctypes.addressof(array)),
            memories[SRC].pointer,
            memories[DST].pointer,
            (array, memories, scratch, made),
            ChannelsLast(api, wanted.source, wanted.strides(wanted.source), wanted.activations),
        )

    def call(
        self, index: int, shape: tuple[int, ...], *, channels_last: bool
    ) -> Callable[[Workspace, torch.Tensor], torch.Tensor]:
        """The layer as a function of a workspace, in which its arguments are at `index`, and its input.

        Args:
            index: That of the layer in its :class:`Workspaces`.
            shape: Of the result, as PyTorch has it.
            channels_last: Whether input and result lie so; else their rows are in their order.
        """
        wanted, execute, empty = self.wanted, self.executor(), torch.empty_like
        size = math.prod(wanted.source) * wanted.activations.itemsize
        like = wanted.like(shape, channels_last=channels_last)
        layout = memory_format(shape, channels_last=channels_last)

        def run(workspace: Workspace, x: torch.Tensor) -> torch.Tensor:
            if x.nbytes != size:
                raise ValueError(f"expected {size} bytes for {wanted.source}, found {x.nbytes}")
            arguments = workspace.arguments[index]
            if channels_last:
                if not x.is_contiguous(memory_format=layout):
                    x = arguments.channels_last(x)
            elif not x.is_contiguous():
                x = x.contiguous()
            y = empty(like)
            execute(arguments, x, y)
            return y

        return run

    def executor(self) -> Callable[[Arguments, torch.Tensor, torch.Tensor], None]:
        """What executes the primitive on an input, and a result to be, of the sizes and strides that are wanted."""
        api = self._api
        execute, set_data, stream = api.execute, api.set_data, api.stream.pointer

        def run(arguments: Arguments, x: torch.Tensor, y: torch.Tensor) -> None:
            if arguments.x != (at := x.data_ptr()):
                set_data(arguments.source, at)
                arguments.x = at
            if arguments.y != (at := y.data_ptr()):
                set_data(arguments.result, at)
                arguments.y = at
            if status := execute(arguments.primitive, stream, arguments.count, arguments.array):
                check(status, "primitive_execute")

        return run


class _Callable(Protocol):
    """A layer of one size, or of any."""

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """The bytes of its weight, in each layout that is wanted."""

    def prepare(self, threads: int) -> int:
        """Makes it for as many threads as this thread works with; returns the size of its scratchpad."""

    def arguments(self, threads: int, scratch: torch.Tensor) -> Any:
        """What one call at a time needs."""


class Workspace:
    """What one call of a program needs of its own: arguments of each layer, and a scratchpad that they share."""

    __slots__ = ("arguments", "free")

    def __init__(self, arguments: list[Any], free: list[Workspace]) -> None:
        self.arguments, self.free = arguments, free


class Workspaces:
    """The layers of one program, and the workspaces in which calls run: as many as there were calls at once."""

    def __init__(self) -> None:
        self.layers: list[_Callable] = []
        self._free: defaultdict[int, list[Workspace]] = defaultdict(list)

    def take(self) -> Workspace:
        """A workspace that no other call uses, for as many threads as this thread works with now.

        Raises:
            OneDnnError: oneDNN offers no primitive for that number.
        """
        # asking is also what tells OpenMP's runtime of a new thread how many it has
        threads = torch.get_num_threads()
        free = self._free[threads]
        try:
            return free.pop()
        except IndexError:
            scratch = buffer(max((layer.prepare(threads) for layer in self.layers), default=0))
            return Workspace([layer.arguments(threads, scratch) for layer in self.layers], free)

    @staticmethod
    def give(workspace: Workspace) -> None:
        """Gives a workspace back."""
        if len(workspace.free) < _MOST_WORKSPACES:
            workspace.free.append(workspace)


def memory_format(shape: Sequence[int], *, channels_last: bool) -> torch.memory_format:
    """How PyTorch calls the layout of a tensor of that many dimensions."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    return layouts[len(shape)] if channels_last else torch.contiguous_format


def in_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that is contiguous."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
