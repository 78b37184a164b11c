"""Attention of dynamic size: primitives for each size, made when that is first met, and not too many of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from armopt.kernels.onednn.any_size import drop_first
from armopt.kernels.onednn.attention import Attention, Wanted, is_quicker
from armopt.kernels.onednn.attention_call import Steps
from armopt.kernels.onednn.primitives import OneDnnError, buffer
from armopt.kernels.onednn.workspaces import Workspace


@dataclass(slots=True)
class _Sizes:
    """What one call of a program at a time needs, for all its attention: one after another they work in one memory."""

    threads: int
    scratch: torch.Tensor
    known: dict[Wanted, Steps | None] = field(default_factory=dict)


class AnyAttention:
    """Attention of any size; see `workspaces.Call`."""

    packed: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    size = 0

    def __init__(
        self, planned: Attention, made: dict[Wanted, Attention | None], first: int, *, multiplies_bf16: bool
    ) -> None:
        """Takes what tells sizes apart.

        Args:
            planned: At the size that was planned for.
            made: What was made for other attention of the program; what is made here is added.
            first: The index of the program's first attention, whose arguments hold the memory of all.
            multiplies_bf16: Whether PyTorch's BLAS has a product in BF16.
        """
        self._planned, self._made, self._first = planned, made, first
        self._multiplies_bf16 = multiplies_bf16

    def prepare(self, threads: int) -> int:
        """Makes it at its planned size; returns the size of its scratchpad."""
        return self._planned.prepare(threads)

    def arguments(self, threads: int, scratch: torch.Tensor, place: torch.Tensor | None) -> _Sizes:
        """What one call at a time needs, of whatever size."""
        return _Sizes(threads, scratch)

    def function(self, index: int) -> Callable[..., torch.Tensor]:
        """A function of a workspace, of query, key and value, and of a mask."""
        first, at_planned = self._first, self._planned.wanted
        dtype, scale, is_causal = at_planned.dtype, at_planned.scale, at_planned.is_causal

        def run(
            workspace: Workspace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
        ) -> torch.Tensor:
            if not q.shape[:2] == k.shape[:2] == v.shape[:2]:  # spread, as one image over others
                return self._by_pytorch(q, k, v, mask)
            sizes: _Sizes = workspace.arguments[first]
            (batch, heads, queries, size), (keys, width) = q.shape, v.shape[2:]
            wanted = Wanted(batch, heads, queries, keys, size, width, dtype, scale, is_causal)
            try:
                steps = sizes.known[wanted]
            except KeyError:
                steps = self._meet(sizes, wanted)
            if steps is None:
                return self._by_pytorch(q, k, v, mask)
            return steps.run(q, k, v, mask)

        return run

    @torch.inference_mode(False)  # as the memory of a workspace is
    def _meet(self, sizes: _Sizes, wanted: Wanted) -> Steps | None:
        """The entry of a size that was not met in a workspace; None where PyTorch's takes less."""
        try:
            made = self._made[wanted]
        except KeyError:
            made = self._make(wanted)
            drop_first(self._made)
            self._made[wanted] = made
        steps = None
        if made is not None:
            need = made.prepare(sizes.threads)
            if need > sizes.scratch.numel() - buffer(0).numel():
                sizes.scratch = buffer(1 << (need - 1).bit_length())
                sizes.known.clear()  # with what they hold of the smaller memory
            steps = made.arguments(sizes.threads, sizes.scratch, None)
        drop_first(sizes.known)
        sizes.known[wanted] = steps
        return steps

    def _make(self, wanted: Wanted) -> Attention | None:
        if not wanted.has_any or not is_quicker(wanted, multiplies_bf16=self._multiplies_bf16):
            return None
        try:
            return self._planned.resized(wanted)
        except OneDnnError:
            return None

    def _by_pytorch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        wanted = self._planned.wanted
        how: dict[str, Any] = {"is_causal": wanted.is_causal, "scale": wanted.scale}
        if q.dtype == torch.float32 or self._multiplies_bf16:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **how)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        wide = q.float(), k.float(), v.float()
        return torch.nn.functional.scaled_dot_product_attention(*wide, mask, **how).to(q.dtype)
