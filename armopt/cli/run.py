"""``armopt run``: sets the environment, then becomes the command."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from armopt.cli import env
from armopt.cli.output import Output


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[BUNDLE] -- CMD", help="The bundle, unless --framework or --target; the command after --."
        ),
    ],
    framework: env.Framework = "",
    target: env.Target = "",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="OMP_NUM_THREADS; by default what the host has, shared by --workers."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many such processes share this host.")] = 1,
) -> None:
    """Run a command in the environment that a bundle wants. The command's exit code is the exit code."""
    from armopt import environment
    from armopt.errors import InputError

    bundle, command = (None, words) if framework or target else (Path(words[0]), words[1:])
    if not command:
        raise InputError("no command", hint="Write it after --: armopt run BUNDLE -- python serve.py")
    if shutil.which(command[0]) is None:
        both = bundle is None and Path(command[0]).exists()
        hint = "With --framework or --target there is no BUNDLE" if both else "Check the words after --"
        raise InputError("there is no such command", where=command[0], hint=hint)
    limit = environment.threads_for_host(workers)
    become(command, bundle, framework, target, threads=threads, limit=limit)


def become(
    command: list[str],
    bundle: Path | None,
    framework: str = "",
    target: str = "",
    *,
    threads: int | None,
    limit: int,
) -> None:
    """Sets the environment that a bundle, or a framework on a target, wants; then the process is the command.

    Args:
        command: With its arguments.
        bundle: The bundle; None where `framework` or `target` is given.
        framework: See :func:`armopt.cli.env.wanted`.
        target: See :func:`armopt.cli.env.wanted`.
        threads: OMP_NUM_THREADS; None keeps what is set, up to `limit`.
        limit: The threads that this host has for the process.

    Raises:
        HostError: The command can't be run.
    """
    from armopt import environment
    from armopt.errors import HostError

    asked = os.environ.get("OMP_NUM_THREADS", "")
    given = int(asked) if asked.isdecimal() and 0 < int(asked) <= limit else limit
    wanted = env.wanted(bundle, framework, target, threads or given)
    environ, remarks = environment.for_process(wanted, os.environ, limit=limit)
    for remark in remarks:
        Output(as_json=False).note(f"armopt: {remark}")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        raise HostError(f"can't be run: {error.strerror}", where=command[0]) from None
