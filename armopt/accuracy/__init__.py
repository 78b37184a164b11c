"""Compares what a bundle computes with the original in FP32: per output, per task, per node, with gates.

Names are imported when they are first used: the command line lists the tasks without importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armopt.accuracy.checker import Checker as Checker
    from armopt.accuracy.checker import Validation as Validation
    from armopt.accuracy.gates import Gate as Gate
    from armopt.accuracy.metrics import METRICS as METRICS
    from armopt.accuracy.metrics import MIN_COSINE as MIN_COSINE
    from armopt.accuracy.metrics import Accuracy as Accuracy
    from armopt.accuracy.metrics import Metric as Metric
    from armopt.accuracy.metrics import compare as compare
    from armopt.accuracy.metrics import compare_all as compare_all
    from armopt.accuracy.nodes import NodeError as NodeError
    from armopt.accuracy.validation import bucket_name as bucket_name
    from armopt.accuracy.validation import compare_callables as compare_callables
    from armopt.accuracy.validation import validate as validate

_MODULES = {
    "checker": (
        "Checker",
        "Validation",
    ),
    "gates": ("Gate",),
    "metrics": (
        "METRICS",
        "MIN_COSINE",
        "Accuracy",
        "Metric",
        "compare",
        "compare_all",
    ),
    "nodes": ("NodeError",),
    "validation": (
        "bucket_name",
        "compare_callables",
        "validate",
    ),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
