"""One layer as a primitive of its own: made once for a shape, its weight packed, and executed by one call of C."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from armopt.kernels.onednn import compute_library, implementations
from armopt.kernels.onednn.arguments import Arguments
from armopt.kernels.onednn.images import ChannelsLast
from armopt.kernels.onednn.pointwise import Pointwise, behind
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
)


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
        post_op: The pointwise function that is part of it; empty for none.
        behind: The one that runs behind it, on its result; empty for none.
        preferred: Parts of names of implementations, the best first; where none is offered, oneDNN's first.
    """

    source: tuple[int, ...]
    weight: tuple[int, ...]
    result: tuple[int, ...]
    activations: torch.dtype
    products: torch.dtype
    geometry: tuple[tuple[int, ...], ...] | None
    post_op: str = ""
    behind: str = ""
    preferred: tuple[str, ...] = ()

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How a tensor of activations lies in memory: a convolution's channels last."""
        if self.geometry is None:
            return in_rows(shape)
        batch, channels, *spatial = shape
        first, *others, last = in_rows((batch, *spatial, channels))
        return (first, last, *others)

    @property
    def result_size(self) -> int:
        """Bytes of the output."""
        return math.prod(self.result) * self.activations.itemsize

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
        self._behind = Pointwise(self._api, wanted.behind, self._result()) if wanted.behind else None
        self._first = self._make(description, packed)
        self._made = {torch.get_num_threads(): self._first}
        self._packed = {self._api.key(description.layout): packed}

    def _result(self) -> Handle:
        """The descriptor of its result."""
        wanted = self.wanted
        return self._api.strided(wanted.result, wanted.strides(wanted.result), wanted.activations)

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
        if "acl" in self.implementation:
            compute_library.warn_of_other_threads(threads)
        return self._made[threads].scratch

    def _packed_for(self, description: Description) -> torch.Tensor:
        """The weight in the layout of another primitive; packed again at most once for each layout."""
        key = self._api.key(description.layout)
        if key not in self._packed:
            first = self._first
            self._packed[key] = self._api.reorder(first.description.layout, aligned(first.packed), description.layout)
        return self._packed[key]

    def resized(self, wanted: Wanted) -> Layer | None:
        """This layer at other sizes; None where oneDNN offers nothing for them.

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
    def post_op(self) -> str:
        """The pointwise function that its result has gone through; empty for none."""
        return self.wanted.post_op or self.wanted.behind

    @property
    def bias(self) -> torch.Tensor | None:
        """As it was given."""
        return self._bias

    def arguments(self, threads: int, scratch: torch.Tensor, like: torch.Tensor) -> Arguments:
        """What one call at a time needs, after :meth:`prepare`; `scratch` holds what it asked for."""
        made, api, wanted = self._made[threads], self._api, self.wanted
        memories = {
            SRC: api.memory(api.strided(wanted.source, wanted.strides(wanted.source), wanted.activations)),
            DST: api.memory(self._result()),
            WEIGHTS: api.memory(made.description.layout, aligned(made.packed)),
        }
        if self._bias is not None:
            bias = api.strided(self._bias.shape, self._bias.stride(), self._bias.dtype)
            memories[BIAS] = api.memory(bias, self._bias.data_ptr())
        if made.scratch:
            memories[SCRATCHPAD] = api.memory(api.part(made.description.handle, SCRATCHPAD_DESC), aligned(scratch))
        array = (Argument * len(memories))(*(Argument(which, memory.pointer) for which, memory in memories.items()))
        place = ctypes.c_void_p(ctypes.addressof(array))
        execute: Callable[[], int | None] = functools.partial(
            api.execute, made.primitive.pointer, api.stream.pointer, len(memories), place
        )
        owned: tuple[object, ...] = (array, memories, scratch, made)
        if self._behind is not None:
            second, others = self._behind.execution(memories[DST])
            execute, owned = behind(execute, second), (*owned, others)
        return Arguments(
            execute,
            api.set_data,
            memories[SRC].pointer,
            memories[DST].pointer,
            owned,
            ChannelsLast(api, wanted.source, wanted.strides(wanted.source), wanted.activations),
            like,
        )


def in_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor that is contiguous."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
