"""Runs Python programs on an emulated Arm core."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from armopt.emulation.folder import (
    CACHE_VARIABLE,
    CORES,
    DEFAULT_TORCH,
    WRAPPERS,
    PreparedFolder,
)
from armopt.errors import InputError

CPU_VARIABLE = "ARMOPT_EMULATED_CPU"
_HOST_TOOLS = {
    "env",
    "sh",
    "bash",
}  # they only start others: run by the host, they find the emulated python on PATH


def emulated_command(
    cpu: str,
    argv: Sequence[str],
    *,
    torch_version: str = DEFAULT_TORCH,
    env: Mapping[str, str] | None = None,
    folder: PreparedFolder | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Returns what to execute, and in which environment, to run a command on an emulated core.

    Args:
        cpu: A core by QEMU's name (``neoverse-v1``), see :data:`CORES`.
        argv: ``python …`` or ``armopt …``; also ``env`` or ``sh`` that start one of them.
        torch_version: The aarch64 PyTorch it imports.
        env: The environment it gets (this process's own by default); DNNL_*, OMP_* and the like pass through.
            Paths in LD_PRELOAD are those of the emulated machine.
        folder: The prepared folder; the user's by default.

    Raises:
        InputError: An unknown core, a command that is a program of the host, or a comma in LD_PRELOAD.
        HostError: The folder is not prepared.
    """
    if cpu not in CORES:
        raise InputError(f"QEMU 10.0 has no model of {cpu!r}", hint=f"Choose one of {', '.join(CORES)}")
    folder = folder or PreparedFolder.default()
    folder.require(torch_version)
    if not argv:
        raise InputError("no command to emulate", hint="Say e.g. `armopt emulate -- python script.py`")
    name = Path(argv[0]).name
    if name in WRAPPERS:
        program = str(folder.wrappers / name)
    elif argv[0] in _HOST_TOOLS:
        program = argv[0]
    else:
        raise InputError(
            f"{argv[0]!r} is a program of this host, not of the emulated Arm machine",
            hint=f"Only {', '.join(WRAPPERS)} are emulated; say e.g. `python -m pytest`",
        )
    inherited = dict(os.environ if env is None else env)
    # Both would lead the emulated Python to the host's packages.
    for variable in ("PYTHONHOME", "VIRTUAL_ENV"):
        inherited.pop(variable, None)
    return [program, *argv[1:]], {
        **_preload_emulated(inherited),
        CPU_VARIABLE: cpu,
        "PYTHONNOUSERSITE": "1",  # ~/.local holds x86 packages
        CACHE_VARIABLE: str(folder.path),
        "PATH": os.pathsep.join([str(folder.wrappers), inherited.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(
            [*_python_path(folder, torch_version), *filter(None, [inherited.get("PYTHONPATH", "")])]
        ),
    }


def _preload_emulated(env: Mapping[str, str]) -> dict[str, str]:
    """Keeps LD_PRELOAD from the host's programs, QEMU among them: QEMU sets it for the emulated program alone.

    What such a program starts inherits its LD_PRELOAD as it is then, so QEMU's own variables end there.
    """
    if "LD_PRELOAD" not in env:
        return dict(env)
    rest = {name: value for name, value in env.items() if name != "LD_PRELOAD"}
    if "," in env["LD_PRELOAD"]:
        raise InputError("QEMU takes no comma", where=f"LD_PRELOAD={env['LD_PRELOAD']}", hint="Separate by a colon")
    return {
        **rest,
        "QEMU_SET_ENV": f"LD_PRELOAD={env['LD_PRELOAD']}",
        "QEMU_UNSET_ENV": "QEMU_SET_ENV,QEMU_UNSET_ENV",
    }


def _python_path(folder: PreparedFolder, torch_version: str) -> list[str]:
    sites = [str(folder.site(torch_version)), str(folder.base_site)]
    own = Path(__file__).resolve().parents[2]
    # A checkout holds armopt and its tests only; where armopt is installed, x86 packages lie beside it.
    is_installed = own.name in ("site-packages", "dist-packages")
    return [*sites, str(own)] if is_installed else [str(own), *sites]


def emulate(cpu: str, argv: Sequence[str], torch_version: str = DEFAULT_TORCH) -> int:
    """Runs a command on an emulated core, with this process's own input, output and signals.

    Args:
        cpu: A core by QEMU's name, see :func:`emulated_command`.
        argv: The command.
        torch_version: The aarch64 PyTorch it imports.

    Returns:
        Its exit code; 128 + the signal's number where a signal ended it, as shells have it.
    """
    command, env = emulated_command(cpu, argv, torch_version=torch_version)
    process = subprocess.Popen(command, env=env)

    def forward(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    # Ctrl-C reaches the child by itself (it is in the terminal's group); it alone decides what that means.
    previous = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        previous[number] = signal.signal(number, forward)
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
