"""Draws a graph as rails beside a list: a line for each node, a rail for each value from its making to its last use.

So a drawing is as long as the list and as narrow as the values that live at once, whatever the graph's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Where the node stands in its line, in pixels from the line's top.
MIDDLE = 17
_PITCH, _WIDEST = 14.0, 168.0


@dataclass(frozen=True, slots=True)
class Crossing:
    """The rails at one node's line, as places in pixels from the left.

    Attributes:
        at: Where the node is.
        passing: Rails that go from the line's top to its foot.
        joining: Curves from the line's top to the node, as SVG writes them: one for each value that it reads.
        leaving: Whether a rail goes on from the node.
    """

    at: float
    passing: tuple[float, ...]
    joining: tuple[str, ...]
    leaving: bool


@dataclass(frozen=True, slots=True)
class Rails:
    """All lines by their node, and the width of the drawing in pixels."""

    lines: Mapping[str, Crossing]
    width: float


def lay(reads: Mapping[str, Sequence[str]]) -> Rails:
    """Rails for nodes in their order, each with the nodes that it reads: those stand before it."""
    last = {source: name for name, sources in reads.items() for source in sources}
    lanes: dict[str, int] = {}
    found: list[tuple[str, int, list[int], list[int]]] = []
    for name, sources in reads.items():
        before = dict(lanes)
        ending = [source for source in sources if last[source] == name]
        for source in ending:
            lanes.pop(source, None)
        taken = set(lanes.values())
        own = min([before[source] for source in ending] or set(range(len(taken) + 1)) - taken)
        found.append((name, own, sorted(taken), sorted({before[source] for source in sources})))
        if name in last:
            lanes[name] = own
    most = max((max(own, *passing, 0) for _, own, passing, _ in found), default=0) + 1
    pitch = min(_PITCH, _WIDEST / most)

    def place(lane: int) -> float:
        return round(pitch * (lane + 0.5), 2)

    lines = {
        name: Crossing(
            at=place(own),
            passing=tuple(map(place, passing)),
            joining=tuple(_curve(place(lane), place(own)) for lane in joining),
            leaving=name in last,
        )
        for name, own, passing, joining in found
    }
    return Rails(lines, round(pitch * most, 1))


def _curve(start: float, end: float) -> str:
    return f"M{start},0 C{start},{MIDDLE / 2} {end},{MIDDLE / 2} {end},{MIDDLE}"
