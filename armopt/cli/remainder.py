"""What of a plan is not in BF16, as text and as JSON: ``plan`` and ``inspect`` show the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from armopt.cli.output import human_size, text_table

if TYPE_CHECKING:
    from armopt.ir.records import Product, Remainder


def to_json(remainder: Remainder) -> dict[str, Any]:
    """Every figure, with shares of the multiplications."""
    products = [asdict(product) for product in remainder.products]
    for product in products:
        product["name"] = product.pop("node")
        product["share"] = remainder.share(product["multiplications"])
    count = remainder.activation_multiplications
    return {
        **({"part": remainder.part} if remainder.part else {}),
        "bucket": dict(remainder.bucket),
        "multiplications": remainder.multiplications,
        "products": products,
        "activations": {
            "products": remainder.activations,
            "multiplications": count,
            "share": remainder.share(count),
        },
    }


def text(remainder: Remainder) -> str:
    """A table for people, and one line for products of two activations; empty where there is neither."""
    lines: list[str] = []
    if remainder.products:
        share = remainder.share(sum(product.multiplications for product in remainder.products))
        rows = [_row(product, remainder) for product in remainder.products]
        title = f"Not in BF16 ({share:.1%} of the multiplications{_where(remainder.bucket)}):"
        lines += [title, text_table(("node", "what", "weights", "share", "why"), rows)]
    if remainder.activations:
        share = remainder.share(remainder.activation_multiplications)
        lines.append(
            f"Products of two activations: {remainder.activations}, {share:.1%} of the multiplications"
            f"{_where(remainder.bucket)}; they have no weights."
        )
    return "\n".join(lines)


def _row(product: Product, remainder: Remainder) -> tuple[str, ...]:
    counted = f"{remainder.share(product.multiplications):.1%}" if product.multiplications else "unknown"
    return product.node, product.op, human_size(product.weight_bytes), counted, product.reason


def _where(bucket: Mapping[str, int]) -> str:
    return f" at {', '.join(f'{name}={size}' for name, size in bucket.items())}" if bucket else ""
