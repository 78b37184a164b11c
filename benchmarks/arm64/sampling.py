"""The samples that cost tables are fitted to: every kernel, counted on a grid of shapes."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from armopt import targets
from armopt.ir.records import Site
from armopt.targets.emulated import core_named
from benchmarks.arm64 import counting, cycles, emulated_jobs
from benchmarks.arm64.emulated_jobs import Job, Machine
from benchmarks.arm64.opcodes import CLASSES

SAMPLES = Path(__file__).with_name("samples")
_ROWS = (1, 2, 4, 8, 10, 16, 32, 64, 128, 256, 512)
#: (K, N): square, tall, wide, odd, and few outputs.
_PRODUCTS = (
    *((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (1024, 1024)),
    *((768, 2304), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2048, 1000), (64, 1024), (1024, 64)),
    *((513, 257), (100, 10), (1000, 100), (300, 33), (4096, 10), (1024, 2), (512, 1)),
)
#: Beyond this many multiplications a sample says nothing new, and the emulator needs minutes.
_MOST = 1.5e8
_LINEAR = ("conv1x1_bf16", "conv1x1_fastmath", "linear_fastmath", "blas_fp32_w16")
_LINEAR_FP32 = ("conv1x1_fp32", "blas_fp32")
_CONV = ("conv_bf16", "conv_fastmath")
_CONV_FP32 = ("conv_fp32",)
#: Of few channels: fast math is slower there than both.
_STEMS = ("conv_direct_fp32", "conv_bf16")
#: Cores that QEMU doesn't model, by the one that runs the same instructions: they have cycles of their own.
LIKE = {"neoverse-n2": ("neoverse-v2",)}
#: What a sample has beyond what was asked for.
_FOUND = ("counts", "cycles", "blocks", "floor")
POINTWISE, ATTENTION = "pointwise", "attention"
#: Images or windows, heads, tokens, size of a head: of BERT, ViT and Swin.
_ATTENTION = (
    *((1, 12, 64, 64), (1, 12, 128, 64), (1, 12, 197, 64), (1, 16, 32, 64), (8, 8, 16, 64)),
    *((16, 6, 49, 32), (4, 12, 49, 32), (1, 8, 100, 32)),
)
_DTYPES = ("fp32", "bf16")
#: Pointwise operations behind a kernel that doesn't fuse them, and casts.
_OPERATIONS = ("relu", "gelu", "gelu_tanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "relu6", "add")


def linear_shapes() -> Iterator[dict[str, int]]:
    """The grid of Linear layers."""
    for k, n in _PRODUCTS:
        for m in _ROWS:
            if m * k * n <= _MOST:
                yield {"m": m, "k": k, "n": n}


def conv_shapes() -> list[dict[str, Any]]:
    """The distinct convolutions of ResNet-50, MobileNet v2 and v3, and Mask R-CNN on a small image."""
    found: dict[str, dict[str, Any]] = {}
    for shape in (*_of_model("resnet50", 224), *_of_model("mobilenet_v2", 224), *_of_model("mobilenet_v3_large", 224)):
        found[json.dumps(shape)] = shape
    for shape in _of_model("resnet50", 320):
        found[json.dumps(shape)] = shape
    for size, channels in ((80, 256), (40, 512), (20, 1024), (10, 2048)):
        for shape in (_conv((1, channels, size, size), 256, 1), _conv((1, 256, size, size), 256, 3)):
            found[json.dumps(shape)] = shape
    for size in (80, 20, 5):
        for out in (3, 12):
            found[f"rpn {size} {out}"] = _conv((1, 256, size, size), out, 1)
    for batch in (2, 8):
        for size, out, filters in ((14, 256, 3), (28, 91, 1)):
            found[f"mask {batch} {size}"] = _conv((batch, 256, size, size), out, filters)
    return [shape for shape in found.values() if _multiplications(shape) <= _MOST]


def depthwise_shapes() -> list[dict[str, Any]]:
    """The distinct depthwise convolutions of EfficientNet, which has more of 5x5 than those of MobileNet."""
    shapes = {json.dumps(shape): shape for shape in _of_model("efficientnet_b0", 224) if shape["groups"] > 1}
    return list(shapes.values())


def stem_shapes() -> Iterator[dict[str, Any]]:
    """Convolutions of few channels: of photographs, of grey and depth images, and of frames stacked."""
    for size, channels, out, filters, stride in (
        *((224, 3, 16, 3, 2), (224, 3, 32, 3, 2), (112, 3, 64, 3, 2), (64, 3, 24, 3, 2), (64, 3, 64, 3, 1)),
        *((112, 3, 64, 7, 2), (64, 3, 64, 7, 2), (128, 3, 48, 4, 4), (64, 3, 96, 4, 4), (96, 3, 32, 5, 2)),
        *((28, 1, 32, 3, 1), (28, 1, 6, 5, 1), (64, 1, 64, 5, 1), (96, 1, 16, 3, 1), (84, 4, 32, 8, 4)),
        *((64, 6, 32, 3, 1), (56, 8, 32, 3, 1), (56, 8, 64, 3, 2), (32, 2, 16, 3, 1), (20, 3, 10, 3, 1)),
        *((56, 12, 32, 3, 1), (28, 16, 16, 3, 1), (56, 16, 32, 3, 1), (28, 16, 64, 3, 1), (56, 16, 64, 3, 2)),
    ):
        yield _conv((1, channels, size, size), out, filters) | {"stride": stride}


def _multiplications(shape: Mapping[str, Any]) -> float:
    batch, _, height, width = shape["shape"]
    out, channels, *filters = shape["weight"]
    return batch * height * width / shape["stride"] ** 2 * out * channels * filters[0] * filters[1]


def _conv(shape: Sequence[int], out: int, filters: int) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "weight": [out, shape[1], filters, filters],
        "stride": 1,
        "padding": filters // 2,
        "groups": 1,
    }


def _of_model(name: str, size: int) -> list[dict[str, Any]]:
    import torch
    from torch import nn

    from armopt.models import references

    model = references.resolve(f"torchvision:{name}")().eval()
    found: list[dict[str, Any]] = []

    def note(module: nn.Conv2d, args: Any, output: Any) -> None:
        found.append(
            {
                "shape": list(args[0].shape),
                "weight": list(module.weight.shape),
                "stride": module.stride[0],
                "padding": module.padding[0],
                "groups": module.groups,
            }
        )

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return found


def jobs(half: bool) -> Iterator[Job]:
    """Every kernel on every shape that it takes; only kernels in FP32 for a core without BF16."""
    yield from _pointwise_jobs(half)
    yield from _attention_jobs(half)
    for shape in linear_shapes():
        for kernel in _LINEAR if half else _LINEAR_FP32:
            if shape["n"] > 1 or kernel.startswith("blas"):
                yield _linear_job(kernel, shape)
    for shape in conv_shapes():
        if shape["groups"] == 1:
            for kernel in _CONV if half else _CONV_FP32:
                yield _conv_job(kernel, shape)
        elif shape["weight"][1] == 1:
            yield _conv_job("conv_fp32", shape)
    for shape in depthwise_shapes():
        yield _conv_job("conv_fp32", shape)
    for shape in stem_shapes() if half else ():
        yield from (_conv_job(kernel, shape) for kernel in _STEMS)


def _pointwise_jobs(half: bool) -> Iterator[Job]:
    for dtype in _DTYPES if half else _DTYPES[:1]:
        for operation in (*_OPERATIONS, "cast") if half else _OPERATIONS:
            for elements in (2048, 65536):
                arguments = {"operation": operation, "dtype": dtype, "elements": elements}
                yield Job(POINTWISE, "benchmarks.arm64.jobs:pointwise", arguments)


def _attention_jobs(half: bool) -> Iterator[Job]:
    for dtype in _DTYPES if half else _DTYPES[:1]:
        for batch, heads, tokens, size in _ATTENTION:
            sizes = {"batch": batch, "heads": heads, "tokens": tokens, "size": size}
            yield Job(ATTENTION, "benchmarks.arm64.jobs:attention", {"dtype": dtype, **sizes}, warm_ups=1)


def _linear_job(kernel: str, shape: Mapping[str, int]) -> Job:
    large = shape["m"] * shape["k"] * shape["n"] > 2e7
    arguments = {"kernel": kernel, **shape}
    return Job(kernel, "benchmarks.arm64.jobs:linear_kernel", arguments, warm_ups=1 if large else 2)


def _conv_job(kernel: str, shape: Mapping[str, Any]) -> Job:
    return Job(kernel, "benchmarks.arm64.jobs:conv_kernel", {"kernel": kernel, **shape}, warm_ups=2)


def measure(cpu: str, torch_version: str, only: str) -> None:
    """Counts what the samples don't hold yet, or without cycles; what is counted is kept as it comes."""
    core = core_named(cpu)
    files = [_File(name, torch_version) for name in (core.name, *LIKE.get(core.name, ()))]
    every = [job for job in jobs(targets.load(cpu).bf16) if only in job.name]
    missing = [job for job in every if not all(file.knows(job) for file in files)]
    SAMPLES.mkdir(exist_ok=True)

    def keep(index: int, result: Mapping[str, Any]) -> None:
        job = missing[index]
        if "error" in result:
            print(job.name, job.arguments, result["error"].splitlines()[-1], file=sys.stderr)
            return
        blocks = cycles.blocks_of(result, core.name)
        for file in files:
            file.keep(job, blocks)
            if index % 20 == 0:
                file.write()

    machine = Machine(cpu, torch_version, counting.AS_RUN, timeout=4 * 3600)
    emulated_jobs.run(
        missing,
        machine,
        "benchmarks.arm64.clock_region",
        lambda qemu: f"{qemu.clock},memory=off",
        lambda line: print(line, file=sys.stderr, flush=True),
        keep,
    )
    for file in files:
        file.write()
        print(f"{file.path}: {len(file.held)} samples")


