"""Calls that others published times of, prepared on the emulated side. Each takes what its release of PyTorch has."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

Call = Callable[[], Any]


def _constant(make: Callable[[], nn.Module], *inputs: torch.Tensor) -> Call:
    """A call of a model whose weights are one constant: no kernel looks at them, and random ones take minutes."""
    drawn = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *args, **kwargs: tensor for name in drawn}):
        model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2**-6)
    return lambda: model(*inputs)


def mlp(batch: int) -> Call:
    """The tutorial's model and input."""

    def make() -> nn.Module:
        layers = (nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 10))
        return nn.Sequential(nn.Flatten(), *layers)

    return _constant(make, torch.full((batch, 64, 64), 0.5))


def mlp_layers(batch: int) -> Call:
    """The three Linear layers of the tutorial's model alone."""
    calls = [linear(batch, k, n) for k, n in ((4096, 4096), (4096, 11008), (11008, 10))]
    return lambda: [call() for call in calls]


def _filled(shape: Sequence[int], dtype: str = "float32", *, transposed: bool = False) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if transposed:
        return torch.full(tuple(shape)[::-1], 0.5, dtype=kind).t()
    return torch.full(tuple(shape), 0.5, dtype=kind)


def matmul(m: int, k: int, n: int, dtype: str = "float32", transposed: str = "") -> Call:
    """``a @ b``; the operands named in `transposed` lie the other way."""
    a = _filled((m, k), dtype, transposed="a" in transposed)
    b = _filled((k, n), dtype, transposed="b" in transposed)
    return lambda: torch.matmul(a, b)


def matmul_abt(m: int, k: int, n: int) -> Call:
    """``a @ b.t()``, transposed in every call as a program has it."""
    a, b = _filled((m, k)), _filled((n, k))
    return lambda: torch.matmul(a, b.t())


def blas_matmul(m: int, k: int, n: int, dtype: str = "float32") -> Call:
    """``a @ b`` without oneDNN: by BLAS."""
    torch.backends.mkldnn.set_flags(False)
    return matmul(m, k, n, dtype)


def bmm(batch: int, m: int, k: int, n: int, dtype: str = "float32") -> Call:
    """A batch of products."""
    a, b = _filled((batch, m, k), dtype), _filled((batch, k, n), dtype)
    return lambda: torch.bmm(a, b)


def linear(m: int, k: int, n: int) -> Call:
    """A Linear in FP32."""
    return _constant(lambda: nn.Linear(k, n), _filled((m, k)))


def conv(shape: Sequence[int], out: int, filters: int, padding: int = 0) -> Call:
    """A convolution in FP32, of so many dimensions as the shape has behind batch and channels."""
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    return _constant(lambda: kind(shape[1], out, filters, padding=padding), _filled(shape))


def pointwise(name: str, shape: Sequence[int], dtype: str = "float32") -> Call:
    """``torch.NAME(x)``; of `add` with a second tensor."""
    x = _filled(shape, dtype)
    function = getattr(torch, name)
    return (lambda: function(x, x)) if name == "add" else lambda: function(x)


def clamp_min(shape: Sequence[int]) -> Call:
    """ReLU, as PyTorch's Linear models run it."""
    x = torch.full(tuple(shape), 0.5)
    return lambda: torch.clamp_min(x, 0)


def normalized(kind: str, shape: Sequence[int]) -> Call:
    """LayerNorm over all but the batch, BatchNorm in eval mode, or softmax over the last dimension."""
    x = torch.full(tuple(shape), 0.5)
    if kind == "softmax":
        return lambda: functional.softmax(x, -1)
    if kind == "layer_norm":
        return _constant(lambda: nn.LayerNorm(tuple(shape[1:])), x)
    return _constant(lambda: nn.BatchNorm1d(shape[1]), x)


