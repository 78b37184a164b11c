"""Chooses a kernel for every Linear and convolution. Pure: no mutation, clock, environment or file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from armopt.ir.records import Bucket, Decision, Plan, Product, Site, Skip, Target
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use


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


def refusals(site: Site, target: Target) -> list[str]:
    """Why kernels that are meant for such a site don't take it."""
    if not target.bf16:
        return [f"{target.core} has no BF16"]
    reasons = (kernel.refuses(site) for kernel in table.kernels(site.op, Use.PLAN))
    return list(dict.fromkeys(reason for reason in reasons if reason and not reason.startswith("covers")))


def make(
    sites: Sequence[Site], target: Target, policy: Policy, bucket: Bucket, products: Sequence[Product] = ()
) -> Plan:
    """The plan for one bucket: a decision for every site, and why all other products on weights get none."""
    planned = {site.node for site in sites}
    decisions = []
    refused = [Skip(each.node, each.reason) for each in products if each.weight_bytes and each.node not in planned]
    for site, choice in zip(sites, policy.choose(sites, target), strict=True):
        kernel = choice.kernel
        if kernel is None:
            refused.append(Skip(site.node, choice.reason))
            kernel = table.plain(site.op)
        decisions.append(
            Decision(
                node=site.node,
                op=site.op,
                kernel=kernel.name,
                precision=kernel.precision,
                layout=kernel.layout,
                shape=site.shape,
                reason=choice.reason,
                block=kernel.block(site, target),
            )
        )
    if not target.bf16:
        half = [d.node for d in decisions if table.get(d.kernel).rounding.weights == torch.bfloat16]
        assert not half, f"BF16 planned for {target.core}, which has none: {half}"
    return Plan(target, policy.name, bucket, tuple(decisions), tuple(refused), tuple(products))
