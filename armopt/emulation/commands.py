"""Runs the programs that preparing takes; a failure says what to do next."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from armopt.errors import HostError

RESUMES = "Then run it again: what is done is kept"


def run_command(
    command: Sequence[str], what: str, *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Runs a command and returns what it printed.

    Args:
        command: The program and its arguments.
        what: What it is for, for the error.
        cwd: Where it runs.
        env: Its environment; None is this process's.

    Raises:
        HostError: The program is missing or fails.
    """
    try:
        done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise HostError(
            f"{command[0]} is missing",
            where=what,
            hint="This needs Linux with apt and dpkg (Debian or Ubuntu)",
        ) from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:"))] or lines[-3:]
        tool = next((word for word in command if word in ("pip", "apt-get", "dpkg")), command[0])
        raise HostError(
            f"{tool} failed with {done.returncode}: {' | '.join(errors).rstrip('.')}",
            where=what,
            hint=f"Check that this machine reaches its registries. {RESUMES}",
        )
    return done.stdout
