"""Timings that others published (published.csv), and the calls that reproduce them on the emulated machine.

A row is named by its line in the file. Where the emulated machine can't reproduce it, the reason stands here.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.arm64.emulated_jobs import Job

TABLE = Path(__file__).with_name("published.csv")
_JOBS = "benchmarks.arm64.clock_jobs:"
_FAST = {"DNNL_DEFAULT_FPMATH_MODE": "BF16"}
_BLAS = {**_FAST, "TORCH_MKLDNN_MATMUL_MIN_DIM": "64"}
_BENCH = {**_FAST, "LRU_CACHE_CAPACITY": "1024", "THP_MEM_ALLOC_ENABLE": "1"}

#: What the figures of the clock may be fitted to, chosen before any was estimated: a third at most. All others judge.
FITTED = frozenset(
    [
        *(8, 12, 14),  # the tutorial: default at 32, OpenBLAS at 32, fast math at 10
        *(164, 173),  # small products
        *(101,),  # oneDNN's own benchmark on Graviton3
        *(50, 51, 60, 119, 120, 135, 139),  # and on Graviton4
        *(220, 223, 227, 233, 235, 236, 238),  # PyTorch's operators on Graviton4
        251,  # BERT
    ]
)


@dataclass(frozen=True)
class Case:
    """What reproduces a row.

    Attributes:
        make: Of clock_jobs, or ``module:function`` of benchmarks.arm64; ``bundle`` and ``onnx`` are made beforehand.
        arguments: Its arguments.
        torch: The release.
        env: Settings of the process.
        cpu: The product that QEMU emulates.
        target: The product that ran it: of its clock.
        threads: Of the call.
        parts: The row tells of so many of this call, or of one of so many parts where it is below 1.
        flops: Where the row has a rate: floating-point operations of one call.
        warm_ups: Calls before.
        sleeps: Whether its threads sleep between two regions, as on a machine that others use too.
    """

    make: str
    arguments: Mapping[str, Any]
    torch: str
    target: str
    threads: int
    env: Mapping[str, str] = field(default_factory=dict)
    cpu: str = "graviton3"
    parts: float = 1.0
    flops: float = 0.0
    warm_ups: int = 1
    sleeps: bool = False

    @property
    def is_native(self) -> bool:
        """Whether a program in C called, not Python."""
        return self.make.startswith("onednn_")

    @property
    def huge_pages(self) -> bool:
        """Whether large tensors lie in pages of 2 MB, which QEMU has not."""
        return self.env.get("THP_MEM_ALLOC_ENABLE") == "1"

    @property
    def job(self) -> Job:
        """What is run."""
        arguments = {**self.arguments, "threads": self.threads}
        words = " ".join(f"{name}={value}" for name, value in self.arguments.items())
        make = f"benchmarks.arm64.{self.make}" if ":" in self.make else _JOBS + self.make
        return Job(f"{self.make} {words}", make, arguments, self.warm_ups, repeats=self.repeats)

    @property
    def repeats(self) -> int:
        """Small calls find the caches of the model as the one before left them; large ones drive out all."""
        return 2 if self.warm_ups > 1 else 1


@dataclass(frozen=True)
class Row:
    """A published timing.

    Attributes:
        line: In published.csv.
        milliseconds: Of one call; 0 where the row has no time of one.
        case: What reproduces it, or why nothing does.
    """

    line: int
    columns: Mapping[str, str]
    milliseconds: float
    case: Case | str

    @property
    def where(self) -> str:
        """The published table that it is of."""
        return self.columns["source"]


@cache
def rows() -> tuple[Row, ...]:
    """All of them."""
    found = []
    with TABLE.open(newline="") as file:
        for line, columns in enumerate(csv.DictReader(file), start=2):
            case = _case(line, columns)
            found.append(Row(line, columns, _milliseconds(columns, case), case))
    return tuple(found)


def _milliseconds(columns: Mapping[str, str], case: Case | str) -> float:
    try:
        value = float(columns["value"])
    except ValueError:
        return 0.0
    if isinstance(case, Case) and case.flops:
        return case.flops / value / 1e6
    scale = {"s": 1e3, "ms": 1.0, "us": 1e-3}.get(columns["unit"], 0.0)
    return value * scale / (100 if columns["op"].endswith("(100 iters)") else 1)


def _case(line: int, columns: Mapping[str, str]) -> Case | str:
    source = columns["source"]
    for words, build in _SOURCES:
        if words in source:
            return build(line, columns)
    return "other software than PyTorch's wheels"


def _tutorial(line: int, columns: Mapping[str, str]) -> Case | str:
    setting = columns["dtype_or_setting"]
    if "THP" in setting:
        return "QEMU gives no huge pages, so their faults can't be counted"
    env = _BLAS if "MIN" in setting else _FAST if "BF16" in setting else {}
    if columns["op"] == "aten::clamp_min":
        return Case("clamp_min", {"shape": (256, 7552)}, "2.2.0", "graviton3", 4)
    batch = int(columns["shape"].removeprefix("B="))
    whole = columns["op"].startswith("MLP")
    return Case(
        *("mlp" if whole else "mlp_layers", {"batch": batch}, "2.2.0", "graviton3", 4, env), parts=1 if whole else 1 / 3
    )


def _sizes(text: str) -> tuple[int, int, int]:
    """M, K, N of ``MxK:KxN``."""
    left, right = (part.split("x") for part in text.split()[0].split(":"))
    return int(left[-2]), int(left[-1]), int(right[-1])


#: With which the pull request of that table (#107167) gave oneDNN every product, in its script ``ABt.py``.
_ALL_TO_ONEDNN = {**_FAST, "TORCH_MKLDNN_MATMUL_MIN_DIM": "0", "TORCH_MKLDNN_MATMUL_MIN_SIZE": "0"}


def _small_products(line: int, columns: Mapping[str, str]) -> Case | str:
    m, k, n = _sizes(columns["shape"])
    fast = "BF16" in columns["dtype_or_setting"]
    release, env = ("2.2.0", _ALL_TO_ONEDNN) if fast else ("2.0.0", {})
    return Case("matmul_abt", {"m": m, "k": k, "n": n}, release, "graviton3", 1, env, warm_ups=10)


_MOST = 1.2e10


def _brgemm(line: int, columns: Mapping[str, str]) -> Case | str:
    if columns["dtype_or_setting"] != "f32":
        return "INT8, which armopt has nothing to say of"
    m, k, n = _sizes(columns["shape"])
    if m * k * n > _MOST:
        return "more than 12 thousand million multiply-adds: the emulator needs hours; smaller ones are judged"
    arguments = {"m": m, "k": k, "n": n, "implementation": "brg:sve_256"}
    return Case("onednn_matmul", arguments, "2.10.0", "graviton3", 32)


#: QEMU models no Neoverse-V2. N2 has the same vectors, so the same kernels answer; their cycles are V2's own.
_ON_V2: dict[str, Any] = {"cpu": "yitian710", "target": "graviton4"}
#: Carries oneDNN 3.10: the code of autumn 2025. The 1x1 convolution (#4405) and the depthwise one (#4816) that oneDNN
#: generates were rewritten after these tables.
_ONEDNN_3_10 = "2.11.0"


def _convolutions(line: int, columns: Mapping[str, str]) -> Case | str:
    """#4201 and #4380. The latter says c7g (Neoverse-V1) and means c8g: see docs/clock.md."""
    shapes = {
        "ic256ih14oc1024kh1": ((2, 256, 14, 14), 1024, (1, 1)),
        "ic512ih7oc2048kh1": ((2, 512, 7, 7), 2048, (1, 1)),
        "ic72ih56oc80kh1": ((2, 72, 56, 56), 80, (1, 1)),
        "ic256ih56oc512kh1": ((2, 256, 56, 56), 512, (2, 1)),
    }
    shape, out, stride = shapes[columns["shape"].split()[0]]
    how = "gemm:acl" if "ACL" in columns["software"] else "jit_1x1:sve_128"
    if "before" in columns["software"]:
        return "a build of oneDNN between releases"
    arguments = {"shape": shape, "out": out, "filters": 1, "stride": stride, "implementation": how}
    return Case("onednn_conv", arguments, _ONEDNN_3_10, threads=16, **_ON_V2, warm_ups=2)


