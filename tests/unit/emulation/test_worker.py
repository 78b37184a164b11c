"""The emulated side of a worker, run on the host: the arm64 tests have the rest."""

import pickle
import platform
from pathlib import Path

import pytest

from armopt.emulation import EmulatedError, worker
from armopt.errors import HostError


def run(job, **arguments):
    return worker._run(worker._Request(job, pickle.dumps(arguments)))


def test_a_job_is_found_by_module_and_name():
    reply = run("platform:machine")
    assert not reply.failure
    assert pickle.loads(reply.value) == platform.machine()
    assert pickle.loads(run("pathlib:Path.cwd").value) == Path.cwd()


@pytest.mark.parametrize("job", ["platform", "platform:nothing", "nowhere:f", "platform:__name__"])
def test_a_job_that_is_not_there_fails_alone(job):
    reply = run(job)
    assert "Traceback" in reply.failure
    assert reply.value == b""


def test_exit_is_a_failure_and_not_the_end():
    assert "SystemExit" in run("builtins:exit").failure or "SystemExit" in run("sys:exit").failure


def test_output_is_what_was_written_since_the_mark():
    output = worker._Output()
    output.file.write(b"before")
    output.file.flush()
    output.mark()
    output.file.write("naïve".encode())
    output.file.flush()
    assert output.read() == "naïve"
    assert output.read() == "naïve"


def test_an_unprepared_folder_is_said_at_the_first_call(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMOPT_ARM64_CACHE", str(tmp_path))
    with worker.EmulatedWorker("neoverse-v1") as emulated, pytest.raises(HostError, match="not prepared"):
        emulated.call("platform:machine")


def test_an_error_carries_what_was_written():
    error = EmulatedError("failed", where="jobs:f", stdout="out", stderr="err")
    assert (str(error), error.stdout, error.stderr) == ("jobs:f: failed", "out", "err")
