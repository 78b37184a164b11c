"""How many connections each worker has, in memory that all share, so that who has more leaves the next to others."""

from __future__ import annotations

import mmap

_EMPTY = -1


class Seats:
    """One for each worker, made before they are forked.

    Args:
        count: How many workers there can be at a time.
    """

    def __init__(self, count: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 8 * count)).cast("q")
        for seat in range(count):
            self.leave(seat)

    def take(self) -> int:
        """An empty seat, or the last one, which several may have."""
        seat = next((i for i, count in enumerate(self._counts) if count == _EMPTY), len(self._counts) - 1)
        self._counts[seat] = 0
        return seat

    def leave(self, seat: int) -> None:
        """The worker takes no more connections."""
        self._counts[seat] = _EMPTY

    def tell(self, seat: int, connections: int) -> None:
        """What a worker has now."""
        self._counts[seat] = connections

    def crowded(self, seat: int) -> bool:
        """Whether another worker has fewer connections."""
        return any(_EMPTY < count < self._counts[seat] for count in self._counts)
