"""An Arm server on any x86-64 Linux: the real aarch64 PyTorch under QEMU's user-mode emulation.

``python -m armopt.emulation.prepare`` makes the folder that everything here uses.
"""

from armopt.emulation.folder import CORES, TORCH_VERSIONS, Core, PreparedFolder
from armopt.emulation.runner import emulate, emulated_command
from armopt.emulation.worker import EmulatedError, EmulatedResult, EmulatedWorker

__all__ = [
    "CORES",
    "TORCH_VERSIONS",
    "Core",
    "EmulatedError",
    "EmulatedResult",
    "EmulatedWorker",
    "PreparedFolder",
    "emulate",
    "emulated_command",
]
