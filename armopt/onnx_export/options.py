"""How a model is exported. Needs neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass

from armopt.errors import InputError

#: Of the model inside a bundle.
NAME = "model.onnx"
#: Has Gelu; ONNX Runtime 1.17 and later read it.
OPSET = 20
#: What weights can be stored in.
WEIGHT_DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How a model is exported.

    Attributes:
        weights: ``fp32``, ``bf16`` or ``fp16``: what matrices, filters and embedding tables are stored in; the graph
            casts them to FP32.
        fast_math: Whether products planned in BF16 get the form for ONNX Runtime's BF16 flag (see docs/onnx.md).
    """

    weights: str = "fp32"
    fast_math: bool = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_DTYPES:
            raise InputError(
                f"unknown dtype {self.weights!r}", where="--onnx-weights", hint=f"Known are {', '.join(WEIGHT_DTYPES)}"
            )
