"""What a kernel is: data plus how it packs, how it calls, and how it rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from armopt.ir.records import Site, Target
from armopt.kernels import post_ops

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


def _whole(site: Site, target: Target) -> int:
    """A sum that stays in FP32 to the end."""
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to call a backend.

    Attributes:
        name: As plans, graphs and reports have it.
        op: The operation it covers, ``linear`` or ``conv``.
        backend: ``acl``, ``onednn``, ``blas`` or ``aten``: whose code does the arithmetic.
        activations: Dtype of input and output.
        rounding: See :class:`Rounding`.
        fast_math: Whether it needs DNNL_DEFAULT_FPMATH_MODE=BF16, read when oneDNN is first used.
        summary: One line for people.
        refuses: Why it can't take a site; None where it can. Pure.
        pack: Weight in its dtype and site -> the weight as the call wants it. Runs once, on the host: packed_weight.
        emit: Inserts the call in front of a node of armopt::linear or armopt::conv; returns the node with the result.
        fuses: Post-ops that are part of the call.
        block: Terms after which the sum is rounded to BF16 on a target; 0 where it stays in FP32. Pure.
    """

    name: str
    op: str
    backend: str
    activations: torch.dtype
    rounding: Rounding
    summary: str
    refuses: Callable[[Site], str | None]
    pack: Callable[[torch.Tensor, Site], torch.Tensor]
    emit: Callable[[Call], fx.Node]
    fast_math: bool = False
    fuses: frozenset[str] = frozenset()
    block: Callable[[Site, Target], int] = _whole

    @property
    def precision(self) -> str:
        """``bf16`` where the products are, ``bf16-weights`` where the weights alone are, else ``fp32``."""
        if self.rounding.products == torch.bfloat16:
            return "bf16"
        return "bf16-weights" if self.rounding.weights == torch.bfloat16 else "fp32"

    def packed_weight(self, stored: torch.Tensor, site: Site) -> torch.Tensor:
        """A weight as the bundle stores it, packed for a site's call and its post-op."""
        values = stored.float() if self.backend == "aten" else stored.to(self.rounding.weights)
        return self.pack(self._scaled(values, site), site)

    def packed_bias(self, stored: torch.Tensor, site: Site) -> torch.Tensor:
        """A bias as a site's call takes it."""
        return self._scaled(stored.to(self.activations), site)

    def scale(self, site: Site) -> float:
        """By what a site's weight and bias are multiplied as they are packed."""
        return post_ops.scale(site.post_op, self.activations)

    def _scaled(self, values: torch.Tensor, site: Site) -> torch.Tensor:
        scale = self.scale(site)
        return values if scale == 1 else values * scale


@dataclass(frozen=True, slots=True)
class Call:
    """A node to lower: everything an `emit` needs.

    Attributes:
        node: The armopt node.
        x: Its input.
        weight: The packed weight, a get_attr node.
        bias: In the kernel's dtype, a get_attr node; or None.
        other: The second tensor of ``add`` and ``add_relu``.
        post_op: Name of the post-op.
        shape: Output shape with -1 for the one dynamic dimension, or nodes where more are.
        site: What the planner knows of the node.
        dtype: Of the result.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    other: fx.Node | None
    post_op: str
    shape: Sequence[Any]
    site: Site
    dtype: torch.dtype

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call in front of the node."""
        with self.node.graph.inserting_before(self.node):
            return self.node.graph.call_function(target, args, kwargs)

    def with_post_op(self, y: fx.Node) -> fx.Node:
        """Inserts the post-op as in-place operations on the fresh tensor `y`."""
        if self.post_op in (post_ops.ADD, post_ops.ADD_RELU):
            y = self.call(_aten.add_.Tensor, y, self.other)
            return self._relu(y) if self.post_op == post_ops.ADD_RELU else y
        if self.post_op == post_ops.NONE:
            return y
        if self.post_op == "relu":
            return self._relu(y)
        if post_ops.scale(self.post_op, self.dtype) != 1:
            return self.call(_aten.addcmul_.default, y, y, self.call(_aten.tanh.default, y))
        post = post_ops.UNARY[self.post_op]
        kwargs = {"approximate": "tanh"} if post.algorithm == "tanh" else {}
        return self.call(post.inplace, y, *post.inplace_args, **kwargs)

    def _relu(self, y: fx.Node) -> fx.Node:
        if self.dtype != torch.bfloat16 or self.site.m * self.site.n < post_ops.RELU_AS_INTEGERS:
            return self.call(_aten.relu_.default, y)
        self.call(_aten.clamp_min_.default, self.call(_aten.view.dtype, y, torch.int16), 0)
        return y
