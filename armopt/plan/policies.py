"""The table of policies, as ``--policy`` has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from armopt.errors import InputError
from armopt.tables import Line, Table

if TYPE_CHECKING:
    from armopt.ir.records import Target
    from armopt.plan.planner import Policy

#: Makes a policy for a target out of what stands behind ``=`` or from ``@`` on; a ValueError says it can't.
Reader: TypeAlias = "Callable[[str, Target], Policy]"

POLICIES: Table[Reader] = Table(
    "policy",
    Line("cost", "armopt.plan.cost_policy:read", "cost[=TORCH][@THREADS] (the server's torch; threads of a call)"),
    Line("threshold", "armopt.plan.threshold_policy:read", "threshold[=64] (rows)"),
)
DEFAULT = "cost"


def find_policy(
    policy: Policy | str | None, target: Target, tuning: Path | None = None, where: str = "policy"
) -> Policy:
    """A policy for a target, also from its text: ``cost``, ``cost=2.13``, ``cost@16``, ``threshold=64``…

    Args:
        policy: A policy or its text; None is the default.
        target: What it is for.
        tuning: Times of this host, which count instead of the cost table.
        where: What to call the option in an error.

    Raises:
        InputError: There is no such policy, or the times can't be read.
    """
    if policy is not None and not isinstance(policy, str):
        return policy
    text = policy or DEFAULT
    name = re.split("[=@]", text, maxsplit=1)[0]
    value = text.removeprefix(name).removeprefix("=")
    read = POLICIES.find(name, where=where)
    try:
        chosen = read(value, target)
    except ValueError:
        raise InputError(f"can't read policy {text!r}", where=where, hint=f"Write {POLICIES.help()}") from None
    if tuning is None:
        return chosen
    from armopt.kernels import timings
    from armopt.plan import cost_policy

    return cost_policy.tuned(chosen, target, timings.read(tuning))
