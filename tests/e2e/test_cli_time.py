"""Estimated time on the command line: `plan --threads`, `plan --compare`, `optimize --threads`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_helpers import Cli

from armopt import targets

_MODEL = ("--model", "torchvision:squeezenet1_1", "--input", "1x3x64x64", "--policy", "cost=2.10")


def test_targets_and_threads_are_compared(cli: Cli, tmp_path: Path) -> None:
    compared = ("plan", *_MODEL, "--compare", "graviton2,graviton3,graviton4,yitian710", "--threads", "1,16")
    done = cli(*compared, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    estimates = json.loads(done.out)["estimates"]
    clocked = ("graviton2", "graviton3", "graviton4", "yitian710")
    assert [(e["target"], e["threads"]) for e in estimates] == [(name, n) for name in clocked for n in (1, 16)]
    of_two, one, sixteen = estimates[0], *estimates[2:4]
    assert of_two["milliseconds"] > one["milliseconds"]  # a core without BF16
    assert one["milliseconds"] > sixteen["milliseconds"] > 0
    assert one["per_second"] == pytest.approx(1000 / one["milliseconds"])
    # the first layer, of 64 filters on 3 channels, is in FP32 on one thread
    assert one["weight_bytes"] - sixteen["weight_bytes"] == 64 * 3 * 3 * 3 * 2
    assert 2 < one["weight_bytes"] / 1e6 < 3  # 1.24 million weights in BF16
    shown = cli(*compared, cwd=tmp_path).out
    assert "Estimated, never measured" in shown
    assert f"within {targets.product('graviton3').clock.error:.1f}x" in shown


def test_a_plan_says_microseconds_threads_and_error(cli: Cli, tmp_path: Path) -> None:
    shown = cli("plan", *_MODEL, "--threads", "4", "--layers", cwd=tmp_path)
    assert shown.code == 0, shown.err
    assert "time on 4 threads, within " in shown.out
    assert " us; " in shown.out
    assert "`KERNEL 1.08x` is\nthe runner-up" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--threads", "1,4"), "--threads: a plan is for one number of threads. Add --compare TARGETS"),
        (("--threads", "0"), "--threads: can't read '0'. Give numbers from 1 to 999"),
        (("--threads", "4,x", "--compare", "graviton3"), "--threads: can't read 'x'"),
        (("--compare", "axion"), "--compare: nothing is known of time on axion"),
        (("--compare", "graviton5", "--threads", "4"), "--compare: nothing is known of time on graviton5"),
        (("--compare", "graviton3,nothing"), "nothing"),
        (("--compare", ","), "--compare: names nothing"),
        (("--compare", "graviton3", "--text"), "--compare: estimates, and shows no plan"),
        (("--target", "axion", "--threads", "4"), "plans for axion don't depend on threads"),
        (("--policy", "threshold=64", "--threads", "4"), "can't read policy 'threshold=64@4'"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = cli("plan", *_MODEL, *arguments, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_a_machine_with_a_clock(cli: Cli, tmp_path: Path) -> None:
    done = cli("tune", "--report", "r.json", "--rounds", "3", cwd=tmp_path)
    if targets.clock_of(targets.this_host()) is None:
        assert done.code == 2
        assert "--report: armopt estimates no times for this host" in done.err
        assert list(tmp_path.iterdir()) == []
    else:
        assert json.loads((tmp_path / "r.json").read_text())["points"]
