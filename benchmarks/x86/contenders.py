"""The ways to run a model on this machine; each in a process of its own, which waits for its turn.

    python -m benchmarks.x86.contenders WORKLOAD CONTENDER FOLDER

Every line of standard input is a number of calls; the answer is the seconds that they took. The first answer is the
cosine similarity of the first output to that of the eager model in FP32.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.arm64.workloads import WORKLOADS, Inputs

Call = Callable[[], Any]
ARMOPT = "armopt"


def eager(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """As users call it."""
    return lambda: model(*inputs)


def autocast(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """Under autocast to BF16."""

    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*inputs)

    return call


def inductor(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """torch.compile with frozen weights: batch norms folded, weights packed."""
    return eager(_frozen(model), inputs, folder)


def inductor_bf16(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """The same under autocast to BF16."""
    return autocast(_frozen(model), inputs, folder)


def _frozen(model: nn.Module) -> nn.Module:
    from torch._inductor import config

    config.freezing = True
    return torch.compile(model)  # type: ignore[return-value]


def bundle(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """armopt's bundle for this machine. No gate of accuracy: weights are random."""
    import armopt

    place = armopt.Output(folder / "bundle", force=True)
    checks = armopt.Checks(min_cosine=-1.0)
    if all(isinstance(x, torch.Tensor) for x in inputs):
        armopt.optimize(model, inputs, output=place, target="host", checks=checks)
        return eager(armopt.load(place.path), inputs, folder)  # type: ignore[arg-type]
    armopt.optimize(model, [inputs], output=place, target="host", kind="module", checks=checks)
    return eager(armopt.load(place.path, model=model), inputs, folder)  # type: ignore[arg-type]


def onnx_runtime(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """ONNX Runtime with all graph optimizations, in FP32: it has no kernels in BF16 for x86."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(model, inputs, folder), options, ["CPUExecutionProvider"])
    given = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, given)


def openvino(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """OpenVINO for the shortest latency, in FP32."""
    return _openvino("f32", model, inputs, folder)


def openvino_bf16(model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """The same in BF16."""
    return _openvino("bf16", model, inputs, folder)


def _openvino(precision: str, model: nn.Module, inputs: Inputs, folder: Path) -> Call:
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(_onnx(model, inputs, folder), "CPU", settings).create_infer_request()
    given = [x.numpy() for x in inputs]

    def call() -> Any:
        request.infer(given, share_inputs=True)
        return [each.data for each in request.output_tensors]

    return call


def _onnx(model: nn.Module, inputs: Inputs, folder: Path) -> str:
    """The model as PyTorch's own exporter writes it; made once."""
    path = folder / "model.onnx"
    if not path.exists():
        torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
    return str(path)


CONTENDERS: dict[str, Callable[[nn.Module, Inputs, Path], Call]] = {
    ARMOPT: bundle,
    "eager, FP32": eager,
    "eager, BF16": autocast,
    "Inductor, FP32": inductor,
    "Inductor, BF16": inductor_bf16,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO, FP32": openvino,
    "OpenVINO, BF16": openvino_bf16,
}


def cosine(found: Any, expected: Any) -> float:
    """Of the first outputs."""
    first, second = (torch.as_tensor(pytree.tree_leaves(each)[0]).double().flatten() for each in (found, expected))
    return float(nn.functional.cosine_similarity(first, second, dim=0))


def main(workload: str, contender: str, folder: str) -> None:
    """Answers until its input ends."""
    warnings.simplefilter("ignore")
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        model, inputs = WORKLOADS[workload].build()
        expected = model(*inputs)
        call = CONTENDERS[contender](model, inputs, Path(folder))
        found = [call() for _ in range(5)]
        print(cosine(found[-1], expected), file=answers, flush=True)
        for line in sys.stdin:
            calls = int(line)
            call()  # brings its weights back into the caches
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            print(time.perf_counter() - begun, file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
