"""Times are written, read, and decide; a damaged file is an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from armopt import targets
from armopt.deploy import tune
from armopt.errors import InputError
from armopt.ir.records import Site
from armopt.kernels import table, timings
from armopt.kernels.timings import Timings
from armopt.plan.cost_policy import CostPolicy
from armopt.plan.tuned_costs import TunedCosts

SITE = Site("fc", "linear", 8, 64, 32, (8, 64), (32, 64), source="x")


def _tuning(**seconds: float) -> Timings:
    return Timings({"core": "here", "torch": "2.13.0"}, {timings.site_key(SITE): seconds})


def test_kernels_are_really_timed_on_this_host() -> None:
    found = tune.measure([SITE, replace(SITE, node="again")], rounds=3, fast_math=False)
    assert list(found.times) == [timings.site_key(SITE)]  # the same shape once
    times = found.of(SITE)
    assert {"blas_fp32", "aten_linear"} <= set(times)
    assert not any(table.get(name).fast_math for name in times)
    assert all(seconds > 0 for seconds in times.values())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = _tuning(blas_fp32=1e-6, conv1x1_bf16=2e-6)
    timings.write(made, tmp_path / "tuning.json")
    assert timings.read(tmp_path / "tuning.json") == made
    assert [entry.name for entry in tmp_path.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"schema_version": 1}', '{"schema_version": 1, "host": {}, "seconds": {"a": {"blas_fp32": "x"}}}'],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    with pytest.raises(InputError, match="no tuning file"):
        timings.read(path)


def test_another_schema_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    with pytest.raises(InputError, match="armopt tune"):
        timings.read(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(InputError, match="schema 99"):
        timings.read(path)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be written"):
        timings.write(_tuning(), tmp_path / "missing" / "tuning.json")


@pytest.mark.parametrize(("quick", "slow"), [("blas_fp32_w16", "conv1x1_bf16"), ("conv1x1_bf16", "blas_fp32_w16")])
def test_the_plan_takes_what_was_quicker_here(quick: str, slow: str) -> None:
    costs = TunedCosts(_tuning(**{quick: 1e-5, slow: 9e-5}))
    choice = CostPolicy(costs).choose([SITE], targets.load("graviton3"))[0]
    assert choice.kernel is not None
    assert choice.kernel.name == quick
    assert "tuned on here" in CostPolicy(costs).name


def test_a_site_that_was_not_measured_is_not_guessed() -> None:
    costs = TunedCosts(_tuning(blas_fp32_w16=1e-5))
    other = replace(SITE, shape=(9, 64), m=9)
    assert costs.estimate(table.get("blas_fp32_w16"), other) is None
