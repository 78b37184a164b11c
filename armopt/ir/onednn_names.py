"""What oneDNN's names of implementations say, without torch: logs are read before it is imported."""

from __future__ import annotations

import re


def is_reference(name: str) -> bool:
    """Whether an implementation is correct and far too slow: ``ref:any``, ``gemm:ref``."""
    return any(part.startswith("ref") for part in re.split(r"[:_+]", name))
