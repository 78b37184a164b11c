"""Results of whole models, kept from run to run in one file for each core and torch release."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "arm64"


@dataclass(frozen=True)
class Kept:
    """What was found on one core with one torch release."""

    cpu: str
    torch_version: str

    @property
    def path(self) -> Path:
        """The file."""
        return CACHE / f"models-{self.cpu}-{self.torch_version}.json"

    def load(self) -> dict[str, dict[str, Any]]:
        """What was found until now: workload -> contender -> classes or error."""
        try:
            return json.loads(self.path.read_text())  # type: ignore[no-any-return]
        except FileNotFoundError:
            return {}

    def add(self, workload: str, contender: str, entry: Mapping[str, Any]) -> None:
        """Adds one result."""
        with self._lock():
            results = self.load()
            results.setdefault(workload, {})[contender] = entry
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps(results, indent=1, sort_keys=True))
            partial.replace(self.path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Keeps another run from writing results at the same time: two fit a machine of two cores."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