def _bf16_matmul(line: int, columns: Mapping[str, str]) -> Case | str:
    m, k, n = _sizes(columns["shape"])
    how = columns["software"].split()[3]
    if m * k * n > _MOST or (how == "gemm:jit" and m > 128):
        return "the emulator needs hours"
    arguments = {"m": m, "k": k, "n": n, "dtype": "bfloat16", "implementation": how}
    release = _ONEDNN_3_10
    if how.startswith("brg"):
        if m > 128:  # smaller ones hardly run that loop
            return "a build of oneDNN between releases"
        release = "2.13.0"  # the first that has this kernel, with another loop (#4807)
    return Case("onednn_matmul", arguments, release, threads=32, **_ON_V2, warm_ups=2)


def _depthwise(line: int, columns: Mapping[str, str]) -> Case | str:
    if "before" in columns["software"]:
        return "a build of oneDNN between releases"
    shapes = {
        "g32ic32ih112k3": ((2, 32, 112, 112), (1, 1)),
        "g64ic64ih112k3s2": ((2, 64, 112, 112), (2, 2)),
        "g128ic128ih56k3": ((2, 128, 56, 56), (1, 1)),
    }
    shape, stride = shapes[columns["shape"]]
    arguments = {"shape": shape, "out": shape[1], "filters": 3, "padding": 1, "groups": shape[1], "stride": stride}
    kind = {"f32": "float32", "bf16": "bfloat16"}[columns["dtype_or_setting"]]
    arguments |= {"implementation": "", "dtype": kind}
    return Case("onednn_conv", arguments, _ONEDNN_3_10, threads=16, **_ON_V2, warm_ups=2)


#: PyTorch's own machines build with OpenBLAS and OpenMP; later wheels for Arm have NVPL.
_WITH_OPENBLAS = "2.10.0"


