"""One reader of files that armopt has, as the fuzzer sees it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """A reader of files, and what it takes to fuzz it.

    Attributes:
        name: In the table of a run and in the names of inputs that failed.
        seeds: Writes small valid files or folders into a folder, and says which.
        read: Reads one the way the product does, up to and including load and one run on its recorded inputs.
        mutate: Changes one in place so that it stays well-formed; None where bytes alone are changed.
        share: How many of its inputs are among so many of all readers': fewer where reading one takes long.
    """

    name: str
    seeds: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    mutate: Callable[[random.Random, Path], None] | None
    share: int = 8
