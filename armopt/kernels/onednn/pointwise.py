"""A pointwise function behind a layer, in place, by the code that oneDNN generates for it.

PyTorch's gelu is this code, behind 33 thousand instructions of a call. Its exponential takes up to twice as many, and
its tanh 41 an element on vectors of 128 bits; on 256 bits 4, so that silu is better made of that, until oneDNN's own
became shorter. `python -m benchmarks.arm64.pointwise` counts them. oneDNN's relu gives 0 for NaN, and its hardswish
retires more than PyTorch's, so neither is here.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

import torch

from armopt.kernels import post_ops
from armopt.kernels.onednn import implementations, primitives
from armopt.kernels.onednn.primitives import DST, SCRATCHPAD_DESC, SRC, Api, Argument, Handle, OneDnnError

#: By the names of post_ops.
FUNCTIONS = frozenset({"gelu", "gelu_tanh", "sigmoid", "silu", "tanh"})
#: From this version on silu takes fewer instructions than one that is made of a tanh on vectors of 256 bits.
SHORT_SILU = (3, 12)


def takes(name: str, dtype: torch.dtype) -> bool:
    """Whether a function is run by oneDNN's code on this host: it has some, with right numbers, that is quicker."""
    api = primitives.api()
    if name not in FUNCTIONS or isinstance(api, str):
        return False
    of_tanh = name == "tanh" or (name == "silu" and dtype == torch.float32 and api.version < SHORT_SILU)
    return not (of_tanh and has_wide_vectors()) and is_right(api, name, dtype)


def is_quicker_apart(name: str) -> bool:
    """Whether a function of a result in FP32 takes less as PyTorch's operations, even where a layer's call takes it.

    Of silu, where it is made of a tanh (`python -m benchmarks.arm64.post_ops`).
    """
    return name == "silu" and has_wide_vectors() and not takes(name, torch.float32)


def has_wide_vectors() -> bool:
    """Whether PyTorch works on SVE's vectors of 256 bits here: its tanh of those takes a tenth of the instructions."""
    return torch.backends.cpu.get_cpu_capability() == "SVE256"


@functools.cache
def is_right(api: Api, name: str, dtype: torch.dtype) -> bool:
    """Whether there is code for a function that gives what PyTorch does, of NaN too."""
    given = torch.cat([torch.linspace(-20, 20, 83), torch.tensor([math.nan, -math.nan])]).to(dtype)
    found = given.clone()
    try:
        in_place(api, name, found)()
    except OneDnnError:
        return False
    expected = post_ops.apply(name, given.double(), None)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    return torch.allclose(found.double(), expected, rtol=near, atol=near / 10, equal_nan=True)


def in_place(api: Api, name: str, x: torch.Tensor) -> Callable[[], None]:
    """A call of a function on one tensor.

    Raises:
        OneDnnError: oneDNN has no code of its own for it on this host; also from the call, where it fails.
    """
    desc = api.strided(x.shape, x.stride(), x.dtype)
    execute, owned = Pointwise(api, name, desc).execution(api.memory(desc, x.data_ptr()))
    return functools.partial(_checked, execute, name, (owned, x))


def _checked(execute: Callable[[], int], name: str, owned: object) -> None:
    primitives.check(execute(), name)


class Pointwise:
    """A function of tensors with one descriptor."""

    def __init__(self, api: Api, name: str, desc: Handle) -> None:
        """Makes the primitive.

        Args:
            api: oneDNN.
            name: The function, one of :data:`FUNCTIONS`.
            desc: Of the tensors.

        Raises:
            OneDnnError: oneDNN has no code of its own for it on this host.
        """

        def is_generated(description: Handle) -> bool:
            return api.implementation(description).startswith("jit")

        attributes = api.attributes(fast_math=False, post_op="")
        chosen = implementations.choose(api, lambda: api.eltwise(name, desc, attributes), takes=is_generated)
        if chosen is None or api.size(api.part(chosen[0], SCRATCHPAD_DESC)):
            raise OneDnnError(f"no code for {name}")
        self._api, self._primitive = api, api.primitive(chosen[0])

    def execution(self, memory: Handle) -> tuple[Callable[[], int], object]:
        """A call of it on one memory, in place, which returns oneDNN's status; and what must live as long."""
        array = (Argument * 2)(Argument(SRC, memory.pointer), Argument(DST, memory.pointer))
        place = ctypes.c_void_p(ctypes.addressof(array))
        call = functools.partial(self._api.execute, self._primitive.pointer, self._api.stream.pointer, 2, place)
        return call, (array, memory, self._primitive)


def behind(first: Callable[[], int | None], second: Callable[[], int | None]) -> Callable[[], int | None]:
    """Two calls as one, which returns the status of the first that fails."""

    def execute() -> int | None:
        return first() or second()

    return execute
