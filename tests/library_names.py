"""Which shared libraries of a framework could read a variable."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from armopt.environment.build import holds, libraries, needle


def variables_read(names: Iterable[str], package: Path) -> dict[str, tuple[str, ...]]:
    """The libraries that hold the name of each variable.

    oneDNN puts its prefix before the name at run time, so for its variables the rest is searched. Reads every
    library whole (some 0.3 GB).

    Args:
        names: Variables to look for.
        package: The folder of torch or TensorFlow.
    """
    found = libraries(package)
    return {name: tuple(file.name for file in found if holds(file, needle(name))) for name in names}