def compare(cpu: str, torch_version: str, known: str, every: int) -> list[list[str]]:
    """Counts one of so many samples on a release that has no table, beside what another release's samples say.

    Returns:
        A row for each kernel, pointwise operations and attention: samples, those within 5 %, the median and the
        furthest of the ratios, and where that is.
    """
    samples = _File(core_named(cpu).name, known).held
    wanted = [(job, samples[key]) for job in jobs(targets.load(cpu).bf16) if (key := _key(_entry(job))) in samples]
    chosen = [pair for name in sorted({job.name for job, _ in wanted}) for pair in _some(wanted, name, every)]
    found = counting.count(
        [job for job, _ in chosen],
        cpu=cpu,
        torch_version=torch_version,
        env=counting.AS_RUN,
        timeout=4 * 3600,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    ratios: dict[str, list[tuple[float, str]]] = {}
    for (job, sample), counted in zip(chosen, found, strict=True):
        ratio = float("inf") if counted.error else counted.total / sum(sample["counts"])
        ratios.setdefault(job.name, []).append((ratio, json.dumps(job.arguments)))
    rows = []
    for name, held in ratios.items():
        near = sum(abs(ratio - 1) <= 0.05 for ratio, _ in held)
        worst, where = max(held, key=lambda each: abs(math.log(each[0])))
        median = statistics.median(ratio for ratio, _ in held)
        rows.append([name, str(len(held)), str(near), f"{median:.3f}", f"{worst:.3f}", where])
    return rows


def _some(pairs: Sequence[tuple[Job, Mapping[str, Any]]], name: str, every: int) -> Sequence[tuple[Job, Any]]:
    """One of so many of a name's, spread over its grid, and at least one."""
    return [pair for pair in pairs if pair[0].name == name][::every]


def _entry(job: Job) -> dict[str, Any]:
    return {"name": job.name, **job.arguments}


class _File:
    """The samples of one core and release."""

    def __init__(self, core: str, torch_version: str) -> None:
        self.core = core
        self.path = SAMPLES / f"{core}-torch-{torch_version}.json"
        self.held = {_key(entry): entry for entry in (read(self.path) if self.path.exists() else ())}

    def knows(self, job: Job) -> bool:
        """Whether it holds the cycles of a job."""
        return "cycles" in self.held.get(_key(_entry(job)), {})

    def keep(self, job: Job, blocks: Sequence[cycles.Block]) -> None:
        """Takes what a job ran."""
        found = cycles.cycles(blocks, self.core)
        clocked = {"cycles": round(found.cycles), "blocks": found.blocks}
        sample = {**_entry(job), "counts": cycles.by_class(blocks), **clocked}
        self.held[_key(sample)] = sample

    def write(self) -> None:
        """Writes the file."""
        write(self.path, list(self.held.values()))


def site_of(sample: Mapping[str, Any]) -> Site:
    """The layer that a sample of a kernel is of."""
    from benchmarks.arm64 import jobs

    arguments = {name: value for name, value in sample.items() if name not in ("name", "kernel", *_FOUND)}
    return jobs.conv_site(**arguments) if "shape" in sample else jobs.linear_site(**arguments)


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name not in _FOUND}, sort_keys=True)


def _floor(sample: Mapping[str, Any]) -> dict[str, int]:
    if sample["name"] in (POINTWISE, ATTENTION):
        return {}
    site = site_of(sample)
    return {"floor": site.m * site.k * site.n // 32}


def read(path: Path) -> list[dict[str, Any]]:
    """The samples of a file."""
    return json.loads(path.read_text())["samples"]  # type: ignore[no-any-return]


def write(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """One sample a line; products with their floor, the BFMMLA instructions of 256 bits that they need."""
    whole = [{**sample, **_floor(sample)} for sample in samples]
    lines = ",\n".join(json.dumps(sample) for sample in sorted(whole, key=_key))
    path.write_text('{"classes": ' + json.dumps(CLASSES) + ', "samples": [\n' + lines + "\n]}\n")
