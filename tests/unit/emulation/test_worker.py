"""The worker with this machine's own Python in the place of the emulated one: the protocol, not the emulation."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from armopt.emulation import EmulatedError, EmulatedWorker, PreparedFolder
from armopt.emulation.folder import write_stamp
from armopt.errors import HostError

JOBS = "tests.arm64.jobs_emulation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    prepared = PreparedFolder(tmp_path_factory.mktemp("prepared"))
    for part in prepared.parts("2.10.0"):
        (prepared.path / part.name).mkdir(parents=True)
    python = prepared.wrappers / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for part in prepared.parts("2.10.0"):
        write_stamp(prepared.path / part.name, part.recipe)
    return prepared


@pytest.fixture(scope="module")
def worker(folder: PreparedFolder) -> Iterator[EmulatedWorker]:
    with EmulatedWorker("neoverse-v1", folder=folder, preload="json") as started:
        yield started


def test_a_job_is_found_by_module_and_name_or_is_a_function(worker: EmulatedWorker) -> None:
    assert worker.call("platform:machine").value == platform.machine()
    assert worker.call("pathlib:Path.cwd").value == Path(__file__).parents[3]
    assert worker.call(platform.machine).value == platform.machine()


@pytest.mark.parametrize("job", ["platform", "platform:nothing", "nowhere:f", "platform:__name__"])
def test_a_job_that_is_not_there_fails_alone(worker: EmulatedWorker, job: str) -> None:
    with pytest.raises(EmulatedError, match="Traceback") as caught:
        worker.call(job)
    assert str(caught.value).startswith(job)
    assert worker.call("platform:machine").value == platform.machine()


def test_jobs_look_for_no_cycles_in_what_was_imported(worker: EmulatedWorker) -> None:
    assert worker.call("gc:get_freeze_count").value > 1000
    assert worker.call("gc:isenabled").value


def test_exit_is_a_failure(worker: EmulatedWorker) -> None:
    with pytest.raises(EmulatedError, match="SystemExit"):
        worker.call("sys:exit")


def test_jobs_are_forks_of_one_process_and_see_nothing_of_each_other(worker: EmulatedWorker) -> None:
    assert len({worker.call("os:getpid").value for _ in range(2)}) == 2
    assert len({worker.call(f"{JOBS}:process").value for _ in range(2)}) == 1
    worker.call("os:environ.setdefault", key="ARMOPT_LEFT_BEHIND", value="1")
    assert worker.call("os:environ.get", key="ARMOPT_LEFT_BEHIND").value is None


def test_output_is_that_of_the_job(worker: EmulatedWorker) -> None:
    for _ in range(2):
        done = worker.call(f"{JOBS}:write_everywhere")
        assert sorted(done.stdout.splitlines()) == ["C library", "descriptor", "python"]
        assert done.stderr == "error\n"


def test_jobs_run_side_by_side(worker: EmulatedWorker, tmp_path: Path) -> None:
    """Each waits for the other, and gives up after a minute."""
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(worker.call, f"{JOBS}:meet", folder=str(tmp_path), name=n, other=o) for n, o in ("ab", "ba")
        ]
    assert [each.result().value for each in both] == [True, True]


def test_a_crash_costs_one_job(worker: EmulatedWorker) -> None:
    with pytest.raises(EmulatedError, match="neoverse-v1 was ended by SIGABRT\nlast words") as caught:
        worker.call(f"{JOBS}:crash")
    assert caught.value.stderr == "last words\n"
    with pytest.raises(EmulatedError, match="neoverse-v1 exited with 3"):
        worker.call("os:_exit", status=3)
    assert worker.call("platform:machine").value == platform.machine()


def test_a_job_that_takes_too_long_is_killed_with_all_it_started(worker: EmulatedWorker, tmp_path: Path) -> None:
    with pytest.raises(EmulatedError, match=r"longer than 0\.5 s on the emulated neoverse-v1"):
        worker.call(f"{JOBS}:start_and_sleep", timeout=0.5, path=str(tmp_path / "pid"))
    started = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{started}").exists() and "Z" not in Path(f"/proc/{started}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.call("platform:machine").value == platform.machine()


def test_what_can_not_be_imported_says_so(folder: PreparedFolder) -> None:
    with (
        EmulatedWorker("neoverse-v1", folder=folder, preload="not_there") as worker,
        pytest.raises(EmulatedError, match=r"(?s)import not_there: .*exited with 1.*No module named 'not_there'"),
    ):
        worker.call("platform:machine")


def test_closing_ends_the_process_and_its_jobs(folder: PreparedFolder) -> None:
    worker = EmulatedWorker("neoverse-v1", folder=folder, preload="json")
    process = worker.call(f"{JOBS}:process").value
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(worker.call, f"{JOBS}:sleep", seconds=60)
        time.sleep(0.2)
        worker.close()
        with pytest.raises(EmulatedError):
            sleeping.result(timeout=10)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert worker.call("platform:machine").value == platform.machine()  # and it starts again
    worker.close()


def test_settings_are_the_workers_own_and_not_the_shells(
    folder: PreparedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1024")
    monkeypatch.setenv("LD_PRELOAD", "")
    names = ["DNNL_DEFAULT_FPMATH_MODE", "LRU_CACHE_CAPACITY", "LD_PRELOAD", "OMP_NUM_THREADS"]
    with EmulatedWorker("neoverse-v1", env={"OMP_NUM_THREADS": "1"}, folder=folder, preload="json") as worker:
        assert worker.call(f"{JOBS}:read_environment", names=names).value == dict(
            zip(names, [None, None, None, "1"], strict=True)
        )


def test_an_unprepared_folder_is_said_at_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMOPT_ARM64_CACHE", str(tmp_path))
    with EmulatedWorker("neoverse-v1") as emulated, pytest.raises(HostError, match="not prepared"):
        emulated.call("platform:machine")


def test_an_error_carries_what_was_written() -> None:
    error = EmulatedError("failed", where="jobs:f", stdout="out", stderr="err")
    assert (str(error), error.stdout, error.stderr) == ("jobs:f: failed", "out", "err")
