"""Chooses a kernel for every Linear and convolution. Pure: no mutation, clock, environment or file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch

from armopt.ir.records import Bucket, Decision, Plan, Precision, Product, Site, Skip, Target
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
    sites: Sequence[Site],
    target: Target,
    policy: Policy,
    bucket: Bucket,
    products: Sequence[Product] = (),
    pinned: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """The plan for one bucket: a decision for every site, and why all other products on weights get none.

    Args:
        sites: All sites of the graph.
        target: What it is for.
        policy: Chooses the kernels.
        bucket: The sizes it is for.
        products: All that multiplies.
        pinned: Node -> the pattern that keeps it in FP32.
    """
    planned = {site.node for site in sites}
    decisions = []
    refused = [Skip(each.node, each.reason) for each in products if each.weight_bytes and each.node not in planned]
    for site, choice in zip(sites, _choose(sites, target, policy, pinned), strict=True):
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
    return Plan(target, policy.name, bucket, tuple(decisions), tuple(refused), tuple(products), frozenset(pinned))


def _choose(sites: Sequence[Site], target: Target, policy: Policy, pinned: Mapping[str, str]) -> Sequence[Choice]:
    """The policy's choice for what is free, to which a pinned layer is as any other operation in FP32."""
    read = {source for site in sites if site.node in pinned for source in (site.source, site.residual)}
    free = [replace(s, escapes=s.escapes or s.node in read) for s in sites if s.node not in pinned]
    chosen = iter(policy.choose(free, target))
    return [
        Choice(_in_fp32(site, target, policy), f"kept in FP32, as {pinned[site.node]!r} says")
        if site.node in pinned
        else next(chosen)
        for site in sites
    ]


def _in_fp32(site: Site, target: Target, policy: Policy) -> Kernel | None:
    """The kernel that repair would take, or else the policy's if it is in FP32 already; None for plain ATen."""
    if target.bf16:
        for kernel in table.kernels(site.op, Use.REPAIR):
            if kernel.precision == Precision.FP32 and kernel.refuses(site) is None:
                return kernel
    chosen = policy.choose([replace(site, source="", residual="", escapes=True)], target)[0].kernel
    return chosen if chosen is not None and chosen.precision == Precision.FP32 else None
