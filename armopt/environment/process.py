"""The environment of one process: what it is to start with, what was set too late, and what a value means."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from armopt.environment.fpmath import FPMATH, FPMATH_NAMES, allows_bf16, fpmath_mode
from armopt.environment.variables import COSTS, PRELOAD, Variable
from armopt.ir.records import Target


def for_process(
    wanted: Mapping[str, Variable], environ: Mapping[str, str], *, limit: int
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment of a process that is to have the variables `wanted`, and what is worth saying about it.

    Whatever else is in `environ` stays, LD_PRELOAD too, even if empty: there the user chose. oneDNN's own prefix would
    win, so it goes where it says something else.

    Args:
        wanted: See :func:`armopt.environment.wanted`.
        environ: Of this process.
        limit: CPUs that all workers on this host share, see :func:`threads_for_host`.
    """
    found, remarks = dict(environ), []
    for name, variable in sorted(wanted.items()):
        if name != PRELOAD or name not in environ:
            found[name] = variable.value
    own = FPMATH_NAMES[0]
    if FPMATH in wanted and own in found and not agree(FPMATH, wanted[FPMATH].value, found[own]):
        remarks.append(f"{own}={found.pop(own)} would win over {FPMATH}={wanted[FPMATH].value}: removed")
    threads = found.get("OMP_NUM_THREADS", "")
    if "OMP_NUM_THREADS" in wanted and threads.isdecimal() and int(threads) > limit:
        remarks.append(f"OMP_NUM_THREADS={threads} on {limit} CPUs: {COSTS['OMP_NUM_THREADS']}")
    return found, tuple(remarks)


def late_variables(
    names: Iterable[str],
    *,
    environ: Mapping[str, str] | None = None,
    initial: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Those of `names` whose value isn't the one this process started with.

    Whether that was too late depends on when torch was imported: whatever changed after that has no effect.

    Args:
        names: Variables to look at.
        environ: Now; None takes os.environ.
        initial: At the start; None takes the kernel's copy, and where it keeps none, nothing counts as late.
    """
    now = os.environ if environ is None else environ
    start = _initial_environment() if initial is None else initial
    if start is None:
        return ()
    return tuple(n for n in names if n in now and now[n] != start.get(n))


def import_remark(
    host: Target, environ: Mapping[str, str] | None = None, *, started: Mapping[str, str] | None = None
) -> str:
    """What a process loses that imported torch without fast math on an Arm core with BF16; empty where nothing.

    Cheap, and imports nothing: for ``import armopt`` itself.

    Args:
        host: This machine.
        environ: Now; None takes os.environ.
        started: The environment at the start of the process; None asks the kernel.
    """
    now = os.environ if environ is None else environ
    start = _initial_environment() if started is None else started
    if "torch" not in sys.modules or not is_arm(host) or not host.bf16:
        return ""
    if agree(FPMATH, "BF16", effective(FPMATH, now if start is None else start, host)):
        return ""
    how = "set after the process started" if effective(FPMATH, now, host) else "not set"
    return (
        f"torch was imported before armopt, and {FPMATH} was {how}: {COSTS[FPMATH]}. "
        "Start the process with: armopt run BUNDLE -- CMD"
    )


def effective(name: str, environ: Mapping[str, str], host: Target) -> str:
    """The value of a variable as its reader takes it, its default where it is not set."""
    if name == FPMATH:
        return fpmath_mode(environ)
    if name == "LRU_CACHE_CAPACITY" and name not in environ and not is_arm(host):
        return "1024"
    if name == "OMP_PROC_BIND" and name not in environ:
        # libgomp binds where places are given and binding isn't mentioned.
        return "true" if environ.keys() & {"OMP_PLACES", "GOMP_CPU_AFFINITY"} else "false"
    return environ.get(name, "")


def agree(name: str, expected: str, found: str) -> bool:
    """Whether a value does what another one would."""
    if name == FPMATH and allows_bf16(expected):
        return allows_bf16(found)
    if name == "LRU_CACHE_CAPACITY" and found.isdecimal() and expected.isdecimal():
        return int(found) >= int(expected)
    return expected.lower() == found.lower()


def is_arm(host: Target) -> bool:
    """Whether a host is an Arm machine."""
    return "asimd" in host.isa_features  # every aarch64 has Advanced SIMD, and the name is Arm's


def _initial_environment() -> dict[str, str] | None:
    try:
        content = Path("/proc/self/environ").read_bytes()
    except OSError:
        return None
    entries = (entry.partition(b"=") for entry in content.split(b"\0") if entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in entries}
