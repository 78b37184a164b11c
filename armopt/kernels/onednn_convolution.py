"""What the kernels that call oneDNN's packed convolution share: packing, the call, and which post-ops it fuses.

Source of what fuses: `python -m benchmarks.arm64.post_ops`, and oneDNN's log on the aarch64 builds 2.10.0 and 2.13.0.
On FP32 activations the Compute Library takes relu and relu6 (almost free) and sigmoid; a residual add it takes too,
for 9 instructions an element where an in-place add retires 0.8; gelu costs more than apart, and hardswish and silu it
leaves to ``gemm:ref`` or to FP32. oneDNN's own SVE kernels take them all, by the same implementation: a depthwise 3x3
of 120 channels with gelu retires 0.95 of what both retire apart, with hardswish 0.93. But of NaN they make 0 in relu
and relu6 (FMAXNM), and silu is quicker apart where it can be made of a tanh. On BF16 activations any post-op gives
``ref:any`` on 2.10.0. What isn't fused runs behind the layer, in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from armopt.ir.records import Op, Site, Target
from armopt.kernels import post_ops
from armopt.kernels.base import Kernel, KernelCall
from armopt.kernels.geometry import output_size
from armopt.kernels.onednn import pointwise
from armopt.kernels.onednn.layer import Wanted

_mkldnn = torch.ops.mkldnn


#: Post-ops of dense products of up to two dimensions, which are the Compute Library's.
_DENSE = frozenset({"relu", "relu6", "sigmoid"})
#: Those of groups and volumes, which are oneDNN's own.
_GROUPED = frozenset({"sigmoid", "hardswish", "silu", "gelu", "gelu_tanh"})


def fuses(site: Site) -> bool:
    """Whether a call on FP32 activations takes the site's post-op, keeps NaN in it, and costs less so."""
    own = site.op == Op.CONV and (site.groups > 1 or len(site.shape) > 4)
    return site.post_op in (_GROUPED if own else _DENSE) and not pointwise.is_quicker_apart(site.post_op)


def pack_weight(
    weight: torch.Tensor,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: Sequence[int],
) -> torch.Tensor:
    """A convolution weight in the layout that oneDNN picks for this input shape; an opaque tensor."""
    packed: torch.Tensor = _mkldnn._reorder_convolution_weight(
        weight.contiguous(), list(padding), list(stride), list(dilation), groups, list(input_shape)
    )
    return packed


def emit_convolution(call: KernelCall, x: fx.Node, geometry: tuple[Any, ...]) -> fx.Node:
    """Inserts the packed convolution, with the post-op where the kernel fuses it.

    Args:
        call: The node to replace.
        x: Its input, with the dimensions of a convolution.
        geometry: padding, stride, dilation and groups.
    """
    post = post_ops.UNARY[call.site.post_op] if call.kernel.fuses(call.site) else None
    tail = (post.attribute, list(post.scalars), post.algorithm or "") if post else ("none", [], "")
    return call.call(_mkldnn._convolution_pointwise.default, x, call.weight, call.bias, *geometry, *tail)


