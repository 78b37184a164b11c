"""Six architectures at their natural sizes as ONNX: operations, file size, and what ONNX Runtime gives on this machine.

    python benchmarks/onnx_models.py          # prints the table
    python benchmarks/onnx_models.py --write  # and puts it into docs/onnx.md

Weights are random; of gpt2 and bert the published configurations. Compared with the model in FP32 in PyTorch.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

import armopt
from armopt import accuracy
from armopt.models.torchvision_ops import ensure_torchvision
from armopt.onnx_export import export
from armopt.onnx_export.options import OnnxOptions
from benchmarks.random_weights import randomize

PAGE = Path(__file__).resolve().parents[1] / "docs" / "onnx.md"
BEGIN, END = "<!-- models -->\n", "<!-- end of models -->\n"
Built = tuple[nn.Module, dict[str, torch.Tensor]]


def _vision(name: str, size: int, **arguments: Any) -> Callable[[], Built]:
    def build() -> Built:
        ensure_torchvision()
        import torchvision

        shape = (1, 3, size, size)
        model = torchvision.models.get_model_builder(name)(weights=None, **arguments)
        if "resnet50" not in name:  # as it is initialised that neither vanishes nor explodes
            randomize(model, [(4, 3, 64, 64)] if "vit" not in name else ())
        return model, {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))}

    return build


def _text(name: str, tokens: int) -> Callable[[], Built]:
    def build() -> Built:
        ensure_torchvision()
        import transformers

        if name == "gpt2":
            model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
        else:
            model = transformers.BertModel(transformers.BertConfig())
        ids = torch.randint(0, 30_000, (1, tokens), generator=torch.Generator().manual_seed(1))
        return randomize(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build


MODELS = {
    "resnet50, 224": _vision("resnet50", 224),
    "mobilenet_v3_large, 224": _vision("mobilenet_v3_large", 224),
    "vit_b_16, 224": _vision("vit_b_16", 224),
    "deeplabv3_resnet50, 224": _vision("deeplabv3_resnet50", 224, weights_backbone=None),
    "gpt2, 64 tokens": _text("gpt2", 64),
    "bert-base, 128 tokens": _text("bert", 128),
}


def row(name: str, folder: Path) -> list[str]:
    """One model: how many layers take the flag, operations, sizes in MB, and how close it is with BF16 weights."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.eval()
    bundle, path = folder / "bundle", folder / "model.onnx"
    armopt.optimize(model, inputs, output=armopt.Output(bundle, force=True), checks=armopt.Checks(min_cosine=-1.0))
    sizes = []
    for weights in ("fp32", "bf16"):
        done = export.export(bundle, path, OnnxOptions(weights), force=True)
        sizes.append(f"{sum(done.files.values()) / 1e6:.1f}")
    with torch.no_grad():
        expected = _first(model(**inputs))
    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {entry.name: inputs[entry.name].numpy() for entry in opened.get_inputs()}
    found = accuracy.compare(name, expected, torch.from_numpy(opened.run(None, feeds)[0]))
    graph = onnx.load(path, load_external_data=False).graph
    counted = collections.Counter(node.op_type for node in graph.node)
    most = ", ".join(f"{counted[kind]} {kind}" for kind in ("Conv", "MatMul", "Gemm", "Einsum") if counted[kind])
    layers = done.session.layers
    return [name, f"{layers.bf16} of {layers.all}", most, *sizes, f"{found.similarity:.6f}", f"{found.max_rel:.2g}"]


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else next(iter(result.values()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--write", action="store_true", help="put the table into docs/onnx.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    header = ["model", "layers for the flag", "products", "MB, fp32", "MB, bf16", "cosine", "error"]
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| {' | '.join(row(name, Path(folder)))} |")
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
