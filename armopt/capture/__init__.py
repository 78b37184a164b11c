"""A model as one flat, functional graph of ATen operations."""

from armopt.capture.calls import check_signature, describe_inputs, eval_mode, placeholders, resize_batch_of, try_once
from armopt.capture.constants import freeze
from armopt.capture.export import check_dtypes, digest, exported, module, quiet, wrong_dtype

__all__ = [
    "check_dtypes",
    "check_signature",
    "describe_inputs",
    "digest",
    "eval_mode",
    "exported",
    "freeze",
    "module",
    "placeholders",
    "quiet",
    "resize_batch_of",
    "try_once",
    "wrong_dtype",
]
