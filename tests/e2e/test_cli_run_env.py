"""`armopt run`, `armopt env`, and what the command line costs before it does anything."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from e2e_helpers import ARMOPT, Cli, armopt, environment

WANTED = {"DNNL_DEFAULT_FPMATH_MODE": "BF16", "LRU_CACHE_CAPACITY": "1024", "OMP_PROC_BIND": "false"}


class TestRun:
    def test_sets_the_environment_before_the_command_starts(self, bundle: Path, tmp_path: Path) -> None:
        script = "import json, os; print(json.dumps(dict(os.environ)))"
        done = armopt("run", "--threads", "3", bundle, "--", sys.executable, "-c", script, cwd=tmp_path)
        found = json.loads(done.out)
        assert WANTED.items() <= found.items()
        assert found["OMP_NUM_THREADS"] == "3"
        assert found["COLUMNS"] == "200"  # the rest is the caller's

    def test_threads_are_shared_among_workers(self, bundle: Path, tmp_path: Path) -> None:
        counts = [
            int(armopt("run", *options, bundle, "--", "sh", "-c", "echo $OMP_NUM_THREADS", cwd=tmp_path).out)
            for options in ((), ("--workers", "1000"))
        ]
        assert 1 <= counts[0] <= len(os.sched_getaffinity(0))
        assert counts[1] == 1

    def test_the_model_runs_under_it(self, bundle: Path, tmp_path: Path) -> None:
        script = "import armopt, sys, torch; print(tuple(armopt.load(sys.argv[1])(torch.ones(1, 3, 16, 16)).shape))"
        done = armopt("run", bundle, "--", sys.executable, "-c", script, bundle, cwd=tmp_path)
        assert done.out == "(1, 10)\n"

    @pytest.mark.parametrize("code", [0, 1, 2, 7, 255])
    def test_exit_code_passes_through(self, code: int, bundle: Path, tmp_path: Path) -> None:
        done = armopt("run", bundle, "--", "sh", "-c", f"exit {code}", cwd=tmp_path, check=False)
        assert (done.code, done.out, done.err) == (code, "", "")

    def test_standard_streams_pass_through(self, bundle: Path, tmp_path: Path) -> None:
        done = subprocess.run(
            [ARMOPT, "run", bundle, "--", "sh", "-c", "cat; echo said >&2"],
            input="given",
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("given", "said\n")

    def test_options_of_the_command_are_its_own(self, bundle: Path, tmp_path: Path) -> None:
        done = armopt("run", bundle, "--", "echo", "--help", "--json", "--", "-o", cwd=tmp_path)
        assert done.out == "--help --json -- -o\n"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_signals_reach_the_command(self, number: signal.Signals, bundle: Path, tmp_path: Path) -> None:
        """It becomes the command (exec), so a supervisor's signals go where they should."""
        child = subprocess.Popen(
            [ARMOPT, "run", bundle, "--", "sh", "-c", "echo $$; exec sleep 60"], stdout=subprocess.PIPE
        )
        try:
            assert child.stdout is not None
            assert int(child.stdout.readline()) == child.pid
            child.send_signal(number)
            assert child.wait(timeout=30) == -number
        finally:
            child.kill()
            child.wait()

    def test_signals_that_the_command_dies_of_show(self, bundle: Path, tmp_path: Path) -> None:
        done = armopt("run", bundle, "--", "sh", "-c", "kill -SEGV $$", cwd=tmp_path, check=False)
        assert done.code == -signal.SIGSEGV

    def test_does_not_import_torch(self, bundle: Path, tmp_path: Path) -> None:
        """A service starts once with torch, not twice: importing it takes five times what the bare program does."""
        assert cpu_seconds([str(ARMOPT), "run", str(bundle), "--", "true"]) < 3 * cpu_seconds(BARE)


