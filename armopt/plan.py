"""Chooses a kernel for every Linear and convolution. Pure: no mutation, clock, environment or file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from armopt.ir import Bucket, Decision, Plan, Site, Skip, Target
from armopt.kernels import table
from armopt.kernels.base import Kernel


class Policy(Protocol):
    """How kernels are chosen. A choice may look at all sites: neighbours in BF16 share their casts."""

    @property
    def name(self) -> str:
        """As the report has it, with its parameters."""

    def choose(self, sites: Sequence[Site], target: Target) -> Sequence[Choice]:
        """One choice for each site, in order."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel and the reason for it; no kernel where the site stays plain ATen."""

    kernel: Kernel | None
    reason: str


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


def _conv(site: Site, target: Target) -> Choice:
    """The first kernel that takes a convolution; its reason is why the ones before it don't."""
    wanted = ["conv_bf16", "conv_fastmath"] if target.bf16 else []
    reasons = "; ".join(refusals(site, target))
    for name in (*wanted, "conv_fp32", "conv_merged_fp32", "conv_transpose_fp32"):
        if table.get(name).refuses(site) is None:
            return Choice(table.get(name), reasons or "dense convolution: packed once")
    return Choice(None, reasons)


def refusals(site: Site, target: Target) -> list[str]:
    """Why kernels that are meant for such a site don't take it."""
    if not target.bf16:
        return [f"{target.core} has no BF16"]
    reasons = (kernel.refuses(site) for kernel in table.ALL if kernel.op == site.op)
    return list(dict.fromkeys(reason for reason in reasons if reason and not reason.startswith("covers")))


def make(sites: Sequence[Site], target: Target, policy: Policy, bucket: Bucket) -> Plan:
    """The plan for one bucket: a decision for every site, and why the refused ones are refused."""
    decisions, refused = [], []
    for site, choice in zip(sites, policy.choose(sites, target), strict=True):
        kernel = choice.kernel
        if kernel is None:
            refused.append(Skip(site.node, choice.reason))
            kernel = table.get(f"aten_{site.op}")
        channels_last = site.op == "conv" and kernel.backend != "aten"
        decisions.append(
            Decision(
                node=site.node,
                op=site.op,
                kernel=kernel.name,
                precision=kernel.precision,
                layout="channels_last" if channels_last else "plain",
                shape=site.shape,
                reason=choice.reason,
                block=kernel.block(site, target),
            )
        )
    if not target.bf16:
        half = [d.node for d in decisions if table.get(d.kernel).rounding.weights == torch.bfloat16]
        assert not half, f"BF16 planned for {target.core}, which has none: {half}"
    return Plan(target, policy.name, bucket, tuple(decisions), tuple(refused))
