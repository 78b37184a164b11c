"""Compares what a bundle computes with the original in FP32: per output, per task, per node, with gates."""

from armopt.accuracy.checker import Checker, Validation
from armopt.accuracy.gates import Gate
from armopt.accuracy.metrics import METRICS, MIN_COSINE, Accuracy, Metric, compare, compare_all
from armopt.accuracy.nodes import NodeError
from armopt.accuracy.validation import bucket_name, compare_callables, validate

__all__ = [
    "METRICS",
    "MIN_COSINE",
    "Accuracy",
    "Checker",
    "Gate",
    "Metric",
    "NodeError",
    "Validation",
    "bucket_name",
    "compare",
    "compare_all",
    "compare_callables",
    "validate",
]
