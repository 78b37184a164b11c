"""This host as programs meet it: does it have what they need, and which of their kernels prove themselves here?"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from armopt import environment, targets
from armopt._version import __version__
from armopt.environment import Variable
from armopt.errors import ArmoptWarning, HostError
from armopt.kernels.timings import Timings
from armopt.kernels.timings import read as read_tuning
from armopt.runtime import own, probe_cache
from armopt.runtime.bind import Bound


def is_portable(machine: str) -> bool:
    """Whether programs for `machine` run here as portable twins alone."""
    return platform.machine() != machine


def check_host(
    target: str,
    wanted: Mapping[str, Variable],
    required_features: Sequence[str],
    versions: Mapping[str, str],
    *,
    what: str = "the bundle",
    strict: bool = False,
    remedy: str = "",
    stacklevel: int = 3,
) -> None:
    """Compares this host and process with what programs want: refuses what can't run, warns of what costs.

    Args:
        target: The product they are for.
        wanted: Variables, as a manifest has them.
        required_features: CPU features without which they must not run.
        versions: Of what made them; versions of a machine of another kind say nothing about this one.
        what: What to call them in an error.
        strict: Whether any difference is an error.
        remedy: The hint where strictness alone makes it one.
        stacklevel: Whose call the warnings are about.

    Raises:
        HostError: A feature is missing, or, if strict, anything differs.
    """
    differences = environment.differences(
        wanted,
        tuple(required_features),
        versions if versions.get("machine") == platform.machine() else {},
        targets.this_host(),
        os.environ,
        record=environment.record(),
        late=environment.late_variables(wanted),
    )
    for difference in differences:
        if difference.what == environment.FPMATH and not own.unavailable():
            continue  # an own primitive is told so itself, and a layer that has none says why it gives way
        if difference.severity == "hard":
            found = f"{difference.what}: expected {difference.expected}, found {difference.found}"
            raise HostError(f"{what} is for {target}. {found}", hint=difference.remedy)
        if difference.severity == "soft":
            if strict:
                raise HostError(str(difference), hint=remedy)
            warnings.warn(str(difference), ArmoptWarning, stacklevel=stacklevel)


@contextmanager
def remembering(known: dict[str, str | None]) -> Iterator[set[str]]:
    """Verdicts that probes reached here before are in `known` meanwhile; what is new is remembered at the end.

    Yields the keys of those verdicts. Where one is another at the end, it was wrong, and all of them are forgotten.
    """
    path = probe_cache.path_for(_build_facts())
    # a variable set after the start may have come too late for oneDNN: such a process neither learns nor teaches
    reliable = not environment.late_variables(environment.FPMATH_NAMES)
    found = probe_cache.read(path) if reliable and path is not None else {}
    known.update(found)
    before = len(known)
    yield set(found)
    wrong = any(known.get(key, "") != verdict for key, verdict in found.items())
    if reliable and path is not None and (wrong or len(known) != before):
        probe_cache.write(path, known, forget=wrong)


def timings_for(given: str | Path | None) -> Timings | None:
    """A file from ``armopt tune`` on this host; by default the one that ``ARMOPT_TUNING`` names."""
    path = given or os.environ.get("ARMOPT_TUNING")
    return read_tuning(Path(path)) if path else None


def changes(programs: Iterable[Sequence[Bound]]) -> str:
    """What is to be said where layers run another kernel than planned; empty where none does."""
    listed = [list(entries) for entries in programs]
    changed = {
        entry.node: entry
        for entries in listed
        for entry in entries
        if entry.kernel != entry.planned and not entry.reason.startswith("tuned")
    }
    if not changed:
        return ""
    first = next(iter(changed.values()))
    every = {entry.node for entries in listed for entry in entries}
    return (
        f"{len(changed)} of {len(every)} layers run another kernel than planned, "
        f"e.g. {first.node}: {first.kernel} ({first.reason})"
    )


def multiplies_bf16() -> bool:
    """Whether this build's BLAS has a product of BF16 matrices, as far as its files tell."""
    return environment.installed().get("sbgemm") != "no"


def _build_facts() -> dict[str, str]:
    """What a probe's verdict depends on besides the layer: the core, the libraries, armopt, and the fast-math mode."""
    host, record = targets.this_host(), environment.record()
    names = ("torch", "torch_git", "torch_build", "onednn", "acl", "blas", "threads")
    facts = {name: record.get(name, "") for name in names}
    facts |= {"armopt": __version__, "libtorch_cpu": environment.library_identity()}
    features = " ".join(sorted(host.isa_features))
    return facts | {"core": host.core, "features": features, "fast_math": str(environment.fast_math(os.environ))}
