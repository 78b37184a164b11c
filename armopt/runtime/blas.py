"""A small Linear in FP32 on BLAS, without PyTorch in between.

``addmm`` copies the bias to where the result goes and calls BLAS's ``sgemm_``; so does this, with arguments that are
made once, where the result has a place in the arena; what reads it finds it there in each call. Without a bias
PyTorch's own way to BLAS, ``mm``, is shorter where the input is the caller's, which may lie elsewhere in each call.
`python -m benchmarks.arm64.blas_calls` counts the ways.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch

from armopt.ir.records import Site
from armopt.kernels import blas_fp32
from armopt.kernels.base import Kernel
from armopt.kernels.onednn import pointwise, primitives, symbols
from armopt.kernels.onednn.arguments import Arguments
from armopt.kernels.onednn.pointwise import Pointwise, behind
from armopt.kernels.onednn.workspaces import Workspace

#: Beyond so many bytes of result the product takes all the time, and rows of the bias would take memory.
_MOST_BYTES = 1 << 16


@functools.cache
def functions() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """BLAS's sgemm_ of this process's PyTorch and C's memcpy, whose arguments are not checked; None without them."""
    library = symbols.loaded()
    if library is None:
        return None
    try:
        found = [getattr(ctypes.CDLL(path), name) for path, name in ((library.path, "sgemm_"), (None, "memcpy"))]
    except (AttributeError, OSError):
        return None
    multiply, copy = (ctypes.CFUNCTYPE(None)(ctypes.cast(each, ctypes.c_void_p).value or 0) for each in found)
    return multiply, copy


class Product:
    """A Linear of fixed size; see `workspaces.Call`."""

    def __init__(
        self, rows: int, weight: torch.Tensor, bias: torch.Tensor | None, shape: Sequence[int], post_op: str = ""
    ) -> None:
        """Takes what does not change from call to call.

        Args:
            rows: Of the product.
            weight: [K, N], contiguous, in FP32.
            bias: [N], in FP32.
            shape: Of the result, as PyTorch has it.
            post_op: The pointwise function behind it, where oneDNN has code for it.
        """
        self._rows, self._weight, self._bias = rows, weight, bias
        self._image = None if bias is None else bias.detach().repeat(rows, 1)
        self._like = torch.empty(*shape)
        self._like.untyped_storage().resize_(0)
        self._behind = _behind(post_op, (rows, weight.shape[1]))
        self.post_op = post_op if self._behind else ""

    @property
    def packed(self) -> tuple[torch.Tensor, ...]:
        """See `workspaces.Call`."""
        return (self._weight,)

    @property
    def size(self) -> int:
        """See `workspaces.Call`."""
        return self._like.nbytes

    def prepare(self, threads: int) -> int:
        """It needs no scratchpad."""
        return 0

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> Arguments:
        """See `workspaces.Call`."""
        found = functions()
        assert found is not None
        multiply, copy = found
        k, n = self._weight.shape
        # of 64 bits a BLAS with integers of 32 reads the first half
        m_, n_, k_ = (ctypes.byref(ctypes.c_int64(size)) for size in (self._rows, n, k))
        one, beta = (ctypes.byref(ctypes.c_float(value)) for value in (1, self._image is not None))
        source, result, weight = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(self._weight.data_ptr())
        # rows are BLAS's columns: the transposed product, of transposed operands
        sizes = (ctypes.c_char_p(b"N"), ctypes.c_char_p(b"N"), n_, m_, k_)
        operands = (one, weight, n_, source, k_, beta, result, n_)
        execute: Callable[[], int | None] = functools.partial(multiply, *sizes, *operands)
        if self._image is not None:
            image = ctypes.c_void_p(self._image.data_ptr())
            # rows of the bias, and the product added to them
            execute = behind(functools.partial(copy, result, image, ctypes.c_size_t(self.size)), execute)
        owned: tuple[object, ...] = self._weight, self._image
        point = _point
        if self._behind is not None:
            api, desc, function = self._behind
            memory = api.memory(desc)
            second, others = function.execution(memory)
            execute, owned = behind(execute, second), (*owned, others)
            point = functools.partial(_point_both, result, functools.partial(api.set_data, memory.pointer))
        made = Arguments(execute, point, source, result, owned, torch.Tensor.contiguous, self._like)
        made.keep(place)
        return made

    def function(self, index: int) -> Callable[[Workspace, torch.Tensor], torch.Tensor]:
        """See `workspaces.Call`."""
        weight, bias, shape = self._weight, self._bias, self._like.shape
        size = self._rows * weight.shape[0] * weight.itemsize
        mine = bool(self.post_op)  # in every call by the same code, to the same bits

        def run(workspace: Workspace, x: torch.Tensor) -> torch.Tensor:
            arguments: Arguments = workspace.arguments[index]
            if x is not arguments.seen:
                if x.nbytes != size:
                    raise ValueError(f"expected {size} bytes, found {x.nbytes}")
                # PyTorch is quicker at making the result
                if not mine and arguments.kept is None and arguments.lent is None:
                    x = x.reshape(-1, weight.shape[0])
                    return (x.mm(weight) if bias is None else torch.addmm(bias, x, weight)).view(shape)
                if not x.is_contiguous():
                    x = x.contiguous()  # alive until the product is done
                arguments.take(x)
            return arguments.run()

        return run


def _behind(post_op: str, shape: Sequence[int]) -> tuple[primitives.Api, primitives.Handle, Pointwise] | None:
    """oneDNN's code for a function of results of a shape, and their descriptor; None where it has none."""
    api = primitives.api()
    if isinstance(api, str) or not pointwise.takes(post_op, torch.float32):
        return None
    desc = api.strided(shape, (shape[1], 1), torch.float32)
    return api, desc, Pointwise(api, post_op, desc)


def _point(pointer: ctypes.c_void_p, address: int) -> int:
    pointer.value = address
    return 0


def _point_both(result: ctypes.c_void_p, place: Callable[[int], int], pointer: ctypes.c_void_p, address: int) -> int:
    pointer.value = address
    return place(address) if pointer is result else 0


def product(
    kernel: Kernel,
    site: Site,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Sequence[int | None],
    *,
    is_given: bool,
) -> Product | None:
    """A layer of a kernel of BLAS as a product; None where it has no fixed size, is large, or PyTorch is as quick.

    Args:
        kernel: The kernel.
        site: The layer.
        weight: Packed by the kernel.
        bias: In FP32.
        shape: Of the result; None for a dynamic size.
        is_given: Whether its input is the caller's own.
    """
    fixed = [size for size in shape if size is not None]
    if kernel.emit is not blas_fp32.KERNEL.emit or len(fixed) < len(shape) or (is_given and bias is None):
        return None
    if not 0 < math.prod(fixed) * weight.itemsize <= _MOST_BYTES or site.k == 0 or functions() is None:
        return None
    return Product(math.prod(fixed[:-1]), weight, bias, fixed, site.post_op)
