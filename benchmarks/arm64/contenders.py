"""Who is counted: ways to run a model, passes to leave out, ways to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.arm64.counting import AS_RUN, FAST_MATH, ONE_THREAD

ARMOPT = "armopt"
WITH_GLIBC = "armopt, glibc's malloc"
BASELINE = "eager fast math"
INDUCTOR = "Inductor's calls"
#: Passes that can be left out, with the models that show what each brings.
ABLATED = {
    "resnet50 224": ("FoldBatchNorm", "FusePointwise", "MergeShortcut", "FoldStride", "PropagateBf16"),
    "mobilenet_v3_large 224": ("FoldBatchNorm", "FusePointwise", "ConvertPixelConv", "PropagateBf16"),
    "gpt2 block, 64 tokens": ("FusePointwise", "MergeProjections", "PropagateBf16"),
    "swin_t 224": ("FoldConstants", "FuseAttention", "FusePointwise", "PropagateBf16"),
    "mask r-cnn 128": ("ConvertTransposedConv",),
}
#: What loads a model, by what is counted.
LOADS = {
    "torch.export.load": "load, exported",
    "armopt.load, first on a host": "load, first",
    "armopt.load, later": "load, later",
}


@dataclass(frozen=True)
class Contender:
    """A way to run a model: the process's settings, and how the model is prepared."""

    env: Mapping[str, str]
    arguments: Mapping[str, Any]
    only: str = ""  # models whose name holds one of these words
    onnx: str = ""  # the form of its ONNX model: plain, or flag for the BF16 flag

    def takes(self, workload: str) -> bool:
        """Whether this way to run models is of interest for one."""
        return not self.only or any(word in workload for word in self.only.split())


_BLAS = {**FAST_MATH, "TORCH_MKLDNN_MATMUL_MIN_DIM": "64"}
_HUGE_PAGES = {**FAST_MATH, "THP_MEM_ALLOC_ENABLE": "1"}
_CONVOLUTIONAL = "resnet mobilenet efficientnet convnext mask"
_DENSE = "mlp block gpt2 bert"
_EXPORTED = "mlp block resnet mobilenet efficientnet convnext vit"
CONTENDERS = {
    "eager FP32": Contender(ONE_THREAD, {}),
    BASELINE: Contender(FAST_MATH, {}),
    "fast math, channels_last": Contender(FAST_MATH, {"channels_last": True}, _CONVOLUTIONAL),
    "fast math, OpenBLAS below 64": Contender(_BLAS, {}, _DENSE),
    "fast math, huge pages": Contender(_HUGE_PAGES, {}, "mlp resnet50"),
    "fast math, tcmalloc": Contender(AS_RUN, {}),
    "model.bfloat16()": Contender(FAST_MATH, {"dtype": "bfloat16"}),
    INDUCTOR: Contender(FAST_MATH, {}, "mlp block resnet mobilenet efficientnet convnext gpt2 bert"),
    "ONNX Runtime": Contender(ONE_THREAD, {"fast_math": False}, _EXPORTED, onnx="plain"),
    "ONNX Runtime, BF16 flag": Contender(ONE_THREAD, {"fast_math": True}, _EXPORTED, onnx="plain"),
    "ONNX Runtime, BF16 flag, armopt's form": Contender(ONE_THREAD, {"fast_math": True}, _EXPORTED, onnx="flag"),
    WITH_GLIBC: Contender(FAST_MATH, {}),
    ARMOPT: Contender(AS_RUN, {}),
}
