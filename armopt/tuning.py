"""What ``armopt tune`` measured: seconds of each kernel on each shape, as a file and as costs for the planner."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from armopt import text_file
from armopt.costs import CostTable
from armopt.errors import InputError
from armopt.ir import Site
from armopt.kernels import table
from armopt.kernels.base import Kernel

_SCHEMA = 1
#: Facts of a site that a time depends on.
_FACTS = (
    *("op", "shape", "weight", "stride", "padding", "dilation", "groups", "transposed", "output_padding", "post_op"),
)


@dataclass(frozen=True, slots=True)
class Tuning:
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


@dataclass(frozen=True, slots=True)
class TunedCosts:
    """Measured times where there are any, the table elsewhere, in the table's unit.

    Attributes:
        tuning: The times.
        costs: The table of the core; None for a host that has none, where times alone count.
    """

    tuning: Tuning
    costs: CostTable | None = None

    @property
    def name(self) -> str:
        """The host that was measured."""
        return f"tuned on {self.tuning.host.get('core', 'a host')}, torch {self.tuning.host.get('torch', '')}"

    def describe(self, cost: float) -> str:
        """A cost with its unit: a time, or a time in the table's unit."""
        return f"{cost / 1e3:.3g} us here" if self.costs is None else f"{self.costs.describe(cost)}, by time here"

    def estimate(self, kernel: Kernel, site: Site) -> float | None:
        """The time of a kernel on a site, scaled to the table's unit by what both know of the site."""
        times = self.tuning.of(site)
        if not times:
            return None if self.costs is None else self.costs.estimate(kernel, site)
        if kernel.name not in times:
            return None
        return times[kernel.name] * self._scale(times, site)

    def pointwise(self, name: str, elements: int) -> float:
        """As in the table; where there is none, a microsecond and a third of a nanosecond for each element."""
        return 1000 + 0.3 * elements if self.costs is None else self.costs.pointwise(name, elements)

    def attention(self, dtype: str, heads: int, scores: int, products: int) -> float:
        """It is not timed."""
        return 0.0

    def _scale(self, times: Mapping[str, float], site: Site) -> float:
        if self.costs is None:
            return 1e9
        known = {name: self.costs.estimate(table.get(name), site) for name in times}
        ratios = [cost / times[name] for name, cost in known.items() if cost is not None]
        return statistics.median(ratios) if ratios else 1e9


def write(tuning: Tuning, path: Path) -> None:
    """Writes tuning.json, whole or not at all.

    Raises:
        InputError: The place can't be written.
    """
    content = {
        "schema_version": _SCHEMA,
        "host": dict(tuning.host),
        "seconds": {k: dict(v) for k, v in tuning.times.items()},
    }
    text_file.write(path, json.dumps(content, indent=1, sort_keys=True) + "\n", "-o")


def read(path: Path) -> Tuning:
    """Reads tuning.json.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != _SCHEMA:
            raise InputError(f"has schema {content['schema_version']}", where=str(path), hint="Run armopt tune again")
        seconds = {
            key: {table.get(name).name: float(value) for name, value in times.items()}
            for key, times in content["seconds"].items()
        }
        return Tuning({str(k): str(v) for k, v in content["host"].items()}, seconds)
    except OSError as error:
        raise InputError(
            f"can't be read: {error.strerror}", where=str(path), hint="Make one with armopt tune"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError("is no tuning file", where=str(path), hint="Make one with armopt tune") from None
