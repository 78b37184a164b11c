"""What ``armopt tune`` measured: seconds of each kernel on each shape, as a file and as costs for the planner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from armopt import files
from armopt.errors import InputError
from armopt.ir.records import Site
from armopt.kernels import table

_SCHEMA = 1
_MOST_BYTES = 1 << 26
#: Facts of a site that a time depends on.
_FACTS = (
    *("op", "shape", "weight", "stride", "padding", "dilation", "groups", "transposed", "output_padding", "post_op"),
)


@dataclass(frozen=True, slots=True)
class Timings:
    """Median seconds of one call, by site and kernel.

    Attributes:
        host: What was measured: core, torch, threads.
        times: By :func:`site_key`, then by kernel.
    """

    host: Mapping[str, str]
    times: Mapping[str, Mapping[str, float]]

    def of(self, site: Site) -> Mapping[str, float]:
        """Times by kernel; empty for a site that was not measured."""
        return self.times.get(site_key(site), {})


def site_key(site: Site) -> str:
    """What a time depends on, as text."""
    facts = asdict(site)
    return json.dumps({name: facts[name] for name in _FACTS}, sort_keys=True)


def write(tuning: Timings, path: Path) -> None:
    """Writes tuning.json, whole or not at all.

    Raises:
        InputError: The place can't be written.
    """
    content = {
        "schema_version": _SCHEMA,
        "host": dict(tuning.host),
        "seconds": {k: dict(v) for k, v in tuning.times.items()},
    }
    files.write(path, json.dumps(content, indent=1, sort_keys=True) + "\n", "-o")


def read(path: Path) -> Timings:
    """Reads tuning.json.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    try:
        content = json.loads(files.read_regular(path, _MOST_BYTES))
        if content["schema_version"] != _SCHEMA:
            raise InputError(f"has schema {content['schema_version']}", where=str(path), hint="Run armopt tune again")
        seconds = {
            key: {table.get(name).name: float(value) for name, value in times.items()}
            for key, times in content["seconds"].items()
        }
        return Timings({str(k): str(v) for k, v in content["host"].items()}, seconds)
    except OSError as error:
        raise InputError(
            f"can't be read: {error.strerror}", where=str(path), hint="Make one with armopt tune"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError("is no tuning file", where=str(path), hint="Make one with armopt tune") from None
