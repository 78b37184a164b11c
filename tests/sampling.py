"""Of cases that take long together `make test` runs a sample; `make test-full` runs all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """The first of so many cases as it is, the others marked `full`."""
    return [case if i % every == 0 else _full(case) for i, case in enumerate(cases)]


def only(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Some cases as they are, the others marked `full`."""
    kept = set(kept)
    return [case if case in kept else _full(case) for case in cases]


def _full(case: Any) -> Any:
    return pytest.param(case, marks=pytest.mark.full)
