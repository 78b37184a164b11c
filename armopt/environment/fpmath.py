"""oneDNN's fast math: the two names of its variable, and what counts as on."""

from __future__ import annotations

from collections.abc import Mapping

#: As armopt sets it.
FPMATH = "DNNL_DEFAULT_FPMATH_MODE"
#: As oneDNN reads it: the first that is set and not empty wins.
FPMATH_NAMES = ("ONEDNN_DEFAULT_FPMATH_MODE", FPMATH)


def fpmath_mode(environ: Mapping[str, str]) -> str:
    """The mode that oneDNN takes from these variables; empty where none is set."""
    return next(filter(None, (environ.get(name, "") for name in FPMATH_NAMES)), "")


def allows_bf16(mode: str) -> bool:
    """Whether a mode lets oneDNN multiply FP32 operands in BF16."""
    return mode.upper() in ("BF16", "ANY")


def fast_math(environ: Mapping[str, str]) -> bool:
    """Whether oneDNN reads BF16 fast math from these variables."""
    return allows_bf16(fpmath_mode(environ))
