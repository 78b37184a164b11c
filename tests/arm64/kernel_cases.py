"""One layer on one kernel, with its operands: made alike on the host and on the emulated core."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from armopt import targets
from armopt.bundle.program import Program
from armopt.kernels import sites, table
from armopt.kernels.ops import CONV, LINEAR


@dataclass(frozen=True)
class Case:
    """A Linear (`shape` [M, K]) or a convolution (`shape` [batch, channels, height, width]).

    `operands` says what stands in them: ``normal`` numbers, or one of the special ones of :func:`operands`.
    """

    kernel: str
    shape: tuple[int, ...]
    outputs: int
    filters: tuple[int, ...] = ()
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    post_op: str = "none"
    operands: str = "normal"

    def __str__(self) -> str:
        text = f"{self.kernel} {'x'.join(map(str, self.shape))} -> {self.outputs}"
        if self.filters:
            text += f" filter {'x'.join(map(str, self.filters))}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("post_op", "none")):
            if getattr(self, name) != default:
                text += f" {name} {getattr(self, name)}"
        return text if self.operands == "normal" else f"{text} {self.operands}"


def operands(case: Case) -> dict[str, torch.Tensor]:
    """Input, weight, bias and residual in FP32; NumPy's generator gives the same on every machine."""
    random = np.random.default_rng([*case.shape, case.outputs, *case.filters])

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))

    weight_shape = (case.outputs, case.shape[1] // case.groups, *case.filters)
    fan_in = math.prod(weight_shape[1:])
    found = {"x": normal(*case.shape), "weight": normal(*weight_shape) / fan_in**0.5}
    if case.bias:
        found["bias"] = normal(case.outputs) * 0.1
    x, weight = found["x"], found["weight"]
    match case.operands:
        case "zeros":
            found = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
        case "zero weights":
            weight.zero_()
        case "huge":
            x.mul_(1e30)
        case "overflow":
            x.mul_(1e20)
            weight.mul_(1e20)
        case "huge weights":
            weight.mul_(1e30)
        case "tiny weights":
            weight.mul_(1e-30)
            found["bias"].mul_(1e-30)
        case "saturating weights":  # BF16 has no such number: the nearest is infinity
            weight.flatten()[3] = torch.finfo(torch.float32).max
            weight.flatten()[-2] = torch.finfo(torch.float32).min
        case "saturating inputs":
            x.flatten()[3] = torch.finfo(torch.float32).max
        case "subnormal weights":
            weight.mul_(1e-37)
            found["bias"].zero_()
        case "subnormal inputs":
            x.mul_(1e-39)
            found["bias"].zero_()
        case "subnormal products":
            x.mul_(1e-20)
            weight.mul_(1e-20)
            found["bias"].zero_()
        case "infinite input":
            x.flatten()[3] = math.inf
        case "nan input":
            x.flatten()[3] = math.nan
        case "infinite weight":
            weight.flatten()[3] = math.inf
        case "both infinities":
            x.flatten()[3] = math.inf
            x.flatten()[5] = -math.inf
        case "nan weight":
            weight.flatten()[3] = math.nan
    return found


def program(case: Case, target: str, tensors: dict[str, torch.Tensor]) -> Program:
    """A graph of that layer alone; as it stands, the kernel's portable twin on that target."""
    kernel = table.get(case.kernel)
    root = torch.nn.Module()
    root.register_buffer("weight", tensors["weight"].to(kernel.rounding.weights))
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    bias = None
    if case.bias:
        root.register_buffer("bias", tensors["bias"])
        bias = graph.get_attr("bias")
    spatial = len(case.filters)
    geometry = () if kernel.op == "linear" else _geometry(case, spatial)
    operation = LINEAR if kernel.op == "linear" else CONV
    args = (x, weight, bias, None, *geometry, case.post_op, kernel.name, 0)
    layer = graph.call_function(operation, args)
    site = sites.describe(layer, case.shape, tuple(root.weight.shape))
    layer.args = (*args[:-1], kernel.block(site, targets.load(target)))
    graph.output((layer,))
    shape = (case.shape[0], case.outputs)
    if spatial:
        size = [
            (s + 2 * case.padding - case.dilation * (f - 1) - 1) // case.stride + 1
            for s, f in zip(case.shape[2:], case.filters, strict=True)
        ]
        shape = (*shape, *size)
    return Program({}, fx.GraphModule(root, graph), {layer.name: site}, {layer.name: shape})


def activations(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The input as the kernel takes it."""
    x = tensors["x"].to(table.get(case.kernel).activations)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def twin(case: Case, target: str) -> torch.Tensor:
    """What the portable twin gives."""
    tensors = operands(case)
    (result,) = program(case, target, tensors).graph_module(activations(case, tensors))
    return result


def exact(case: Case) -> torch.Tensor:
    """The layer in FP64 on the operands before any rounding."""
    found = {name: tensor.double() for name, tensor in operands(case).items()}
    x, weight, bias = found["x"], found["weight"], found.get("bias")
    if not case.filters:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        geometry = _geometry(case, len(case.filters))
        y = torch.convolution(x, weight, bias, *geometry)
    match case.post_op:
        case "none":
            return y
        case "relu":
            return y.relu()
        case "silu":
            return torch.nn.functional.silu(y)
    raise AssertionError(case.post_op)


def _geometry(case: Case, spatial: int) -> tuple[object, ...]:
    one = [case.stride] * spatial, [case.padding] * spatial, [case.dilation] * spatial
    return (*one, False, [0] * spatial, case.groups)
