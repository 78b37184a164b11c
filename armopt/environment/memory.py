"""How much memory this process may have."""

from __future__ import annotations

import os
from pathlib import Path

from armopt.files import read_or_empty


def memory_for_process(*, root: Path = Path("/")) -> int:
    """Bytes: the least of the machine's memory, its cgroups' limits (v1 and v2) and what is left of its address space.

    Args:
        root: Where /proc and /sys are found; for tests.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits(root)]
    try:
        import resource
    except ImportError:  # no POSIX
        return min(limits)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space == resource.RLIM_INFINITY:
        return min(limits)
    return min(*limits, max(0, address_space - _address_space_taken(root)))


def _address_space_taken(root: Path) -> int:
    """Bytes: mostly libraries and memory that was set aside, of which little was touched."""
    pages = read_or_empty(root / "proc/self/statm").split()
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _cgroup_limits(root: Path) -> list[int]:
    found = []
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        # any ancestor may set the limit; in a container the path may be the host's, which isn't mounted
        inner = Path(path.strip().lstrip("/"))
        for folder in (mount / inner, *(mount / parent for parent in inner.parents), mount):
            texts = (read_or_empty(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes"))
            found += [int(text) for text in texts if text.isdecimal()]
    return found
