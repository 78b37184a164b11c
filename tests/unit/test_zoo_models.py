"""The models made for the tests; that each runs and exports, tests/e2e/test_zoo_sample.py says."""

from __future__ import annotations

import pytest

from tests import zoo_models


def test_each_has_an_example() -> None:
    assert set(zoo_models.MODELS) == set(zoo_models.EXAMPLES)


@pytest.mark.parametrize("name", zoo_models.MODELS)
def test_each_is_seeded(name: str) -> None:
    one, other = (zoo_models.MODELS[name]().state_dict() for _ in range(2))
    assert list(one) == list(other)
    assert all(one[key].equal(other[key]) for key in one)
    assert all(tensor.isfinite().all() for tensor in one.values())