def pack_convolution(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """Packs the weight of a convolution; one dimension is taken as two."""
    shape, padding, stride, dilation = site.shape, site.padding, site.stride, site.dilation
    if len(shape) == 3:
        weight, shape = weight.unsqueeze(2), (*shape[:2], 1, shape[2])
        padding, stride, dilation = (0, *padding), (1, *stride), (1, *dilation)
    return pack_weight(weight, padding, stride, dilation, site.groups, shape)


def emit_conv(call: KernelCall) -> fx.Node:
    """The call for a convolution of one, two or three dimensions."""
    site = call.site
    if len(site.shape) != 3:
        geometry = (list(site.padding), list(site.stride), list(site.dilation), site.groups)
        return call.with_post_op(emit_convolution(call, call.x, geometry))
    x = call.call(torch.ops.aten.unsqueeze.default, call.x, 2)
    geometry = ([0, *site.padding], [1, *site.stride], [1, *site.dilation], site.groups)
    y = call.call(torch.ops.aten.squeeze.dim, emit_convolution(call, x, geometry), 2)
    return call.with_post_op(y)


def pack_linear_as_convolution(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """Packs [N, K] as the weight of a 1x1 convolution over one image of `site.m` rows and one column."""
    n, k = weight.shape
    return pack_weight(weight.reshape(n, k, 1, 1), (0, 0), (1, 1), (1, 1), 1, (1, k, site.m, 1))


def emit_linear(call: KernelCall) -> fx.Node:
    """The call for a Linear as a 1x1 convolution: [*, K] -> [1, K, M, 1] -> [1, N, M, 1] -> [*, N].

    One image of M rows: the Compute Library pads each image to eight rows of a product, so M images of one pixel would
    do up to eight times the work.
    """
    y = emit_convolution(call, _as_image(call, call.x, call.site.k), ([0, 0], [1, 1], [1, 1], 1))
    if any(not isinstance(size, int) or size < 0 for size in call.shape):
        y.target = multiply_rows
    y = call.call(torch.ops.aten.permute.default, y, [0, 2, 3, 1])
    return call.with_post_op(call.call(torch.ops.aten.reshape.default, y, list(call.shape)))


def multiply_rows(image: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The packed convolution of [1, K, M, 1]; oneDNN takes no image without rows, as data may leave it."""
    if image.shape[2] == 0:
        return image.new_empty((1, weight.shape[0], 0, 1))
    y: torch.Tensor = _mkldnn._convolution_pointwise.default(image, weight, *rest)
    return y


def _as_image(call: KernelCall, x: fx.Node, channels: int) -> fx.Node:
    """[*, C] as [1, C, M, 1] in channels_last: a view where x is contiguous."""
    x = call.call(torch.ops.aten.reshape.default, x, [1, -1, 1, channels])
    return call.call(torch.ops.aten.permute.default, x, [0, 3, 1, 2])


def own_convolution(kernel: Kernel, site: Site) -> Wanted:
    """The primitive of a convolution; one dimension is taken as two."""
    flat = len(site.shape) == 3
    lead = (1,) if flat else ()
    outputs, channels, *filters = site.weight
    groups = (site.groups, outputs // site.groups) if site.groups > 1 else (outputs,)
    size = output_size(site.shape[2:], filters, site.stride, site.padding, site.dilation, False, [0] * len(filters))
    return Wanted(
        source=(*site.shape[:2], *lead, *site.shape[2:]),
        weight=(*groups, channels, *lead, *filters),
        result=(site.shape[0], outputs, *lead, *size),
        activations=kernel.activations,
        products=kernel.rounding.products,
        geometry=(
            (*lead, *site.stride),
            (*([0] * len(lead)), *(step - 1 for step in site.dilation)),
            (*([0] * len(lead)), *site.padding),
        ),
        post_op=site.post_op if kernel.fuses(site) else "",
    )


def own_linear(kernel: Kernel, site: Site) -> Wanted:
    """The primitive of a Linear, a convolution as in :func:`emit_linear`."""
    return Wanted(
        source=(1, site.k, site.m, 1),
        weight=(site.n, site.k, 1, 1),
        result=(1, site.n, site.m, 1),
        activations=kernel.activations,
        products=kernel.rounding.products,
        geometry=((1, 1), (0, 0), (0, 0)),
        post_op=site.post_op if kernel.fuses(site) else "",
    )


def refuses_linear(site: Site) -> str | None:
    """Sites that the Compute Library rejects or that are degenerate."""
    if site.op != Op.LINEAR:
        return f"covers linear, not {site.op}"
    if min(site.m, site.k, site.n) == 0:
        return "an empty product"
    if site.n == 1:
        return "out_features=1: the Compute Library rejects it"
    return None


#: Input channels in a group below which oneDNN answers with ``gemm:ref`` on aarch64.
LEAST_GROUP_CHANNELS = 16


def is_narrow_grouped(site: Site) -> bool:
    """Whether a convolution is grouped, not depthwise, and oneDNN has only a reference kernel for its groups."""
    if site.op != Op.CONV or site.transposed or site.groups == 1 or 0 in site.shape or 0 in site.weight:
        return False
    depthwise = site.weight[0] == site.groups and site.weight[1] == 1
    return not depthwise and site.weight[1] < LEAST_GROUP_CHANNELS


def refuses_dense_2d(site: Site) -> str | None:
    """Convolutions that reach the Compute Library in BF16: dense, one or two dimensions, not transposed."""
    if site.op != Op.CONV:
        return f"covers conv, not {site.op}"
    if site.transposed:
        return "a transposed convolution in BF16 is `ref` on aarch64"
    if site.groups > 1:
        return "a grouped convolution in BF16 is `ref:any` on aarch64 torch 2.10"
    if len(site.shape) > 4:
        return "a 3-d convolution in BF16 is `ref:any` on aarch64 torch 2.10"
    if 0 in site.shape or 0 in site.weight:
        return "an empty input"
    return None


def bf16_block(site: Site, target: Target) -> int:
    """Terms that the Compute Library sums in FP32 before it rounds to a BF16 result and goes on from there.

    Its interleaved GEMM splits K so that one block of the wider operand fills half of a 32 KiB L1 cache, then evenly.
    With BF16 results the running sum is kept in the result. The SVE kernel is 3 vectors of FP32 wide, the NEON one 12
    columns. NEON is taken where it pads so much less that its rate (31.62 terms a cycle against 39.90) is made up for,
    and where there are fewer output rows in the batch than filter rows, because the estimate is then zero for both.

    Source: the Compute Library's estimates for its BF16 fixed-format kernels; agrees with torch 2.10.0 on emulated
    Neoverse-V1 and N2 (tests/arm64/test_rounding.py).
    """
    if "asimd" not in target.isa_features:
        return 0
    filters = site.weight[2:]
    total = _up(site.weight[1], 4) * math.prod(filters)
    sve = 3 * target.vector_bits // 32 if "sve" in target.isa_features else 12
    few = len(filters) == 2 and site.shape[0] * _output_rows(site) < filters[0]
    width = 12 if few or _up(site.n, sve) / 39.90 > _up(site.n, 12) / 31.62 else sve
    most = 32 * 1024 // 2 // (2 * max(width, 8)) // 4 * 4
    return _up(-(-total // -(-total // most)), 4) if total > most else 0


def _output_rows(site: Site) -> int:
    geometry = (site.stride, site.padding, site.dilation, site.transposed, site.output_padding)
    return output_size(site.shape[2:], site.weight[2:], *geometry)[0]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
