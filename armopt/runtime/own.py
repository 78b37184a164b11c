"""Layers as primitives of their own: made and proven as a program is bound, and called in its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from armopt.ir.records import Op, Site
from armopt.kernels.base import Kernel, KernelCall
from armopt.kernels.onednn import primitives
from armopt.kernels.onednn.layer import Layer, Workspaces, describe
from armopt.runtime import numbers
from armopt.runtime.packings import Packings

_aten = torch.ops.aten


def unavailable() -> str:
    """Why no kernel can own its primitive in this process; empty where they can."""
    api = primitives.api()
    return api if isinstance(api, str) else ""


def forms(kernel: Kernel, site: Site) -> tuple[bool, ...]:
    """Whether a primitive takes the site's post-op: what is to be tried, in order."""
    return (True, False) if kernel.fuses(site) else (False,)


def proven(kernel: Kernel, site: Site, stored: torch.Tensor, bias: torch.Tensor | None) -> Layer | None:
    """A layer alone as its kernel's own primitive, with right numbers; None where it can't be had."""
    values = kernel.weight_values(stored, site)
    for fused in forms(kernel, site):
        made = make(kernel, site, lambda: stored, bias, lambda layout: [], fused=fused)
        if made is not None and numbers.refusal(kernel, site, alone(made, site), values, bias, fused=fused) is None:
            return made
    return None


def make(
    kernel: Kernel,
    site: Site,
    stored: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    packings: Callable[[bytes], Packings],
    *,
    fused: bool,
) -> Layer | None:
    """A layer as its kernel's own primitive; None where the kernel has none or this build offers none.

    Args:
        kernel: The kernel.
        site: The site, whose sizes are fixed.
        stored: Gives the weight as the bundle stores it.
        bias: In the kernel's dtype.
        packings: Of a layout, what is packed so already; what is packed here is added.
        fused: Whether the primitive takes the post-op that its kernel fuses.
    """
    api = primitives.api()
    if kernel.own is None or isinstance(api, str):
        return None
    wanted = kernel.own(kernel, site)
    if not fused:
        wanted = replace(wanted, post_op="")
    try:
        description = describe(api, wanted, bias=bias is not None)
        if description is None:
            return None
        held = packings(api.key(description.layout))
        packed = next((tensor for _, tensor in held), None)
        if packed is None:
            packed = description.pack(kernel.arrange(kernel.weight_values(stored(), site), site).reshape(wanted.weight))
            held.append(((), packed))
        return Layer(wanted, description, packed, bias)
    except primitives.OneDnnError:
        return None


def alone(layer: Layer, site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer, without what its call does not take of the post-op, as a function of its input."""
    workspaces = Workspaces()
    workspaces.layers.append(layer)
    is_conv = site.op == Op.CONV
    shape = layer.wanted.result if is_conv else (*site.shape[:-1], site.n)
    call = layer.call(0, shape, channels_last=is_conv)

    def run(x: torch.Tensor) -> torch.Tensor:
        workspace = workspaces.take()
        flat = is_conv and x.dim() == 3
        y = call(workspace, x.unsqueeze(2) if flat else x)
        workspaces.give(workspace)
        return y.squeeze(2) if flat else y

    return run


@dataclass(slots=True)
class Calls:
    """The calls of own primitives in one graph: each takes the workspace of the call of the program."""

    graph: fx.Graph
    workspaces: Workspaces
    _workspace: fx.Node | None = None

    def emit(self, call: KernelCall, layer: Layer) -> fx.Node:
        """Inserts the call of a layer in front of its node, and its post-op where the primitive doesn't take it."""
        is_conv = call.site.op == Op.CONV
        flat = is_conv and len(call.site.shape) == 3
        shape = layer.wanted.result if is_conv else tuple(call.shape)
        run = layer.call(len(self.workspaces.layers), shape, channels_last=is_conv)
        run.__name__ = call.node.name
        self.workspaces.layers.append(layer)
        x = call.call(_aten.unsqueeze.default, call.x, 2) if flat else call.x
        y = call.call(run, self._taken(), x)
        y = call.call(_aten.squeeze.dim, y, 2) if flat else y
        return y if layer.wanted.post_op else call.post_op(y)

    def _taken(self) -> fx.Node:
        if self._workspace is None:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                self._workspace = self.graph.call_function(self.workspaces.take)
        return self._workspace

    def finish(self) -> None:
        """Gives the workspace back at the end, and has a first one ready."""
        if self._workspace is not None:
            with self.graph.inserting_before(self.graph.output_node()):
                self.graph.call_function(Workspaces.give, (self._workspace,))
            Workspaces.give(self.workspaces.take())
