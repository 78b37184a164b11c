"""``armopt emulate``: an Arm server's core, with the real aarch64 PyTorch, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from armopt.targets.emulated import core_named, emulated


def emulate(
    command: Annotated[list[str], typer.Argument(metavar="-- python SCRIPT", help="The command, after --.")],
    cpu: Annotated[
        str, typer.Option("--cpu", help=f"{', '.join(emulated())}, or QEMU's name of a core.")
    ] = "graviton3",
    torch_version: Annotated[str, typer.Option("--torch", help="The torch to run: 2.10.0 or 2.13.0.")] = "2.10.0",
) -> None:
    """Run a Python command on an emulated Arm core. Shows kernels and numerics; its times mean nothing."""
    from armopt import emulation

    raise typer.Exit(emulation.emulate(core_named(cpu).name, command, torch_version))
