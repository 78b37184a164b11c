"""A model as one flat, functional graph of ATen operations.

Names are imported when they are first used: the command line lists kinds of files without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armopt.capture.calls import check_signature as check_signature
    from armopt.capture.calls import describe_inputs as describe_inputs
    from armopt.capture.calls import eval_mode as eval_mode
    from armopt.capture.calls import placeholders as placeholders
    from armopt.capture.calls import try_once as try_once
    from armopt.capture.constants import freeze as freeze
    from armopt.capture.export import check_dtypes as check_dtypes
    from armopt.capture.export import digest as digest
    from armopt.capture.export import exported as exported
    from armopt.capture.export import module as module
    from armopt.capture.export import quiet as quiet
    from armopt.capture.export import wrong_dtype as wrong_dtype

_MODULES = {
    "calls": (
        "check_signature",
        "describe_inputs",
        "eval_mode",
        "placeholders",
        "try_once",
    ),
    "constants": ("freeze",),
    "export": (
        "check_dtypes",
        "digest",
        "exported",
        "module",
        "quiet",
        "wrong_dtype",
    ),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
