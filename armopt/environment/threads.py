"""How many threads a worker may have on this host: by affinity, cores and cgroups."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from armopt.files import read_or_empty


def threads_for_host(workers: int = 1, *, root: Path = Path("/")) -> int:
    """Threads for each of `workers` processes: never more, in all, than the CPUs this process may use.

    The least of the cgroup's CPU quota (v1 and v2, rounded down), the scheduler affinity and the physical
    cores within it (of two hyperthreads one counts; Arm servers have one thread per core), divided by
    `workers`; at least 1.

    Args:
        workers: Processes that will run at the same time on this host.
        root: Where /proc and /sys are found; for tests.
    """
    cpus = affinity()
    limits = [len(cpus), _physical(cpus, root)]
    if (quota := cgroup_quota(root)) is not None:
        limits.append(int(quota))
    return max(1, min(limits) // max(1, workers))


def affinity() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical(cpus: frozenset[int], root: Path) -> int:
    base = root / "sys/devices/system/cpu"
    siblings = {
        cpu: read_or_empty(base / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu) for cpu in cpus
    }
    return len(set(siblings.values()))


def cgroup_quota(root: Path) -> float | None:
    """CPUs that the cgroups of this process allow it, None where none limits it."""
    quotas: list[float] = []
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / f"sys/fs/cgroup/{name}" for name in (controllers, "cpu", "cpu,cpuacct")]
        else:
            continue
        # Any ancestor may set the limit; in a container the path may be the host's, which isn't mounted.
        inner = Path(path.strip().lstrip("/"))
        for mount in mounts:
            for folder in (mount / inner, *(mount / p for p in inner.parents), mount):
                quota, period = (*read_or_empty(folder / "cpu.max").split(), "", "")[:2]
                if not quota:
                    quota = read_or_empty(folder / "cpu.cfs_quota_us").strip()
                    period = read_or_empty(folder / "cpu.cfs_period_us").strip()
                if quota.isdecimal() and period.isdecimal() and int(period):
                    quotas.append(int(quota) / int(period))
    return min(quotas, default=None)
