"""Runs a kernel once with oneDNN's log on and tells whether it did what its name says. Trusts nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from armopt.errors import first_line
from armopt.ir.records import Precision, Site
from armopt.kernels.base import Kernel
from armopt.runtime import onednn_log

#: Primitives that do a layer's arithmetic.
_COMPUTE = ("convolution", "deconvolution", "matmul", "inner_product")


def refusal(kernel: Kernel, site: Site, run: Callable[[], object]) -> str | None:
    """Why a kernel is not to be trusted with a site on this build; None where it is.

    Args:
        kernel: The kernel.
        site: The site.
        run: Calls the kernel once, with the weight packed already.

    Returns:
        The reason: a reference implementation, a weight reordered on every call, or weights that are not BF16.
    """
    if not kernel.is_onednns:
        return None
    with torch.no_grad():
        try:
            run()  # the first call may prepare what later calls reuse
            with onednn_log.capture_verbose() as log:
                run()
        except RuntimeError as error:
            return f"fails on this build: {first_line(error)}"
    return judge(kernel, site, log.executions)


def judge(kernel: Kernel, site: Site, executions: tuple[onednn_log.Execution, ...]) -> str | None:
    """The verdict on one call's log."""
    computed = [e for e in executions if e.primitive in _COMPUTE]
    if not computed:
        return "oneDNN did not run"
    for execution in onednn_log.references(computed):
        return f"oneDNN answers with the reference implementation {execution.implementation}"
    if onednn_log.weight_reorders(executions, [site.weight]):
        return "the weight is reordered on every call"
    for execution in computed:
        if kernel.precision == Precision.BF16 and execution.weight_dtype != "bf16":
            return f"{execution.implementation} runs on {execution.weight_dtype} weights"
    return None
