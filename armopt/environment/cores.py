"""Which cores each of several worker processes is to run on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from armopt.environment.threads import affinity, cgroup_quota
from armopt.files import read_or_empty


def cores_for_workers(workers: int, *, root: Path = Path("/")) -> tuple[frozenset[int], ...]:
    """The CPUs of each worker: all that this process may use, divided, and none across NUMA nodes if that can be.

    Empty where workers are better left to the scheduler: where a cgroup allows less time than there are CPUs (others
    may sit on the same ones), or where there are fewer physical cores than workers.

    Args:
        workers: How many.
        root: Where /proc and /sys are found; for tests.
    """
    quota = cgroup_quota(root)
    cores = _cores(affinity(), root)
    if workers > len(cores) or (quota is not None and quota < sum(map(len, cores))):
        return ()
    nodes = _by_node(cores, root)
    if workers < len(nodes) or workers % len(nodes):
        nodes = [[core for node in nodes for core in node]]
    each = workers // len(nodes)
    if any(len(node) < each for node in nodes):
        nodes, each = [cores], workers
    return tuple(frozenset(cpu for core in part for cpu in core) for node in nodes for part in _divided(node, each))


def _divided(cores: Sequence[frozenset[int]], parts: int) -> list[Sequence[frozenset[int]]]:
    bounds = [len(cores) * i // parts for i in range(parts + 1)]
    return [cores[a:b] for a, b in pairwise(bounds)]


def _cores(cpus: frozenset[int], root: Path) -> list[frozenset[int]]:
    """The CPUs by physical core."""
    base = root / "sys/devices/system/cpu"
    found: dict[frozenset[int], None] = {}
    for cpu in sorted(cpus):
        siblings = cpu_list(read_or_empty(base / f"cpu{cpu}/topology/thread_siblings_list")) & cpus
        found[siblings or frozenset({cpu})] = None
    return list(found)


def _by_node(cores: Sequence[frozenset[int]], root: Path) -> list[list[frozenset[int]]]:
    base = root / "sys/devices/system/node"
    listed = sorted(cpu_list(read_or_empty(base / "online")) or {0})
    nodes = [cpu_list(read_or_empty(base / f"node{node}/cpulist")) for node in listed]
    found = [[core for core in cores if core <= cpus] for cpus in nodes]
    rest = [core for core in cores if not any(core in node for node in found)]
    return [node for node in (*found, rest) if node]


def cpu_list(text: str) -> frozenset[int]:
    """Linux's lists of CPUs: ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
