"""Remembers what probes found, per host and torch build, so that the next start pays nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from armopt.files import cache_folder, read_regular, write_whole
from armopt.ir.records import Site

_SCHEMA = 1
#: More than any bundle has; what is over is forgotten, oldest first.
_MOST = 20_000
_MOST_BYTES = 1 << 26


def key(kernel: str, site: Site, packed_for: tuple[int, ...]) -> str:
    """What a verdict depends on: the kernel, all of the site but its names, and the shape its weight was packed for."""
    facts = asdict(site)
    for name in ("node", "weight_key", "source", "residual", "escapes", "attended"):
        del facts[name]
    return json.dumps([kernel, list(packed_for), facts], sort_keys=True)


def path_for(facts: Mapping[str, str]) -> Path | None:
    """The file for a host and build described by `facts`; None where there is no folder for it."""
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    return None if folder is None else folder / "probe" / f"{digest}.json"


def read(path: Path) -> dict[str, str | None]:
    """Verdicts by key: a reason for refusal, or None. A file that can't be read counts as empty."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        content = json.loads(read_regular(path, _MOST_BYTES))
        if content["schema"] == _SCHEMA:
            return {k: v for k, v in content["verdicts"].items() if v is None or isinstance(v, str)}
    return {}


def write(path: Path, found: Mapping[str, str | None], *, forget: bool = False) -> None:
    """Adds verdicts to the file, whole: another process sees the old file or the new one.

    A place that can't be written is no error: the next start probes again.

    Args:
        path: The file.
        found: The verdicts.
        forget: Whether what the file holds goes.
    """
    with contextlib.suppress(OSError):
        merged = {**({} if forget else read(path)), **found}
        kept = dict(list(merged.items())[-_MOST:])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"schema": _SCHEMA, "verdicts": kept}))
