"""The Compute Library's number of threads; with the library itself in tests/arm64/test_own_arm64.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from armopt.errors import ArmoptWarning
from armopt.kernels.onednn import compute_library


@pytest.fixture(autouse=True)
def unsaid() -> Iterator[None]:
    compute_library.warn_of_other_threads.cache_clear()
    yield
    compute_library.warn_of_other_threads.cache_clear()


def test_a_build_without_the_library_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_library.symbols, "loaded", lambda name: None)
    assert compute_library.threads() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_library.warn_of_other_threads(4)


def test_another_number_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_library, "threads", lambda: 1)
    with pytest.warns(ArmoptWarning, match=r"works with 1 thread, PyTorch with 4: .*Set OMP_NUM_THREADS"):
        compute_library.warn_of_other_threads(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_library.warn_of_other_threads(4)
        compute_library.warn_of_other_threads(1)
