"""oneDNN's C API, version 3: thin handles that are destroyed with the Python objects that own them.

Names and numbers are those of oneDNN's dnnl_types.h; they are the same in all of version 3. A call of C through ctypes
releases Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from armopt.kernels.onednn import symbols

#: DNNL_ARG_*: which tensor of a primitive a memory is.
SRC, DST, WEIGHTS, BIAS, SCRATCHPAD = 1, 17, 33, 41, 80
#: dnnl_query_*: descriptors of a primitive's tensors.
SRC_DESC, WEIGHTS_DESC, DST_DESC, SCRATCHPAD_DESC = 129, 131, 133, 136
_IMPLEMENTATION, _DATA_TYPE = 8, 258
_VERSION = 3
_CPU, _IN_ORDER, _USER, _ANY = 1, 1, 1, 1
_FORWARD_INFERENCE, _DIRECT, _SOFTMAX = 96, 1, 0x30000
_STATUS = ("success", "out of memory", "invalid arguments", "unimplemented", "last implementation reached")
_DTYPES = {torch.bfloat16: 2, torch.float32: 3}
#: dnnl_eltwise_* with alpha and beta, by the names of post_ops.
ELTWISE = {
    "relu": (0x20, 0.0, 0.0),
    "tanh": (0x21, 0.0, 0.0),
    "sigmoid": (0x29, 0.0, 0.0),
    "gelu_tanh": (0x2B, 0.0, 0.0),
    "silu": (0x2C, 1.0, 0.0),
    "relu6": (0x2E, 0.0, 6.0),
    "gelu": (0x31, 0.0, 0.0),
    "hardswish": (0x34, 1 / 6, 1 / 2),
}
#: dnnl_fpmath_mode_*.
_STRICT, _BF16 = 0, 1
_ALIGNMENT = 64

_Dims = c.c_int64 * 12
_P, _OUT, _INT, _DIMS = c.c_void_p, c.POINTER(c.c_void_p), c.c_int, c.POINTER(c.c_int64)
_CREATE: dict[str, tuple[Any, ...]] = {
    "engine_create": (_OUT, _INT, c.c_size_t),
    "stream_create": (_OUT, _P, c.c_uint),
    "memory_desc_create_with_strides": (_OUT, _INT, _DIMS, _INT, _DIMS),
    "memory_desc_create_with_tag": (_OUT, _INT, _DIMS, _INT, _INT),
    "memory_create": (_OUT, _P, _P, _P),
    "primitive_desc_clone": (_OUT, _P),
    "post_ops_create": (_OUT,),
    "primitive_attr_create": (_OUT,),
    "primitive_create": (_OUT, _P),
    "reorder_primitive_desc_create": (_OUT, _P, _P, _P, _P, _P),
    "convolution_forward_primitive_desc_create": (_OUT, _P, _INT, _INT, *[_P] * 4, *[_DIMS] * 4, _P),
    "inner_product_forward_primitive_desc_create": (_OUT, _P, _INT, *[_P] * 4, _P),
    "eltwise_forward_primitive_desc_create": (_OUT, _P, _INT, _INT, _P, _P, c.c_float, c.c_float, _P),
    "matmul_primitive_desc_create": (_OUT, *[_P] * 6),
    "softmax_forward_primitive_desc_create": (_OUT, _P, _INT, _INT, _P, _P, _INT, _P),
}
_CALLS: dict[str, tuple[Any, ...]] = {
    "memory_set_data_handle": (_P, _P),
    "primitive_attr_set_fpmath_mode": (_P, _INT),
    "primitive_attr_set_scratchpad_mode": (_P, _INT),
    "primitive_attr_set_post_ops": (_P, _P),
    "post_ops_append_eltwise": (_P, _INT, c.c_float, c.c_float),
    "primitive_desc_next_impl": (_P,),
    "primitive_desc_query": (_P, _INT, _INT, _P),
    "memory_desc_query": (_P, _INT, _P),
    "memory_desc_get_blob": (_P, _P, _P),
    "primitive_execute": (_P, _P, _INT, _P),
}
_VALUES: dict[str, tuple[Any, ...]] = {
    "primitive_desc_query_md": (_P, _P, _INT, _INT),
    "memory_desc_get_size": (c.c_size_t, _P),
    "version": (c.POINTER(_INT),),
}
_DESTROY = ("engine", "stream", "memory_desc", "memory", "post_ops", "primitive_attr", "primitive", "primitive_desc")


class OneDnnError(RuntimeError):
    """oneDNN refused a call."""


class Argument(c.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = [("arg", c.c_int), ("memory", c.c_void_p)]


class Handle:
    """An object of oneDNN's, destroyed with this one."""

    __slots__ = ("_as_parameter_", "_destroy")

    def __init__(self, pointer: c.c_void_p, destroy: Callable[[c.c_void_p], int]) -> None:
        self._as_parameter_ = pointer
        self._destroy = destroy

    def __del__(self) -> None:
        self._destroy(self._as_parameter_)

    @property
    def pointer(self) -> c.c_void_p:
        """Where it is; valid as long as this lives."""
        return self._as_parameter_


