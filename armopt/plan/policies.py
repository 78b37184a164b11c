"""The policies by name, as ``--policy`` has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from armopt.errors import InputError
from armopt.ir.records import Target
from armopt.kernels.timings import read as read_tuning
from armopt.plan import cost_policy, costs, planner, threshold_policy
from armopt.plan.tuned_costs import TunedCosts

if TYPE_CHECKING:
    pass


_RELEASE = r"(\d+\.\d+(\.\d+)?)?"


def find_policy(
    policy: planner.Policy | str | None, target: Target, tuning: Path | None = None, where: str = "policy"
) -> planner.Policy:
    """A policy for a target, also from ``cost``, ``cost=2.13`` (a torch release), ``threshold`` or ``threshold=64``.

    Args:
        policy: A policy or its text; None is the default.
        target: What it is for.
        tuning: Times of this host, which count instead of the cost table.
        where: What to call the option in an error.

    Raises:
        InputError: There is no such policy.
    """
    if policy is not None and not isinstance(policy, str):
        return policy
    name, _, value = (policy or "cost").partition("=")
    release = value if name == "cost" else ""
    if name not in ("cost", "threshold") or not re.fullmatch(_RELEASE if name == "cost" else r"\d*", value):
        hint = "Write cost, cost=2.10 (the server's torch), threshold or threshold=ROWS"
        raise InputError(f"unknown policy {policy!r}", where=where, hint=hint)
    if tuning is not None:
        return cost_policy.CostPolicy(TunedCosts(read_tuning(tuning), costs.find(target, release)))
    if name == "cost":
        return cost_policy.default(target, release)
    return threshold_policy.ThresholdPolicy(int(value)) if value else threshold_policy.ThresholdPolicy()
