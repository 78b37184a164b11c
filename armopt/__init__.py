"""armopt: optimize PyTorch inference for Arm servers.

The public names are resolved on first use, so that ``import armopt`` (and the command line's ``--help``) does not
import torch.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armopt.accuracy import validate as validate
    from armopt.compiler.checks import Checks as Checks
    from armopt.compiler.optimize import optimize as optimize
    from armopt.dynamo.compile import compile as compile
    from armopt.errors import ArmoptError as ArmoptError
    from armopt.ir.records import Target as Target
    from armopt.runtime.load import load as load

from armopt._version import __version__

_PUBLIC = {
    "ArmoptError": "armopt.errors",
    "Checks": "armopt.compiler.checks",
    "Target": "armopt.ir.records",
    "compile": "armopt.dynamo.compile",
    "load": "armopt.runtime.load",
    "optimize": "armopt.compiler.optimize",
    "validate": "armopt.accuracy",
}

__all__ = ["ArmoptError", "Checks", "Target", "__version__", "compile", "load", "optimize", "validate"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'armopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__


def _remark_on_a_late_import() -> None:
    """Says what is lost where torch was imported before its environment was set."""
    from armopt import environment, targets

    if remark := environment.import_remark(targets.this_host()):
        warnings.warn(remark, stacklevel=3)


if "torch" in sys.modules:
    _remark_on_a_late_import()
