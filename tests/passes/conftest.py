"""Runs the tests of a :class:`harness.Contract` on each of its cases."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("harness")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and metafunc.cls is not None:
        metafunc.parametrize("case", metafunc.cls.cases, ids=str)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether ``--update-golden`` is given."""
    return bool(request.config.getoption("--update-golden"))
