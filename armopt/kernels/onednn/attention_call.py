"""One call of an attention: copies, products, masks and softmax, in memory that no other call uses meanwhile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from armopt.kernels.onednn.arguments import lies_as
from armopt.kernels.onednn.primitives import check


@dataclass(frozen=True, slots=True)
class Part:
    """The calls for heads that go together, and which of batch and heads these are."""

    multiply: Callable[[], int]
    softmax: Callable[[], int]
    weigh: Callable[[], int]
    which: tuple[slice, slice]


@dataclass(frozen=True, slots=True)
class Causal:
    """Hides from each query the keys behind it, whatever their scores are, NaN too.

    Attributes:
        kept: The bits of scores that stay: all or none.
        added: To them: nothing or minus infinity.
    """

    kept: torch.Tensor
    added: torch.Tensor

    @staticmethod
    def of(queries: int, keys: int) -> Causal:
        """That of so many: the first rows and columns of one for more, which all layers and sizes like it share."""
        whole = _causal(1 << (queries - 1).bit_length(), 1 << (keys - 1).bit_length())
        return Causal(whole.kept[:queries, :keys], whole.added[:queries, :keys])


@functools.lru_cache(maxsize=16)
def _causal(queries: int, keys: int) -> Causal:
    shows = torch.ones(queries, keys, dtype=torch.bool).tril()
    return Causal(shows.int().neg(), added(shows))


@dataclass(slots=True)
class Steps:
    """What a call of an attention needs of its own: no other call may use it meanwhile.

    Attributes:
        copies: Of query, key and value, each head's rows together; and the result so.
        scores: Of heads that go together.
        parts: The calls.
        like: A result without memory, to make others like it.
        scale: By what scores are multiplied.
        scales_query: Whether queries may be instead.
        causal: What hides keys in every call.
        mask: What is added to the scores in every call.
        kept: The result, where it has a place in the arena.
        lent: The result of this call, where its caller gave one that lies as results do.
    """

    copies: Sequence[torch.Tensor]
    scores: torch.Tensor
    parts: Sequence[Part]
    like: torch.Tensor
    scale: float
    scales_query: bool
    causal: Causal | None
    mask: torch.Tensor | None
    kept: torch.Tensor | None = None
    lent: torch.Tensor | None = None

    def lend(self, y: torch.Tensor | None) -> None:
        """Takes what the next result is to be, where it is as that lies; None where the call makes one."""
        self.lent = y if y is not None and lies_as(y, self.like) else None

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The result."""
        y = self.kept if self.lent is None else self.lent
        if y is None:
            y = torch.empty_like(self.like)
        if mask is None:
            mask = self.mask
        elif hides_a_row(mask):
            return y.copy_(_in_fp32(q, k, v, mask, self.scale))
        if mask is not None:
            mask = added(mask).expand(*self.like.shape[:2], *self.scores.shape[2:])
        query, key, value, result = self.copies
        query.copy_(q)
        key.copy_(k)
        value.copy_(v)
        if mask is None and self.scales_query:
            query.mul_(self.scale)
        for part in self.parts:
            check(part.multiply(), "attention")
            if mask is not None:
                part_of_mask = mask if len(self.parts) == 1 else mask[part.which]
                torch.add(part_of_mask, self.scores, alpha=self.scale, out=self.scores)
            elif not self.scales_query:
                self.scores.mul_(self.scale)
            if self.causal is not None:
                self.scores.view(torch.int32).bitwise_and_(self.causal.kept)
                self.scores.add_(self.causal.added)
            check(part.softmax(), "attention")
            check(part.weigh(), "attention")
        return y.copy_(result)


def hides_a_row(mask: torch.Tensor) -> bool:
    """Whether a row of a mask may hide all keys: of that PyTorch makes 0, and a softmax NaN."""
    shows = mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) != -math.inf
    return not bool(shows.all())


def added(mask: torch.Tensor) -> torch.Tensor:
    """What a mask adds to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape).masked_fill_(mask.logical_not(), -math.inf)


def _in_fp32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """By PyTorch."""
    mask = mask if mask.dtype == torch.bool else mask.float()
    return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, scale=scale)
