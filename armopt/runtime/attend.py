"""Attention of a program by primitives of its own, where these give right numbers and take less than PyTorch's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import fx

from armopt.bundle.program import Program, Result
from armopt.ir import graph as g
from armopt.ir.bf16_flow import ATTENTION, operands
from armopt.kernels.onednn import primitives
from armopt.kernels.onednn.attention import Attention, Wanted, is_quicker
from armopt.kernels.onednn.attention_call import added, hides_a_row
from armopt.kernels.onednn.primitives import OneDnnError
from armopt.kernels.onednn.workspaces import Workspaces
from armopt.runtime import numbers

_DIMENSIONS = 4
#: Of results in BF16, whose probabilities are rounded too, and in FP32.
_MOST_APART = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
_PARAMETERS = [each.name for each in ATTENTION._schema.arguments]


@dataclass(frozen=True, slots=True)
class Planned:
    """What a node asks for.

    Attributes:
        wanted: The attention.
        mask: Dtype of a mask; None where there is none.
        constant: The mask, where it is the same in every call.
    """

    wanted: Wanted
    mask: torch.dtype | None = None
    constant: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """What a verdict depends on."""
        return json.dumps(["attention", *map(str, astuple(self.wanted)), str(self.mask)])


def planned(node: fx.Node, program: Program) -> Planned | None:
    """What a node of a program asks for; None where it is not of four dimensions and fixed size, or drops out."""
    given: dict[str, Any] = {**dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
    wanted = _wanted(given, [program.results.get(each.name) for each in operands(node)])
    if wanted is None or given.get("dropout_p") or given.get("enable_gqa"):
        return None
    mask = given.get("attn_mask")
    if mask is None:
        return Planned(wanted)
    constant = g.find_constant(program.graph_module, mask)
    found = program.results.get(mask.name) if constant is None else Result.of(constant)
    if found is None or len(found.shape) > _DIMENSIONS or wanted.is_causal:
        return None
    constant = constant if program.is_fixed else None  # which may be spread over another number of images
    return None if constant is not None and hides_a_row(constant) else Planned(wanted, found.dtype, constant)


def _wanted(given: Mapping[str, Any], results: Sequence[Result | None]) -> Wanted | None:
    """The sizes of attention by its arguments and what its query, key and value are."""
    if not all(map(_is_fit, results)):
        return None
    query, key, value = (each for each in results if each is not None)
    (batch, heads, queries, size), (*_, keys, width) = query.shape, value.shape
    if key.shape != (batch, heads, keys, size) or value.shape[:2] != (batch, heads) or value.dtype != query.dtype:
        return None
    scale = given.get("scale")
    scale = size**-0.5 if scale is None else float(scale)
    return Wanted(batch, heads, queries, keys, size, width, query.dtype, scale, bool(given.get("is_causal")))


def _is_fit(result: Result | None) -> bool:
    return (
        result is not None
        and len(result.shape) == _DIMENSIONS
        and result.dtype in _MOST_APART
        and math.prod(result.shape) > 0
    )


def make(planned: Planned, *, multiplies_bf16: bool, of_any_size: bool = False) -> Attention | None:
    """The attention; None where oneDNN has only references for it on this host, or PyTorch's takes less.

    Args:
        planned: What a node asks for.
        multiplies_bf16: Whether PyTorch's BLAS has a product in BF16.
        of_any_size: Whether it stands for other sizes too, for which PyTorch's may take more.
    """
    api, wanted = primitives.api(), planned.wanted
    if isinstance(api, str) or not (of_any_size or is_quicker(wanted, multiplies_bf16=multiplies_bf16)):
        return None
    try:
        return Attention(api, wanted, planned.constant)
    except OneDnnError:
        return None


def refusal(planned: Planned, made: Attention) -> str | None:
    """Why an attention is not to be trusted; None where its numbers are right, as FP64 has them."""
    wanted = planned.wanted
    rows = (wanted.queries, wanted.size), (wanted.keys, wanted.size), (wanted.keys, wanted.width)
    q, k, v = (
        # rolled, so that no row of one is a row of another
        numbers.values((wanted.batch, wanted.heads, *shape)).flatten().roll(at).view(wanted.batch, wanted.heads, *shape)
        for at, shape in enumerate(rows)
    )
    q, k, v = (each.to(wanted.dtype) for each in (q, k, v))
    given = _mask(planned) if planned.constant is None else None
    workspaces = Workspaces()
    workspaces.layers.append(made)
    call, workspace = made.function(0), workspaces.take()
    mask = planned.constant if given is None else given
    try:
        error = _distance(wanted, (q, k, v), call(workspace, q, k, v, given), mask)
        if error <= _MOST_APART[wanted.dtype]:
            k[0, 0, -1, 0] = math.nan
            error = _distance(wanted, (q, k, v), call(workspace, q, k, v, given), mask)
    except OneDnnError as failed:
        return f"fails on this build: {failed}"
    return None if error <= _MOST_APART[wanted.dtype] else f"gives wrong numbers: off by {error:.1e}"


def _mask(planned: Planned) -> torch.Tensor | None:
    """One that hides the first key, where there are others."""
    if planned.mask is None:
        return None
    shows = torch.ones(planned.wanted.queries, planned.wanted.keys, dtype=torch.bool)
    shows[:, 0] = planned.wanted.keys == 1
    return shows if planned.mask == torch.bool else added(shows)


def _distance(
    wanted: Wanted, tensors: tuple[torch.Tensor, ...], found: torch.Tensor, mask: torch.Tensor | None
) -> float:
    """How far a result is off, relatively, in three rows of the first head and the last; infinite where NaN differ."""
    picked = sorted({0, wanted.queries // 2, wanted.queries - 1})
    worst = 0.0
    for head in (0, -1):
        q, k, v = (each[head, head].double() for each in tensors)
        scores = q[picked] @ k.T * wanted.scale
        if wanted.is_causal:
            scores = scores.masked_fill(torch.tensor(picked)[:, None] < torch.arange(wanted.keys), -math.inf)
        if mask is not None:
            scores = scores + added(mask).expand(wanted.batch, wanted.heads, wanted.queries, -1)[head, head, picked]
        exact, given = scores.softmax(-1) @ v, found[head, head, picked].double()
        if not torch.equal(given.isnan(), exact.isnan()):
            return math.inf
        distance = (given - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp_min(1e-30)
        worst = max(worst, float(distance))
    return worst
