"""The table of products that armopt plans for.

One TOML each in this folder: figures and, in ``[provenance]``, where each comes from. No logic depends on a name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from armopt.errors import InputError
from armopt.ir.records import Target
from armopt.tables import Line, Table
from armopt.targets.clock import Clock

HOST = "host"
_SCHEMA: Mapping[str, type] = {
    "name": str,
    "core": str,
    "midr": list,
    "isa_features": list,
    "vector_bits": int,
    "simd_pipes": int,
    "l2_kib": int,
    "cores": int,
    "qemu_cpu": str,
    "cost_table": str,
    "clock": Clock,
    "provenance": dict,
}
_OPTIONAL = {"qemu_cpu", "cost_table", "clock"}
_KINDS: Mapping[type, str] = {
    str: "a string",
    int: "a positive whole number",
    list: "a list of strings",
    dict: "a table of strings",
    Clock: f"a table of positive numbers: {', '.join(field.name for field in fields(Clock))}",
}


@dataclass(frozen=True, slots=True)
class Product:
    """What one TOML says.

    Attributes:
        target: The figures.
        midr: ``implementer:part`` as in /proc/cpuinfo, e.g. ``0x41:0xd40``; several products may share one.
        qemu_cpu: Name of the core in QEMU 10.0 (``-cpu``), empty where it emulates none.
        clock: What turns work into time there; None where nothing is known.
    """

    target: Target
    midr: tuple[str, ...]
    qemu_cpu: str = ""
    clock: Clock | None = None


@cache
def table() -> Table[Product]:
    """All products by name: those of this folder, and what others add."""
    folder = resources.files("armopt.targets")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    found = (parse_product(file.read_text(encoding="utf-8"), file.name) for file in files)
    return Table("target", *(Line(product.target.name, product) for product in found))


def names() -> tuple[str, ...]:
    """All products, sorted; :func:`load` takes these and ``host``."""
    return tuple(sorted(table()))


def product(name: str) -> Product:
    """The product called `name`, with what is needed to detect and to emulate it.

    Raises:
        InputError: No such product.
    """
    return table().find(name, also=(HOST,))


def clock_of(target: Target) -> Clock | None:
    """The clock of the product that a target is, or of one that a host may be; None where nothing is known."""
    known = [target.name, *target.provenance.get("product", "").split(", ")]
    return next((table()[name].clock for name in known if name in table() and table()[name].clock), None)


def parse_product(text: str, where: str) -> Product:
    """A product from its TOML.

    Args:
        text: The TOML.
        where: Its file name, for messages; its stem must be the product's name.

    Raises:
        InputError: A field is unknown, missing, of the wrong type, or without provenance.
    """

    def fail(what: str) -> InputError:
        return InputError(what, where=where, hint="See armopt/targets/graviton3.toml for a complete example")

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise fail(f"not valid TOML: {error}") from error
    if missing := sorted(_SCHEMA.keys() - _OPTIONAL - data.keys()):
        raise fail(f"missing {', '.join(missing)}")
    if unknown := sorted(data.keys() - _SCHEMA.keys()):
        raise fail(f"unknown {', '.join(unknown)}")
    for key, value in data.items():
        if not _fits(value, _SCHEMA[key]):
            raise fail(f"{key} must be {_KINDS[_SCHEMA[key]]}, not {value!r}")
    if data["name"] != where.removesuffix(".toml"):
        raise fail(f"name is {data['name']!r}")
    if bad := [m for m in data["midr"] if not re.fullmatch(r"0x[0-9a-f]{2}:0x[0-9a-f]{3}", m)]:
        raise fail(f"midr must look like 0x41:0xd40, not {bad[0]}")
    provenance: dict[str, str] = data.pop("provenance")
    expected = data.keys() - {"name", "clock"} | {f"clock.{name}" for name in data.get("clock", ())}
    if provenance.keys() != expected:
        raise fail(f"provenance must have exactly {', '.join(sorted(expected))}")
    midr, qemu_cpu, clock = data.pop("midr"), data.pop("qemu_cpu", ""), data.pop("clock", None)
    data["isa_features"] = frozenset(data["isa_features"])
    return Product(Target(**data, provenance=provenance), tuple(midr), qemu_cpu, clock and Clock(**clock))


def _fits(value: Any, kind: type) -> bool:
    if kind is Clock:
        return isinstance(value, dict) and _is_clock(value)
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, int):
        return value > 0
    if isinstance(value, str):
        return bool(value)
    items: list[Any] = []
    if isinstance(value, dict):
        items = [*value.values()]
    elif isinstance(value, list):
        items = value
    return bool(items) and all(isinstance(item, str) and item for item in items)


def _is_clock(value: Mapping[str, Any]) -> bool:
    named = value.keys() == {field.name for field in fields(Clock)}
    return named and all(isinstance(each, (int, float)) and each > 0 for each in value.values())
