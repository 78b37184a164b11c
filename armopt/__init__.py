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
    from armopt.checks import Checks as Checks
    from armopt.compiled import compile as compile
    from armopt.compiler import optimize as optimize
    from armopt.errors import ArmoptError as ArmoptError
    from armopt.ir import Target as Target
    from armopt.runtime import load as load

__version__ = "0.1.0"

_PUBLIC = {
    "ArmoptError": "armopt.errors",
    "Checks": "armopt.checks",
    "Target": "armopt.ir",
    "compile": "armopt.compiled",
    "load": "armopt.runtime",
    "optimize": "armopt.compiler",
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

    if remark := environment.import_remark(targets.host()):
        warnings.warn(remark, stacklevel=3)


if "torch" in sys.modules:
    _remark_on_a_late_import()
