"""Which core QEMU emulates a product with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from armopt.errors import InputError
from armopt.targets.products import table

if TYPE_CHECKING:
    from armopt.emulation import Core


def emulated() -> dict[str, str]:
    """The products that can be emulated, each with QEMU's name of its core."""
    return {name: product.qemu_cpu for name, product in table().items() if product.qemu_cpu}


def core_named(cpu: str) -> Core:
    """The core of a product (``graviton3``), or the one that QEMU calls so (``neoverse-v1``).

    Raises:
        InputError: QEMU has no model of it.
    """
    from armopt.emulation import CORES  # not above: help lists the products

    products = emulated()
    core = CORES.get(products.get(cpu, cpu))
    if core is None:
        known = ", ".join([*products, *CORES])
        raise InputError(f"QEMU 10.0 has no model of {cpu!r}", where="--cpu", hint=f"Choose one of {known}")
    return core
