"""The `armopt` command: its subcommands, and the one table from error to exit code."""

from __future__ import annotations

import gc
import os
import sys

import typer

from armopt._version import __version__
from armopt.cli import (
    doctor,
    emulate,
    env,
    export_onnx,
    inspect,
    optimize,
    package,
    plan,
    run,
    serve,
    targets,
    tune,
    validate,
)
from armopt.cli.output import show_warnings
from armopt.errors import ArmoptError

app = typer.Typer(
    name="armopt",
    help="Optimize PyTorch inference for Arm servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    optimize.optimize,
    plan.plan,
    inspect.inspect,
    validate.validate,
    env.env,
    run.run,
    serve.serve,
    doctor.doctor,
    package.package,
    export_onnx.export_onnx,
    tune.tune,
    targets.targets,
    emulate.emulate,
)
for _command in COMMANDS:
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"armopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a bug, 2 bad input, 3 this host can't, 4 an accuracy gate failed."""
    show_warnings()
    gc.set_threshold(50_000, 10, 10)  # graphs are many objects that live long: Python's search for cycles took a second
    try:
        app()
    except ArmoptError as error:
        print(f"armopt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
