"""One layer on one kernel, with its operands: made alike on the host and on the emulated core."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from armopt import targets
from armopt.bundle.program import Program
from armopt.ir.calls import ConvCall, LinearCall
from armopt.ir.records import Op
from armopt.kernels import post_ops, sites, table
from armopt.kernels.examples import Example


@dataclass(frozen=True)
class Case:
    """A kernel on one layer.

    `operands` says what stands in it: ``normal`` numbers, or one of the special ones of :func:`operands`.
    """

    kernel: str
    layer: Example
    operands: str = "normal"

    def __str__(self) -> str:
        layer = self.layer
        text = f"{self.kernel} {'x'.join(map(str, layer.shape))} -> {layer.outputs}"
        if layer.filters:
            text += f" filter {'x'.join(map(str, layer.filters))}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1), ("post_op", "none")):
            if getattr(layer, name) != default:
                text += f" {name} {getattr(layer, name)}"
        return text if self.operands == "normal" else f"{text} {self.operands}"


def examples() -> dict[str, tuple[Case, ...]]:
    """The layers that each kernel names for itself, by target."""
    found: dict[str, tuple[Case, ...]] = {}
    for kernel in table.kernels():
        for target, layers in kernel.examples.items():
            found[target] = (*found.get(target, ()), *(Case(kernel.name, layer) for layer in layers))
    return found


def operands(case: Case) -> dict[str, torch.Tensor]:
    """Input, weight, bias and residual in FP32; NumPy's generator gives the same on every machine."""
    layer = case.layer
    random = np.random.default_rng([*layer.shape, layer.outputs, *layer.filters])

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))

    weight_shape = (layer.outputs, layer.shape[1] // layer.groups, *layer.filters)
    fan_in = math.prod(weight_shape[1:])
    found = {"x": normal(*layer.shape), "weight": normal(*weight_shape) / fan_in**0.5}
    if layer.bias:
        found["bias"] = normal(layer.outputs) * 0.1
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


def program(case: Case, target: str, tensors: dict[str, torch.Tensor], *, in_blocks: bool = True) -> Program:
    """A graph of that layer alone; as it stands, the kernel's portable twin on that target.

    Without blocks the twin rounds once, whatever the target's library does.
    """
    kernel, layer = table.get(case.kernel), case.layer
    root = torch.nn.Module()
    root.register_buffer("weight", tensors["weight"].to(kernel.rounding.weights))
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    bias = None
    if layer.bias:
        root.register_buffer("bias", tensors["bias"])
        bias = graph.get_attr("bias")
    other = graph.placeholder("other") if layer.post_op.startswith("add") else None
    names = {"post_op": layer.post_op, "kernel": kernel.name}
    operands = {"x": x, "weight": weight, "bias": bias, "other": other, **names}
    if kernel.op == Op.LINEAR:
        call = LinearCall(**operands)
    else:
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        call = ConvCall(**operands, **dict(zip(names, _geometry(layer), strict=True)))
    node = graph.call_function(call.operation, call.args)
    site = sites.describe(node, layer.shape, tuple(root.weight.shape))
    node.args = call.replace(block=kernel.block(site, targets.load(target)) if in_blocks else 0).args
    graph.output((node,))
    size = [
        (s + 2 * layer.padding - layer.dilation * (f - 1) - 1) // layer.stride + 1
        for s, f in zip(layer.shape[2:], layer.filters, strict=True)
    ]
    shape = (layer.shape[0], layer.outputs, *size)
    return Program({}, fx.GraphModule(root, graph), {node.name: site}, {node.name: shape})


def eager(case: Case, tensors: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The layer and its post-op as two operations of eager PyTorch; `inputs` are its input and the residual."""
    x, weight, bias = inputs[0], tensors["weight"], tensors.get("bias")
    if not case.layer.filters:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.convolution(x, weight, bias, *_geometry(case.layer))
    return post_ops.apply(case.layer.post_op, y, *inputs[1:] or [None])


def activations(case: Case, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The input as the kernel takes it."""
    x = tensors["x"].to(table.get(case.kernel).activations)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def twin(case: Case, target: str, *, in_blocks: bool = True) -> torch.Tensor:
    """What the portable twin gives."""
    tensors = operands(case)
    (result,) = program(case, target, tensors, in_blocks=in_blocks).graph_module(activations(case, tensors))
    return result


def joined(case: Case) -> torch.Tensor:
    """The layer in BF16 where the code of the product takes the post-op too: its sum is not rounded before."""
    return exact(case, torch.bfloat16).bfloat16()


def exact(case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The layer in FP64 on operands that were rounded to `dtype`; they are in FP32."""
    found = {name: tensor.to(dtype).double() for name, tensor in operands(case).items()}
    x, weight, bias = found["x"], found["weight"], found.get("bias")
    if not case.layer.filters:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.convolution(x, weight, bias, *_geometry(case.layer))
    functions = {
        "none": lambda y: y,
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "silu": torch.nn.functional.silu,
        "hardswish": torch.nn.functional.hardswish,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    return functions[case.layer.post_op](y)


def _geometry(layer: Example) -> tuple[object, ...]:
    spatial = len(layer.filters)
    one = [layer.stride] * spatial, [layer.padding] * spatial, [layer.dilation] * spatial
    return (*one, False, [0] * spatial, layer.groups)
