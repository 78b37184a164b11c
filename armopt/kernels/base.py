"""What a kernel is: data plus how it packs, how it calls, and how it rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from armopt.ir.records import Backend, Layout, Op, Precision, Site, Target
from armopt.kernels import post_ops
from armopt.kernels.examples import Example
from armopt.kernels.onednn import pointwise
from armopt.kernels.onednn.layer import Wanted

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a kernel rounds; this alone makes its portable twin.

    `products` is what the multiplier sees of the activations, `weights` the dtype
    that weights are stored in.
    """

    products: torch.dtype
    weights: torch.dtype

    def operand(self, x: torch.Tensor) -> torch.Tensor:
        """Activations as the multiplier sees them, widened to FP32."""
        return x.to(self.products).float()


class Use(StrEnum):
    """Who chooses a kernel: a policy as it plans, a load where the planned kernel can't be had, repair."""

    PLAN = "plan"
    FALLBACK = "fallback"
    REPAIR = "repair"


def whole_sum(site: Site, target: Target) -> int:
    """A sum that stays in FP32 to the end."""
    return 0


def fuses_nothing(site: Site) -> bool:
    """A call without a post-op."""
    return False


def as_it_is(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """A weight as its primitive has it already."""
    return weight


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """One way to call a backend, and all that is said of it elsewhere.

    Attributes:
        name: As plans, graphs and reports have it.
        op: The operation it covers.
        backend: Whose code does the arithmetic.
        activations: Dtype of input and output.
        rounding: See :class:`Rounding`.
        covers: The layers it is for, in a few words.
        summary: What runs, in one line.
        refuses: Why it can't take a site; None where it can. Pure.
        pack: Weight in its dtype and site -> the weight as the call wants it. Runs once, on the host: packed_weight.
        emit: Inserts the call in front of a node of armopt::linear or armopt::conv; returns the node with the result.
        layout: Of the activations it works on.
        uses: Who chooses it.
        fast_math: Whether without a primitive of its own it needs DNNL_DEFAULT_FPMATH_MODE=BF16, read when oneDNN is
            first used.
        stand_in: Whose code runs where its own primitive can't be had; `backend`'s where nothing is said.
        beats_bf16: Whether it can cost less than kernels with BF16 weights, so that plans compare it with them.
        fuses: Whether a site's post-op is part of the call on this host.
        own: Of the kernel and a site, the primitive that takes the place of the call where this build of
            oneDNN lets it be made; None for a kernel that has none. Pure.
        arrange: Weight in its dtype and site -> the same as its own primitive has it, but for its shape.
        block: Terms after which the sum is rounded to BF16 on a target; 0 where it stays in FP32. Pure.
        colour: Of its boxes where a plan is drawn: blue for BF16 in the Compute Library, orange for products in BF16 on
            FP32 activations, green for BLAS, grey for plain ATen, purple for all else.
        examples: Layers on which it is compared with its twin on emulated cores, by target.
    """

    name: str
    op: Op
    backend: Backend
    activations: torch.dtype
    rounding: Rounding
    covers: str
    summary: str
    refuses: Callable[[Site], str | None]
    pack: Callable[[torch.Tensor, Site], torch.Tensor]
    emit: Callable[[KernelCall], fx.Node]
    layout: Layout = Layout.PLAIN
    uses: frozenset[Use] = frozenset({Use.PLAN, Use.FALLBACK})
    fast_math: bool = False
    stand_in: Backend | None = None
    beats_bf16: bool = False
    fuses: Callable[[Site], bool] = fuses_nothing
    own: Callable[[Kernel, Site], Wanted] | None = None
    arrange: Callable[[torch.Tensor, Site], torch.Tensor] = as_it_is
    block: Callable[[Site, Target], int] = whole_sum
    colour: str = "#7c3aed"
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)

    @property
    def precision(self) -> Precision:
        """What is in BF16."""
        if self.rounding.products == torch.bfloat16:
            return Precision.BF16
        return Precision.BF16_WEIGHTS if self.rounding.weights == torch.bfloat16 else Precision.FP32

    @property
    def steps_out_of_bf16(self) -> int:
        """How much of it is in FP32: 0 nothing, 1 results, 2 products too, 3 all, weights too."""
        if self.precision == Precision.BF16:
            return int(self.activations == torch.float32)
        return 2 if self.precision == Precision.BF16_WEIGHTS else 3

    @property
    def is_onednns(self) -> bool:
        """Whether oneDNN runs its call, and its log says how."""
        return (self.stand_in or self.backend) == Backend.ONEDNN

    def packed_weight(self, stored: torch.Tensor, site: Site) -> torch.Tensor:
        """A weight as the bundle stores it, packed for a site's call and its post-op."""
        values = stored.float() if self.backend == Backend.ATEN else stored.to(self.rounding.weights)
        return self.pack(self._scaled(values, site), site)

    def weight_values(self, stored: torch.Tensor, site: Site) -> torch.Tensor:
        """A weight as the bundle stores it, with the values that a site's call multiplies with."""
        return self._scaled(stored.to(self.rounding.weights), site)

    def packed_bias(self, stored: torch.Tensor, site: Site) -> torch.Tensor:
        """A bias as a site's call takes it."""
        return self._scaled(stored.to(self.activations), site)

    def scale(self, site: Site) -> float:
        """By what a site's weight and bias are multiplied as they are packed."""
        if self.fuses(site) or self.activations != torch.float32:
            return 1.0
        return post_ops.UNARY[site.post_op].scale if pointwise.is_quicker_apart(site.post_op) else 1.0

    def _scaled(self, values: torch.Tensor, site: Site) -> torch.Tensor:
        scale = self.scale(site)
        return values if scale == 1 else values * scale


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A node to replace by a kernel's own calls: everything an `emit` needs.

    Attributes:
        kernel: The kernel.
        site: What is known of the node.
        node: The armopt node.
        x: Its input.
        weight: The packed weight, a get_attr node; None where a primitive has it.
        bias: In the kernel's dtype, a get_attr node; or None.
        other: The second tensor of ``add`` and ``add_relu``.
        shape: Output shape with -1 for the one dynamic dimension, or nodes where more are.
    """

    kernel: Kernel
    site: Site
    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    other: fx.Node | None
    shape: Sequence[Any]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call in front of the node."""
        with self.node.graph.inserting_before(self.node):
            return self.node.graph.call_function(target, args, kwargs)

    def with_post_op(self, y: fx.Node) -> fx.Node:
        """Inserts the post-op, unless it is part of the call."""
        return y if self.kernel.fuses(self.site) else self.post_op(y)

    def post_op(self, y: fx.Node) -> fx.Node:
        """Inserts the post-op, if any, as in-place operations on the fresh tensor `y`."""
        name = self.site.post_op
        if name == post_ops.NONE:
            return y
        if name in (post_ops.ADD, post_ops.ADD_RELU):
            y = self.call(_aten.add_.Tensor, y, self.other)
            return self._relu(y) if name == post_ops.ADD_RELU else y
        if name == "relu":
            return self._relu(y)
        post = post_ops.UNARY[name]
        if post.emit_scaled is not None and self.kernel.scale(self.site) != 1:
            return post.emit_scaled(self.call, y)
        if name == "gelu" and self.site.op == Op.CONV:
            # PyTorch gives oneDNN what is contiguous, and works out the rest by itself for more
            spatial = range(2, len(self.site.shape))
            self.call(post.inplace, self.call(_aten.permute.default, y, [0, *spatial, 1]))
            return y
        return self.call(post.inplace, y, *post.inplace_args, **post.inplace_kwargs)

    def _relu(self, y: fx.Node) -> fx.Node:
        few = self.site.m * self.site.n < post_ops.RELU_AS_INTEGERS
        if self.kernel.activations != torch.bfloat16 or few:
            return self.call(_aten.relu_.default, y)
        bits = self.call(_aten.view.dtype, y, torch.int16)
        self.call(_aten.threshold_.default, bits, post_ops.MINUS_INFINITY, 0)
        return y