class TestEnv:
    """Each format is read back by what will read it, or by its documented grammar."""

    def test_shell(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        done = cli("env", bundle, cwd=tmp_path)
        assert done.code == 0
        found = subprocess.run(
            ["sh", "-c", f"eval {shlex.quote(done.out)}; env"], capture_output=True, text=True, check=True, env={}
        ).stdout.splitlines()
        assert {f"{name}={value}" for name, value in WANTED.items()} <= set(found)
        assert done.out == (bundle / "env.sh").read_text()
        assert all(line.startswith(("# ", "export ")) for line in done.out.splitlines())

    def test_docker(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        out = cli("env", bundle, "--format", "docker", cwd=tmp_path).out
        assert dict(re.findall(r'^ENV (\w+)="([^"]*)"$', out, re.M)) == WANTED

    def test_systemd(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        out = cli("env", bundle, "--format", "systemd", cwd=tmp_path).out
        assert dict(re.findall(r'^Environment="(\w+)=([^"]*)"$', out, re.M)) == WANTED

    def test_kubernetes(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        out = cli("env", bundle, "--format", "k8s", cwd=tmp_path).out
        entries = yaml.safe_load(out)
        assert {entry["name"]: entry["value"] for entry in entries} == WANTED  # strings all: "1024", "false"

    def test_json(self, bundle: Path, cli: Cli, tmp_path: Path) -> None:
        for options in (("--format", "json"), ("--json",)):
            found = cli("env", bundle, *options, cwd=tmp_path).json
            assert {name: entry["value"] for name, entry in found.items()} == WANTED
            assert all(entry["why"] for entry in found.values())

    def test_without_bf16_there_is_no_fast_math(self, cli: Cli, models: object, tmp_path: Path) -> None:
        cli("optimize", models["static.pt2"], "--target", "graviton2", "-o", "b", cwd=tmp_path)  # type: ignore[index]
        assert "FPMATH" not in cli("env", "b", cwd=tmp_path).out


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a command, user and system, the least of five: other work on the machine doesn't count."""

    def once() -> float:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        return usage.ru_utime + usage.ru_stime

    return min(once() for _ in range(5))


#: The help of a program of one option: what Python and typer take.
BARE = [sys.executable, "-c", "import typer\ndef main(x: int = 1): pass\ntyper.run(main)", "--help"]


def test_help_is_quick() -> None:
    """Within twice typer's own, which is 0.1 to 0.25 s by machine; torch would be ten times."""
    bare = cpu_seconds(BARE)
    assert cpu_seconds([str(ARMOPT), "--help"]) < 2 * bare
    assert cpu_seconds([str(ARMOPT), "optimize", "--help"]) < 2 * bare


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = armopt("--help", cwd=tmp_path)
    for name in ("optimize", "plan", "inspect", "validate", "env", "run", "targets"):
        assert re.search(rf"^\s+{name}\s+\w", done.out, re.M), name
    assert done.err == ""


def test_version(tmp_path: Path) -> None:
    import armopt as api

    assert armopt("--version", cwd=tmp_path).out == f"armopt {api.__version__}\n"


def test_targets_lists_products(cli: Cli, tmp_path: Path) -> None:
    found = {target["name"]: target for target in cli("targets", "--json", cwd=tmp_path).json["targets"]}
    assert found["graviton3"]["bf16"] is True
    assert found["graviton2"]["bf16"] is False
    assert "host" in found
    text = cli("targets", cwd=tmp_path).out
    assert all(re.search(rf"^{name}\b", text, re.M) for name in found)


def test_a_closed_pipe_is_no_error(bundle: Path) -> None:
    """`armopt inspect … | head -1` ends quietly."""
    done = subprocess.run(
        f"{shlex.quote(str(ARMOPT))} inspect {shlex.quote(str(bundle))} --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert (done.stdout, done.stderr) == ("{", "")


def cpu_time(pid: int) -> float:
    """Seconds of CPU that a running process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ctrl_c_leaves_nothing_behind(models: object, tmp_path: Path) -> None:
    arguments = ["optimize", "--model", "torchvision:resnet18", "-o", "b"]
    child = subprocess.Popen([ARMOPT, *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    imported = 0.0
    while not imported or cpu_time(child.pid) < imported + 1:  # all that follows takes 3 to 12 s
        assert child.poll() is None
        if not imported and "/PIL/" in Path(f"/proc/{child.pid}/maps").read_text():  # torchvision brings it
            imported = cpu_time(child.pid)
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
