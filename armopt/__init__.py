"""armopt: optimize PyTorch inference for Arm servers.

The public names are resolved on first use, so that ``import armopt`` (and the command line's ``--help``) does not
import torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

from armopt._version import __version__

if TYPE_CHECKING:
    from armopt.accuracy import validate as validate
    from armopt.capture.dimensions import Dimension as Dimension
    from armopt.capture.dimensions import Example as Example
    from armopt.capture.files.format import TrustedFile as TrustedFile
    from armopt.compiler.checks import Checks as Checks
    from armopt.compiler.optimize import Result as Result
    from armopt.compiler.optimize import optimize as optimize
    from armopt.compiler.output import Output as Output
    from armopt.dynamo.compile import compile as compile
    from armopt.dynamo.explain import Explanation as Explanation
    from armopt.dynamo.explain import explain as explain
    from armopt.errors import AccuracyError as AccuracyError
    from armopt.errors import ArmoptError as ArmoptError
    from armopt.errors import ArmoptWarning as ArmoptWarning
    from armopt.errors import BundleError as BundleError
    from armopt.errors import CaptureError as CaptureError
    from armopt.errors import HostError as HostError
    from armopt.errors import InputError as InputError
    from armopt.errors import PassError as PassError
    from armopt.ir.records import Target as Target
    from armopt.onnx_export.options import OnnxOptions as OnnxOptions
    from armopt.plan.cost_policy import CostPolicy as CostPolicy
    from armopt.plan.threshold_policy import ThresholdPolicy as ThresholdPolicy
    from armopt.runtime.load import load as load
    from armopt.runtime.model import Model as Model
    from armopt.runtime.module import ModuleModel as ModuleModel

#: Where each public name lives.
_PUBLIC = {
    "AccuracyError": "armopt.errors",
    "ArmoptError": "armopt.errors",
    "ArmoptWarning": "armopt.errors",
    "BundleError": "armopt.errors",
    "CaptureError": "armopt.errors",
    "Checks": "armopt.compiler.checks",
    "CostPolicy": "armopt.plan.cost_policy",
    "Dimension": "armopt.capture.dimensions",
    "Example": "armopt.capture.dimensions",
    "Explanation": "armopt.dynamo.explain",
    "HostError": "armopt.errors",
    "InputError": "armopt.errors",
    "Model": "armopt.runtime.model",
    "ModuleModel": "armopt.runtime.module",
    "OnnxOptions": "armopt.onnx_export.options",
    "Output": "armopt.compiler.output",
    "PassError": "armopt.errors",
    "Result": "armopt.compiler.optimize",
    "Target": "armopt.ir.records",
    "ThresholdPolicy": "armopt.plan.threshold_policy",
    "TrustedFile": "armopt.capture.files.format",
    "compile": "armopt.dynamo.compile",
    "explain": "armopt.dynamo.explain",
    "load": "armopt.runtime.load",
    "optimize": "armopt.compiler.optimize",
    "validate": "armopt.accuracy",
}

__all__ = [
    "AccuracyError",
    "ArmoptError",
    "ArmoptWarning",
    "BundleError",
    "CaptureError",
    "Checks",
    "CostPolicy",
    "Dimension",
    "Example",
    "Explanation",
    "HostError",
    "InputError",
    "Model",
    "ModuleModel",
    "OnnxOptions",
    "Output",
    "PassError",
    "Result",
    "Target",
    "ThresholdPolicy",
    "TrustedFile",
    "__version__",
    "compile",
    "explain",
    "load",
    "optimize",
    "validate",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


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
