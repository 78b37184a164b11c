"""Lays images whose channels come first out with their channels last: oneDNN takes a third of ATen's instructions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from armopt.kernels.onednn.primitives import DST, SRC, Api, Argument, Handle, check


class ChannelsLast:
    """A reorder of images of one shape; for one call at a time."""

    def __init__(self, api: Api, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> None:
        """Takes what images are laid out as. The reorder is made when the first is: most layers need none."""
        self._api, self._shape, self._strides, self._dtype = api, tuple(shape), tuple(strides), dtype
        self._memories: list[Handle] = []

    def _make(self) -> None:
        api, dtype = self._api, self._dtype
        plain = [math.prod(self._shape[i + 1 :]) for i in range(len(self._shape))]
        descs = api.strided(self._shape, plain, dtype), api.strided(self._shape, self._strides, dtype)
        self._primitive = api.primitive(api.reordering(*descs))
        self._memories = [api.memory(desc) for desc in descs]
        pairs = zip((SRC, DST), self._memories, strict=True)
        self._array = (Argument * 2)(*(Argument(which, memory.pointer) for which, memory in pairs))
        self._place = ctypes.c_void_p(ctypes.addressof(self._array))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of `x` whose channels are last."""
        if x.shape != self._shape:
            raise ValueError(f"expected {self._shape}, found {tuple(x.shape)}")
        y = torch.empty_strided(self._shape, self._strides, dtype=self._dtype)
        if not x.is_contiguous() or x.dtype != self._dtype:
            return y.copy_(x)
        if not self._memories:
            self._make()
        api = self._api
        for memory, tensor in zip(self._memories, (x, y), strict=True):
            check(api.set_data(memory, tensor.data_ptr()), "memory_set_data_handle")
        check(api.execute(self._primitive.pointer, api.stream.pointer, 2, self._place), "primitive_execute")
        return y
