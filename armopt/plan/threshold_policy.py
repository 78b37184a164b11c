"""The tutorial's rule: BLAS below a number of rows, packed kernels from there up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from armopt.ir.records import Site, Target
from armopt.kernels import table
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
        return [self._linear(site, target) if site.op == "linear" else _conv(site, target) for site in sites]

    def _linear(self, site: Site, target: Target) -> Choice:
        packed = table.get("conv1x1_bf16" if target.bf16 else "conv1x1_fp32")
        blas = table.get("blas_fp32_w16" if target.bf16 else "blas_fp32")
        refusal = packed.refuses(site)
        if refusal is not None:
            return Choice(None, refusal) if blas.refuses(site) else Choice(blas, refusal)
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
    wanted = ["conv_bf16", "conv_fastmath"] if target.bf16 else []
    reasons = "; ".join(refusals(site, target))
    for name in (*wanted, "conv_fp32", "conv_merged_fp32", "conv_transpose_fp32"):
        if table.get(name).refuses(site) is None:
            return Choice(table.get(name), reasons or "dense convolution: packed once")
    return Choice(None, reasons)
