"""What of a plan is not in BF16: what plan, inspect, report and explain show."""

from __future__ import annotations

from dataclasses import replace

from armopt.ir.records import Plan, Precision, Product, Remainder


def find(plan: Plan, part: str = "") -> Remainder:
    """All products on weights that a plan leaves in FP32, and how much two activations multiply with each other.

    On a target without BF16 every layer is in FP32, as planned: there only what is no layer counts.

    Args:
        plan: Of one bucket.
        part: Path of the part of the model that it is of.
    """
    decisions = {decision.node: decision for decision in plan.decisions}
    rows: list[Product] = []
    activations: list[Product] = []
    for product in plan.products:
        decision = decisions.get(product.node)
        if decision is None:
            (rows if product.weight_bytes else activations).append(product)
        elif plan.target.bf16 and decision.precision == Precision.FP32:
            rows.append(replace(product, reason=decision.reason))
    return Remainder(
        part=part,
        bucket=plan.bucket,
        multiplications=sum(product.multiplications for product in plan.products),
        products=tuple(sorted(rows, key=lambda row: (-row.multiplications, -row.weight_bytes))),
        activations=len(activations),
        activation_multiplications=sum(product.multiplications for product in activations),
    )