@dataclass(frozen=True, slots=True)
class View:
    """A descriptor that a primitive's descriptor owns; alive as long as that."""

    owner: Handle
    _as_parameter_: int


class Api:
    """The functions, with the one engine and stream of this process.

    Attributes:
        version: Of oneDNN.
    """

    def __init__(self, addresses: Callable[[str], int]) -> None:
        def function(name: str, returns: Any, *types: Any) -> Any:
            return c.CFUNCTYPE(returns, *types)(addresses(f"dnnl_{name}"))

        self._values = {name: function(name, *types) for name, types in _VALUES.items()}
        self.version = tuple(self._values["version"]()[0:3])
        if self.version[0] != _VERSION:
            raise OneDnnError(f"oneDNN is version {'.'.join(map(str, self.version))}, known is {_VERSION}")
        self._functions = {name: function(name, _INT, *types) for name, types in (_CREATE | _CALLS).items()}
        self._destroy = {kind: function(f"{kind}_destroy", _INT, _P) for kind in _DESTROY}
        #: Unchecked, for calls of layers: pointers to primitive and stream, number of arguments, a pointer to them ->
        #: status. Types that are declared are asked of each argument, in each call.
        self.execute = c.CFUNCTYPE(_INT)(addresses("dnnl_primitive_execute"))
        #: Unchecked: memory, address -> status.
        self.set_data = self._functions["memory_set_data_handle"]
        self.engine = self._new("engine", "engine_create", _CPU, 0)
        self.stream = self._new("stream", "stream_create", self.engine, _IN_ORDER)

    def _call(self, name: str, *args: Any) -> None:
        check(self._functions[name](*args), name)

    def _new(self, kind: str, create: str, *args: Any) -> Handle:
        at = c.c_void_p()
        self._call(create, c.byref(at), *args)
        return Handle(at, self._destroy[kind])

    def strided(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Handle:
        """The descriptor of a tensor that lies so in memory."""
        create, dims = "memory_desc_create_with_strides", (len(shape), _Dims(*shape), _DTYPES[dtype], _Dims(*strides))
        return self._new("memory_desc", create, *dims)

    def anyhow(self, shape: Sequence[int], dtype: torch.dtype) -> Handle:
        """The descriptor of a tensor whose layout the implementation chooses."""
        return self._new("memory_desc", "memory_desc_create_with_tag", len(shape), _Dims(*shape), _DTYPES[dtype], _ANY)

    def size(self, desc: Handle | View) -> int:
        """Bytes that a tensor with this descriptor takes."""
        return int(self._values["memory_desc_get_size"](desc))

    def key(self, desc: Handle | View) -> bytes:
        """What tells layouts apart: equal descriptors have equal keys."""
        size = c.c_size_t()
        self._call("memory_desc_get_blob", None, c.addressof(size), desc)
        blob = c.create_string_buffer(size.value)
        self._call("memory_desc_get_blob", c.addressof(blob), c.addressof(size), desc)
        return blob.raw

    def is_bf16(self, desc: Handle | View) -> bool:
        """Whether a tensor with this descriptor holds BF16."""
        dtype = c.c_int()
        self._call("memory_desc_query", desc, _DATA_TYPE, c.addressof(dtype))
        return dtype.value == _DTYPES[torch.bfloat16]

    def attributes(self, *, fast_math: bool, post_op: str) -> Handle:
        """Whether FP32 is multiplied in BF16, whatever the environment says, and one pointwise function or none."""
        attributes = self._new("primitive_attr", "primitive_attr_create")
        self._call("primitive_attr_set_fpmath_mode", attributes, _BF16 if fast_math else _STRICT)
        self._call("primitive_attr_set_scratchpad_mode", attributes, _USER)
        if post_op:
            chain = self._new("post_ops", "post_ops_create")
            self._call("post_ops_append_eltwise", chain, *ELTWISE[post_op])
            self._call("primitive_attr_set_post_ops", attributes, chain)
        return attributes

    def convolution(
        self, tensors: Sequence[Handle | None], geometry: Sequence[Sequence[int]], attributes: Handle
    ) -> Handle:
        """The descriptor of a convolution: of source, weight, bias and result; stride, dilation less 1 and padding."""
        stride, dilation, padding = (_Dims(*values) for values in geometry)
        how = (self.engine, _FORWARD_INFERENCE, _DIRECT)
        create = "convolution_forward_primitive_desc_create"
        return self._new("primitive_desc", create, *how, *tensors, stride, dilation, padding, padding, attributes)

    def inner_product(self, tensors: Sequence[Handle | None], attributes: Handle) -> Handle:
        """The descriptor of a product: of source, weight, bias and result."""
        create = "inner_product_forward_primitive_desc_create"
        return self._new("primitive_desc", create, self.engine, _FORWARD_INFERENCE, *tensors, attributes)

    def eltwise(self, name: str, desc: Handle, attributes: Handle) -> Handle:
        """The descriptor of a pointwise function, from tensors with a descriptor to such."""
        algorithm, *scalars = ELTWISE[name]
        create, how = "eltwise_forward_primitive_desc_create", (self.engine, _FORWARD_INFERENCE, algorithm)
        return self._new("primitive_desc", create, *how, desc, desc, *scalars, attributes)

    def matmul(self, tensors: Sequence[Handle], attributes: Handle) -> Handle:
        """The descriptor of a product of matrices, many at once: of source, weight and result."""
        source, weight, result = tensors
        return self._new(
            "primitive_desc", "matmul_primitive_desc_create", self.engine, source, weight, None, result, attributes
        )

    def softmax(self, source: Handle, result: Handle, axis: int, attributes: Handle) -> Handle:
        """The descriptor of a softmax along an axis."""
        create, how = "softmax_forward_primitive_desc_create", (self.engine, _FORWARD_INFERENCE, _SOFTMAX)
        return self._new("primitive_desc", create, *how, source, result, axis, attributes)

    def implementation(self, description: Handle) -> str:
        """Who does the arithmetic, as oneDNN names it."""
        text = c.c_char_p()
        self._call("primitive_desc_query", description, _IMPLEMENTATION, 0, c.addressof(text))
        return (text.value or b"").decode(errors="replace")

    def clone(self, description: Handle) -> Handle:
        """A copy, at the same implementation."""
        return self._new("primitive_desc", "primitive_desc_clone", description)

    def advance(self, description: Handle) -> bool:
        """Goes on to the next implementation; False where there is none."""
        return bool(self._functions["primitive_desc_next_impl"](description) == 0)

    def part(self, description: Handle, which: int) -> View:
        """The descriptor of one of a primitive's tensors."""
        at = self._values["primitive_desc_query_md"](description, which, 0)
        if not at:
            raise OneDnnError("primitive_desc_query_md: nothing")
        return View(description, at)

    def primitive(self, description: Handle) -> Handle:
        """What runs."""
        return self._new("primitive", "primitive_create", description)

    def memory(self, desc: Handle | View, address: int | None = None) -> Handle:
        """A tensor with this descriptor at an address, or at one that is given later."""
        return self._new("memory", "memory_create", desc, self.engine, address)

    def reordering(self, given: Handle | View, wanted: Handle | View) -> Handle:
        """The descriptor of a reorder."""
        create = "reorder_primitive_desc_create"
        return self._new("primitive_desc", create, given, self.engine, wanted, self.engine, None)

    def reorder(self, given: Handle | View, address: int, wanted: Handle | View) -> torch.Tensor:
        """The tensor with the descriptor `given` at an address, laid out as another says, from :func:`aligned` on."""
        packed = buffer(self.size(wanted))
        description = self.reordering(given, wanted)
        memories = self.memory(given, address), self.memory(wanted, aligned(packed))
        arguments = (Argument * 2)(*(Argument(arg, m.pointer) for arg, m in zip((SRC, DST), memories, strict=True)))
        self._call("primitive_execute", self.primitive(description), self.stream, 2, c.addressof(arguments))
        return packed


def aligned(buffer: torch.Tensor) -> int:
    """The first address in a buffer of bytes at which vectors are loaded best."""
    return (buffer.data_ptr() + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def buffer(size: int) -> torch.Tensor:
    """Bytes, with room to begin at :func:`aligned`."""
    return torch.empty(size + _ALIGNMENT, dtype=torch.uint8)


def check(status: int, what: str) -> None:
    """Raises what a status says.

    Raises:
        OneDnnError: It isn't success.
    """
    if status:
        raise OneDnnError(f"{what}: {_STATUS[status] if 0 < status < len(_STATUS) else f'status {status}'}")


@functools.cache
def api() -> Api | str:
    """The functions of this process's oneDNN, or why they can't be had."""
    library = symbols.loaded()
    if library is None:
        return f"{symbols.LIBRARY} is not loaded"
    names = (*_CREATE, *_CALLS, *_VALUES, *(f"{kind}_destroy" for kind in _DESTROY))
    found = symbols.addresses(library, [f"dnnl_{name}" for name in names])
    if not found:
        return f"{library.path} has no symbols of oneDNN's C API"
    try:
        return Api(found.__getitem__)
    except OneDnnError as error:
        return str(error)