def _operators(line: int, columns: Mapping[str, str]) -> Case | str:
    known: dict[int, tuple[str, dict[str, Any]]] = {
        220: ("linear", {"m": 1, "k": 1, "n": 1}),
        221: ("linear", {"m": 4, "k": 256, "n": 128}),
        222: ("linear", {"m": 16, "k": 512, "n": 256}),
        223: ("matmul", {"m": 64, "k": 64, "n": 64}),
        224: ("matmul", {"m": 64, "k": 64, "n": 128}),
        # what it says it transposes it does not
        225: ("matmul", {"m": 128, "k": 128, "n": 128, "transposed": "b"}),
        227: ("bmm", {"batch": 128, "m": 64, "k": 32, "n": 64}),
        228: ("bmm", {"batch": 128, "m": 64, "k": 32, "n": 64, "dtype": "bfloat16"}),
        231: ("conv", {"shape": (1, 128, 64), "out": 256, "filters": 3}),
        232: ("conv", {"shape": (1, 256, 16, 16), "out": 256, "filters": 3}),
        233: ("conv", {"shape": (1, 256, 16, 16), "out": 256, "filters": 1}),
        234: ("conv", {"shape": (8, 64, 4, 16, 16), "out": 64, "filters": 3}),
        235: ("pointwise", {"name": "add", "shape": (1, 1, 1)}),
        236: ("pointwise", {"name": "add", "shape": (64, 64, 64)}),
        237: ("normalized", {"kind": "layer_norm", "shape": (64, 128, 56, 56)}),
        238: ("normalized", {"kind": "softmax", "shape": (1, 3, 256, 256)}),
        239: ("normalized", {"kind": "batch_norm", "shape": (1, 256, 3136)}),
    }
    if line not in known:
        return "the size is not stated, or the figure is said to be wrong"
    make, arguments = known[line]
    release = _WITH_OPENBLAS if make in ("linear", "matmul", "bmm") else "2.13.0"
    return Case(make, arguments, release, threads=16, **_ON_V2, warm_ups=3, sleeps=True)


def _torchbench(line: int, columns: Mapping[str, str]) -> Case | str:
    if "compil" in columns["dtype_or_setting"]:
        return "Inductor compiles C++ for the core, and there is no compiler in the emulated machine"
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "mobilenet_v2": ("vision", {"name": "mobilenet_v2", "batch": 16}),
        "resnet50": ("vision", {"name": "resnet50", "batch": 32}),
        "alexnet": ("vision", {"name": "alexnet", "batch": 128}),
        "hf_Albert": ("transformer", {"name": "AlbertForMaskedLM", "batch": 1, "tokens": 512}),
        "hf_Bert": ("transformer", {"name": "BertForMaskedLM", "batch": 1, "tokens": 512}),
        "hf_GPT2": ("transformer", {"name": "GPT2LMHeadModel", "batch": 1, "tokens": 256}),
    }
    if columns["op"] not in known:
        return "the emulator needs hours, or the model's sizes are not stated"
    make, arguments = known[columns["op"]]
    return Case(make, arguments, "2.6.0", "graviton3", 16, _BENCH)


def _openblas(line: int, columns: Mapping[str, str]) -> Case | str:
    if columns["core"] != "N2" or columns["unit"] != "GFLOPS" or "first" in columns["op"]:
        return "another core, FP64, or a kernel that no release has any more"
    dtype = "bfloat16" if "sbgemm" in columns["op"] else "float32"
    arguments = {"m": 768, "k": 768, "n": 768, "dtype": dtype}
    return Case(*("blas_matmul", arguments, "2.10.0", "yitian710", 1), cpu="yitian710", flops=2 * 768**3, warm_ups=1)


def _no(reason: str) -> Callable[[int, Mapping[str, str]], str]:
    return lambda line, columns: reason


_SOURCES: Sequence[tuple[str, Callable[[int, Mapping[str, str]], Case | str]]] = (
    ("recipes/inference_tuning", _tutorial),
    ("pytorch #107168", _small_products),
    ("oneDNN PR #2686", _brgemm),
    ("oneDNN PR #2103", _brgemm),
    ("oneDNN PR #4380", _convolutions),
    ("oneDNN PR #4201", _convolutions),
    ("oneDNN PR #4315", _bf16_matmul),
    ("oneDNN PR #4159", _depthwise),
    ("operator_benchmark", _operators),
    ("learn.arm.com torchbench", _torchbench),
    ("OpenBLAS #3", _openblas),
    ("PyCon China", _no("Alibaba's builds, and sizes that are not stated")),
    ("KleidiAI", _no("a calibration of Arm's, which the clock takes: it can't judge it")),
    ("memory-subsystem", _no("a property of the machine, which the clock takes: it can't judge it")),
    ("bsc-mem", _no("a property of the machine, which the clock takes: it can't judge it")),
    ("STREAM", _no("a property of the machine, which the clock takes: it can't judge it")),
    ("oneDNN PR", _no("core, threads or sizes are not stated, or it is no time")),
    ("pytorch #", _no("models or sizes are not stated, or it is no time")),
)
