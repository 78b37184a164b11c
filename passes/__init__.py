"""The passes, one per file, and their order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from armopt.ir.records import PassResult, Plan
from armopt.passes.canonicalise_activation import CanonicaliseActivation
from armopt.passes.canonicalise_contraction import CanonicaliseContraction
from armopt.passes.canonicalise_conv import CanonicaliseConv
from armopt.passes.canonicalise_linear import CanonicaliseLinear
from armopt.passes.canonicalise_split import CanonicaliseSplit
from armopt.passes.convert_pixel_conv import ConvertPixelConv
from armopt.passes.convert_transposed_conv import ConvertTransposedConv
from armopt.passes.convert_volume_conv import ConvertVolumeConv
from armopt.passes.fill_empty import FillEmpty
from armopt.passes.fold_batch_norm import FoldBatchNorm
from armopt.passes.fold_constants import FoldConstants
from armopt.passes.fold_stride import FoldStride
from armopt.passes.fuse_attention import FuseAttention
from armopt.passes.fuse_pointwise import FusePointwise
from armopt.passes.keep_strides import KeepStrides
from armopt.passes.merge_projections import MergeProjections
from armopt.passes.merge_shortcut import MergeShortcut
from armopt.passes.pack_conv import PackConv
from armopt.passes.pack_embedding import PackEmbedding
from armopt.passes.pack_linear import PackLinear
from armopt.passes.propagate_bf16 import PropagateBf16
from armopt.passes.relax_views import RelaxViews
from armopt.passes.remove_identities import RemoveIdentities
from armopt.passes.restore_rows import RestoreRows
from armopt.passes.split_experts import SplitExperts
from armopt.passes.split_recurrence import SplitRecurrence

Pass = Callable[[fx.GraphModule], PassResult]

#: What is true whatever the shapes: runs once, before the plan is made.
PREPARE: tuple[Pass, ...] = (
    KeepStrides(),
    RemoveIdentities(),
    FillEmpty(),
    RelaxViews(),
    CanonicaliseSplit(),
    FoldConstants(),
    FuseAttention(),
    SplitRecurrence(),
    SplitExperts(),
    CanonicaliseContraction(),
    CanonicaliseLinear(),
    RestoreRows(),
    CanonicaliseConv(),
    CanonicaliseActivation(),
    FoldBatchNorm(),
    FusePointwise(),
    ConvertTransposedConv(),
    ConvertVolumeConv(),
    ConvertPixelConv(),
    MergeShortcut(),
    FoldStride(),
    MergeProjections(),
)


#: What carries out a plan, in order: see :func:`lower`.
LOWER = (PackLinear, PackConv, PackEmbedding, PropagateBf16)


def lower(plan: Plan, rounded: dict[str, torch.Tensor]) -> tuple[Pass, ...]:
    """What carries out one plan: runs once for each bucket, on a copy. Plans of one model share `rounded`."""
    decisions = {decision.node: decision for decision in plan.decisions}
    packing = (PackLinear(decisions, rounded), PackConv(decisions, rounded))
    return (*packing, *((PackEmbedding(rounded, plan.pinned),) if plan.target.bf16 else ()), PropagateBf16())
