"""The tutorial's rule: BLAS below a number of rows, packed kernels from there up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from armopt.ir.records import Backend, Op, Precision, Site, Target
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use
from armopt.plan.planner import Choice, refusals


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """The tutorial's rule: BLAS below `rows` rows of a product, packed kernels of the Compute Library from there up.

    Source: "PyTorch inference performance tuning on AWS Graviton processors", which sets
    TORCH_MKLDNN_MATMUL_MIN_DIM=64 for the whole process; here it holds per node, and convolutions are always packed.
    """

    rows: int = 64

    @property
    def name(self) -> str:
        """`threshold=` and the number of rows."""
        return f"threshold={self.rows}"

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[Choice]:
        """Looks at each site alone."""
        return [self._linear(site, target) if site.op == Op.LINEAR else _conv(site, target) for site in sites]

    def _linear(self, site: Site, target: Target) -> Choice:
        kernels = _usable(site, target)
        packed = next(kernel for kernel in kernels if kernel.backend != Backend.BLAS)
        blas = next(kernel for kernel in kernels if kernel.backend == Backend.BLAS)
        refusal = packed.refuses(site)
        if refusal is not None:
            return Choice(None, refusal) if blas.refuses(site) else Choice(blas, refusal)
        if self.rows <= 1:
            return Choice(packed, "packed once")
        if site.m < self.rows:
            return Choice(blas, f"{site.m} rows, below the threshold of {self.rows}")
        return Choice(packed, f"{site.m} rows, at or above the threshold of {self.rows}")


def read(value: str, target: Target) -> ThresholdPolicy:
    """``threshold`` or ``threshold=ROWS``, for any target.

    Raises:
        ValueError: ROWS is no number.
    """
    if value and not value.isdecimal():
        raise ValueError(value)
    return ThresholdPolicy(int(value)) if value else ThresholdPolicy()


def _conv(site: Site, target: Target) -> Choice:
    """The first kernel that takes a convolution; its reason is why the ones before it don't."""
    reasons = "; ".join(refusals(site, target))
    for kernel in _usable(site, target):
        if kernel.refuses(site) is None:
            return Choice(kernel, reasons or "dense convolution: packed once")
    return Choice(None, reasons)


def _usable(site: Site, target: Target) -> list[Kernel]:
    """The kernels for such a site, those in FP32 alone where the core has no BF16."""
    kernels = table.kernels(site.op, Use.PLAN)
    return [kernel for kernel in kernels if target.bf16 or kernel.precision == Precision.FP32]
