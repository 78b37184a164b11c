"""What an ONNX Runtime session on the target needs to be told, and what comes of it: a section of the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from armopt.bundle.manifest import LayerCount, OnnxModel, Session, SessionFlag, SessionOption
from armopt.bundle.program import Program
from armopt.ir.calls import layers
from armopt.onnx_export.options import NAME, OPSET, OnnxOptions
from armopt.onnx_export.standard import takes_fast_math

#: The version that all this was seen with, on emulated cores (tests/arm64/test_onnx_runtime.py).
SEEN_WITH = "1.32.0"
FAST_MATH = "mlas.enable_gemm_fastmath_arm64_bfloat16"
_ENGAGES = (
    "multiplies in BF16 (BFMMLA) in MatMul alone, not in Gemm, Conv, or a MatMul with a fused scale; "
    "the exported graph has MatMul where BF16 is planned"
)
_NOT = "no layer of the exported graph is in a form that it takes effect on"
_THREADS = "0 is one thread for each core of the machine; a container with a smaller share has to say how many"


def describe(programs: Sequence[Program], options: OnnxOptions | None, *, inside: bool = False) -> Session:
    """The section.

    Args:
        programs: Of the bundle; the last is what is exported.
        options: How it is exported; None for a bundle without an ONNX model: then as it would be by default.
        inside: Whether the model is a file of the bundle.
    """
    program, chosen = programs[-1], options or OnnxOptions()
    fast = [takes_fast_math(node, program.sites[node.name]) for node in layers(program.graph_module.graph)]
    engaged = sum(fast) if chosen.fast_math else 0
    model = OnnxModel(OPSET, chosen.weights, dict(program.bucket), NAME if inside else "")
    return Session(
        seen_with=SEEN_WITH,
        session_config={FAST_MATH: SessionFlag(str(int(engaged > 0)), engaged > 0, _ENGAGES if engaged else _NOT)},
        session_options={"intra_op_num_threads": SessionOption(0, _THREADS)},
        layers=LayerCount(engaged, len(fast)),
        model=model if options else None,
    )
