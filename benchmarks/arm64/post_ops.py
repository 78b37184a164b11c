"""Counts layers whose post-op is part of the primitive against both apart: what kernels fuse, and what they don't.

    python -m benchmarks.arm64.post_ops                  # prints the table
    python -m benchmarks.arm64.post_ops --torch 2.13.0

Thousands of instructions of one call on the emulated Graviton3. Fused by the implementation that answers without the
post-op: `none` where oneDNN has only another, or a reference, and `NaN` where it makes a number of NaN. Apart as
bundles run it: by oneDNN's code behind the layer or by PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

#: Kernel, shape of the input, of the weight, filter's padding and groups.
LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int, int]] = {
    "depthwise 3x3, 120x28x28": ("conv_fp32", (1, 120, 28, 28), (120, 1, 3, 3), 1, 120),
    "4 groups 3x3, 64x28x28": ("conv_fp32", (1, 64, 28, 28), (64, 16, 3, 3), 1, 4),
    "3x3, 32x28x28, fast math": ("conv_fastmath", (1, 32, 28, 28), (64, 32, 3, 3), 1, 1),
    "3x3, 32x28x28, BF16": ("conv_bf16", (1, 32, 28, 28), (64, 32, 3, 3), 1, 1),
    "Linear 32x256 to 1024, fast math": ("linear_fastmath", (32, 256), (1024, 256), 0, 1),
    "Linear 196x40 to 240, FP32": ("conv1x1_fp32", (196, 40), (240, 40), 0, 1),
}
POST_OPS = ("none", "relu", "relu6", "sigmoid", "silu", "hardswish", "gelu", "gelu_tanh")


def make(layer: str, post_op: str, fused: bool) -> Callable[[], Any]:
    """One call, on the emulated side.

    Raises:
        LookupError: oneDNN has no such primitive, or one that loses NaN; the message says which.
    """
    import torch

    from armopt.kernels import table
    from armopt.runtime import own
    from armopt.runtime.bind import single
    from benchmarks.arm64 import jobs

    torch._C._set_grad_enabled(False)
    name, shape, weight_shape, padding, groups = LAYERS[layer]
    is_conv = len(shape) > 2
    kernel = replace(table.get(name), fuses=lambda site: fused)
    site = (
        jobs.conv_site(shape, weight_shape, padding=padding, groups=groups, post_op=post_op)
        if is_conv
        else jobs.linear_site(*shape, weight_shape[0], post_op)
    )
    weight, bias = torch.randn(weight_shape) / 9, torch.randn(weight_shape[0]).to(kernel.activations)

    def made(form: own.Form) -> Any:
        return own.make(kernel, site, lambda: weight, bias, lambda layout: [], form)

    forms = (own.Form.FUSED,) if fused else [form for form in own.forms(kernel, site) if form != own.Form.FUSED]
    found = next((each for form in forms if (each := made(form))), None)
    if found is None or found.implementation != made(own.Form.APART).implementation:
        raise LookupError("none")
    if fused:
        x = torch.full(shape, torch.nan, dtype=kernel.activations)
        x = x.contiguous(memory_format=torch.channels_last) if is_conv else x
        if not own.alone(found, site)(x).isnan().all():
            raise LookupError("NaN")
    return single(kernel, site, found, bias)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from armopt.emulation.folder import DEFAULT_TORCH
    from benchmarks.arm64 import counting, tables
    from benchmarks.arm64.emulated_jobs import Job

    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm64.post_ops", description=__doc__)
    parser.add_argument("--torch", default=DEFAULT_TORCH)
    options = parser.parse_args(arguments)
    wanted = [(layer, post, fused) for layer in LAYERS for post in POST_OPS for fused in (True, False)]
    keys = [(layer, post, fused) for layer, post, fused in wanted if post != "none" or not fused]
    place = "benchmarks.arm64.post_ops:make"
    jobs = [Job(str(key), place, dict(zip(("layer", "post_op", "fused"), key, strict=True)), 2) for key in keys]
    counts = dict(zip(keys, counting.count(jobs, torch_version=options.torch), strict=True))

    def cell(key: tuple[str, str, bool]) -> str:
        counted = counts[key]
        return counted.error.strip().rsplit(": ", 1)[-1] if counted.error else f"{counted.total / 1e3:,.0f}"

    def both(layer: str, post_op: str) -> str:
        return f"{cell((layer, post_op, True))} / {cell((layer, post_op, False))}"

    rows = [[layer, cell((layer, "none", False)), *(both(layer, post) for post in POST_OPS[1:])] for layer in LAYERS]
    print(tables.table(rows, ["fused / apart", "without", *POST_OPS[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
