"""The classes of instructions that are counted, and which opcode belongs to which: what opcodes.def says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("opcodes.def")
#: In the order of the plugin's counters.
CLASSES = (
    *("sve_bfmmla", "neon_bfmmla", "bfdot", "fmla"),
    *("vector_load", "vector_store", "vector_other", "other"),
)
_RULE = re.compile(r"^RULE\((\w+), 0x([0-9A-F]{8}), 0x([0-9A-F]{8})\)", re.MULTILINE)


@cache
def rules() -> list[tuple[str, int, int]]:
    """(class, mask, value), in the order in which they are tried."""
    return [(name, int(mask, 16), int(value, 16)) for name, mask, value in _RULE.findall(TABLE.read_text())]


@cache
def classify(opcode: int) -> str:
    """The class of one 32-bit instruction."""
    return next(name for name, mask, value in rules() if opcode & mask == value)
