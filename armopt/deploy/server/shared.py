"""The folder in which the workers of one server add up their metrics. It must be there before prometheus_client is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

#: Names the folder, to prometheus_client.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
_MEMORY = "/dev/shm"


def scratch() -> str | None:
    """A folder in memory, where the root file system may be read-only; None for the system's own choice."""
    return _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None


@contextmanager
def shared_metrics() -> Iterator[None]:
    """Has the folder while the block runs."""
    with tempfile.TemporaryDirectory(prefix="armopt-metrics-", dir=scratch()) as folder:
        os.environ[SHARED] = folder
        yield
