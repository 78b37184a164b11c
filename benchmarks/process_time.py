"""How long a process has worked, which a busy machine doesn't change."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def worked(process: int) -> float:
    """Seconds that a process has had a core for; 0 where it is gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0
