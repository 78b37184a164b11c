"""``armopt run``: sets the environment, then becomes the command."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated

import typer

from armopt.cli import options


def run(
    bundle: options.BundlePath,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command, after --.")],
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="OMP_NUM_THREADS; by default what the host has.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="How many such processes share this host.")] = 1,
) -> None:
    """Run a command in the environment that a bundle wants. The command's exit code is the exit code."""
    from armopt import environment, targets
    from armopt.bundle import reader
    from armopt.errors import HostError, InputError

    manifest = reader.read_manifest(bundle)
    if not command:
        raise InputError("no command", hint="Write it after --: armopt run BUNDLE -- python serve.py")
    count = threads or environment.threads_for_host(workers)
    here = environment.variables(targets.load(manifest.target), threads=count, build=environment.installed())
    chosen = {name: entry["value"] for name, entry in manifest.environment.items()}
    chosen |= {name: variable.value for name, variable in here.items()}
    if shutil.which(command[0]) is None:
        raise InputError("there is no such command", where=command[0], hint="Check the words after --")
    environ = {**os.environ, **chosen}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        raise HostError(f"can't be run: {error.strerror}", where=command[0]) from None