def vision(name: str, batch: int, size: int = 224, dtype: str = "float32") -> Call:
    """A model of torchvision in eager mode."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    from torchvision.models import get_model

    return _constant(lambda: get_model(name, weights=None), _filled((batch, 3, size, size)))


def transformer(name: str, batch: int, tokens: int) -> Call:
    """A language model of transformers in its default configuration, on tokens alone; returns logits."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision_if_installed()
    import transformers

    model = getattr(transformers, name)
    return _constant(lambda: model(model.config_class()), torch.full((batch, tokens), 7))


def onednn_matmul(m: int, k: int, n: int, implementation: str, dtype: str = "float32") -> Call:
    """A matmul primitive as oneDNN's own benchmark runs it: made once, its weight in the layout that it asks for."""
    from armopt.kernels.onednn import primitives, symbols

    api, kind = primitives.api(), getattr(torch, dtype)
    library = symbols.loaded()
    if isinstance(api, str) or library is None:
        raise RuntimeError(f"oneDNN can't be reached: {api}")
    name = "dnnl_matmul_primitive_desc_create"
    create = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 7)(symbols.addresses(library, [name])[name])
    a, c = (api.strided(shape, (shape[1], 1), kind) for shape in ((m, k), (m, n)))
    attributes = api.attributes(fast_math=False, post_op="")
    at = ctypes.c_void_p()
    primitives.check(create(ctypes.byref(at), api.engine, a, api.anyhow((k, n), kind), None, c, attributes), "matmul")
    description = primitives.Handle(at, api._destroy["primitive_desc"])
    return _executed(api, description, implementation, {})


def onednn_conv(
    shape: Sequence[int],
    out: int,
    filters: int,
    implementation: str,
    stride: Sequence[int] = (1, 1),
    padding: int = 0,
    groups: int = 1,
    dtype: str = "float32",
) -> Call:
    """A convolution primitive as oneDNN's own benchmark runs it: each tensor in the layout that it asks for.

    Depthwise ones have no bias there, others have one.
    """
    from armopt.kernels.onednn import primitives

    api, kind = primitives.api(), getattr(torch, dtype)
    if isinstance(api, str):
        raise RuntimeError(f"oneDNN can't be reached: {api}")
    batch, channels, height, width = shape
    sides = [(side + 2 * padding - filters) // step + 1 for side, step in zip((height, width), stride, strict=True)]
    grouped = (groups, out // groups) if groups > 1 else (out,)
    added = api.strided((out,), (1,), kind) if groups == 1 else None
    weight = (*grouped, channels // groups, filters, filters)
    source, weights, result = (api.anyhow(each, kind) for each in (shape, weight, (batch, out, *sides)))
    geometry, attributes = (stride, (0, 0), (padding, padding)), api.attributes(fast_math=False, post_op="")
    description = api.convolution((source, weights, added, result), geometry, attributes)
    return _executed(api, description, implementation, {primitives.BIAS: added} if added else {})


def _executed(api: Any, description: Any, implementation: str, given: Mapping[int, Any]) -> Call:
    """A call of the primitive with the implementation whose name begins so; its other tensors have given layouts."""
    from armopt.kernels.onednn import primitives as p

    offered = [api.implementation(description)]
    while not offered[-1].startswith(implementation):
        if not api.advance(description):
            raise RuntimeError(f"oneDNN offers {', '.join(offered)}, not {implementation}")
        offered.append(api.implementation(description))
    parts = {p.SRC: 129, p.WEIGHTS: p.WEIGHTS_DESC, p.DST: 133, p.SCRATCHPAD: p.SCRATCHPAD_DESC}
    descriptors = {argument: api.part(description, part) for argument, part in parts.items()} | given
    room = {argument: p.buffer(api.size(found)).fill_(0) for argument, found in descriptors.items()}
    memories = {each: api.memory(found, p.aligned(room[each])) for each, found in descriptors.items()}
    arguments = (p.Argument * len(memories))(*(p.Argument(a, memory.pointer) for a, memory in memories.items()))
    primitive = api.primitive(description)
    kept = (room, memories, primitive)

    def call() -> Any:
        p.check(api.execute(primitive.pointer, api.stream.pointer, len(arguments), ctypes.byref(arguments)), "execute")
        return kept

    return call
