"""What all compiled models of this process share, in one object."""

from __future__ import annotations

import threading
import warnings
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.utils.weak import WeakTensorKeyDictionary

from armopt.dynamo.weight_pool import WeightPool
from armopt.errors import ArmoptWarning

if TYPE_CHECKING:
    from armopt.dynamo.graphs import Graph, Weights


class Watch(threading.local):
    """In each thread: where to note the programs that run, as their weights and their number; None for nobody."""

    ran: list[tuple[Weights, int]] | None = None


@dataclass(eq=False)
class Process:
    """State of a process.

    Attributes:
        pool: Stored and packed weights of all programs.
        lock: Held while a program is made or weights are released.
        graphs: All graphs that are alive.
        released: Released weight -> its values in BF16.
        made: How many programs were made.
        checked: Targets and CPU features that this host was compared with.
        said: Reasons to fall back, or to plan nothing, that were warned of.
        watch: Who is told, in this thread, which programs run.
    """

    pool: WeightPool = field(default_factory=WeightPool)
    lock: threading.RLock = field(default_factory=threading.RLock)
    graphs: weakref.WeakSet[Graph] = field(default_factory=weakref.WeakSet)
    released: Any = field(default_factory=WeakTensorKeyDictionary)
    made: int = 0
    checked: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    watch: Watch = field(default_factory=lambda: Watch())

    def warn_once(self, what: str, hint: str, reason: str = "") -> None:
        """Warns, once for each `reason`, or else for each text."""
        key = reason or what
        if key not in self.said:
            self.said.add(key)
            warnings.warn(f"armopt: {what}. {hint}", ArmoptWarning, stacklevel=3)


PROCESS = Process()
