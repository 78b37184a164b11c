"""The recipes of docs/serving.md: the systemd unit, and the bundle's application under other people's servers."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.serving import Rows, Running, made, running

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
UNIT = (ROOT / "docs/serving.md").read_text().partition("```ini\n")[2].partition("```")[0]
RECIPE = (ROOT / "examples/asgi.py").read_text().split('"""')[1]
#: What uvicorn's and gunicorn's workers say.
STARTED = "startup complete|server listening"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return made(Rows(), torch.rand(4, 8), tmp_path_factory.mktemp("made") / "rows")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_systemd_takes_the_unit(bundle: Path, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        warnings.warn("NOT TESTED: this machine has no systemd-analyze, the unit is not verified", stacklevel=2)
        pytest.skip("no systemd-analyze")
    unit = tmp_path / "model.service"
    command = [shutil.which("systemd-analyze"), "verify", "--man=no", str(unit)]
    # the program is looked for, so it is this machine's
    there = UNIT.replace("/opt/model/bin/armopt", f"{sys.executable} -m armopt")
    for text, good in ((there, True), (there.replace("Type=notify", "Type=notifies"), False)):
        unit.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode == 0 and not done.stderr) == good, done.stderr


def test_the_units_commands_do_what_systemd_expects(bundle: Path, tmp_path: Path) -> None:
    """The main process says when it is ready, reloads, and ends in time: systemd's part is played here."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT)
    service = unit["Service"]
    assert service["Type"] == "notify"
    start = [*shlex.split(service["ExecStart"]), "--port", "0"]
    start[0], start[2] = sys.executable, str(bundle)
    start[1:1] = ["-m", "armopt"]
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))
    notified.settimeout(60)
    with running(start, os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}) as server, notified:
        assert b"READY=1" in notified.recv(4096)
        until, workers = time.monotonic() + 40, int(start[start.index("--workers") + 1])
        while time.monotonic() < until and len(server.workers()) < workers:
            time.sleep(0.1)
        server.wait_until_ready()
        before = set(server.workers())
        assert len(before) == workers
        assert service["ExecReload"].endswith("/kill -HUP $MAINPID")
        server.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 40
        while time.monotonic() < until and (set(server.workers()) & before or len(server.workers()) < workers):
            time.sleep(0.1)
        assert not set(server.workers()) & before
        assert server.infer([[0.5] * 8])[0] == 200
        ended = time.monotonic()
    assert server.process.returncode == 0
    assert time.monotonic() - ended < int(service["TimeoutStopSec"])


@pytest.mark.parametrize("engine", [pytest.param("uvicorn", marks=pytest.mark.full), "gunicorn"])
def test_the_application_under_servers_that_people_run_already(engine: str, bundle: Path, tmp_path: Path) -> None:
    (line,) = (line.strip() for line in RECIPE.splitlines() if f"-- {engine} " in line)
    port = free_port()
    words = {
        "armopt": [sys.executable, "-m", "armopt"],
        "BUNDLE": [str(bundle)],
        engine: [sys.executable, "-m", engine],
    }
    command = [part for word in shlex.split(line) for part in words.get(word, [word])]
    command += ["--port", str(port)] if engine == "uvicorn" else ["--bind", f"127.0.0.1:{port}"]
    env = os.environ | {"BUNDLE": str(bundle), "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=env, cwd=ROOT / "examples", stdout=log, stderr=log)
    server, until = Running(process, port, "rows"), time.monotonic() + 60
    try:
        # both workers: gunicorn's don't hear a SIGTERM that comes while they start
        while time.monotonic() < until and len(re.findall(STARTED, (tmp_path / "log").read_text())) < 2:
            time.sleep(0.1)
        server.wait_until_ready()
        status, found = server.infer([[0.5] * 8, [0.25] * 8])
        assert status == 200
        assert next(each["data"] for each in found["outputs"] if each["name"] == "sum") == [4.0, 2.0]
        assert server.infer([[0.5] * 7])[0] == 400
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            print((tmp_path / "log").read_text())
