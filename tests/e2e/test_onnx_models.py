"""The architectures that users export: as ONNX, checked, and run in ONNX Runtime against the model in FP32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import armopt
from armopt import accuracy
from armopt.accuracy import runs
from armopt.bundle import reader
from armopt.bundle.files import read_manifest
from armopt.models.torchvision_ops import ensure_torchvision
from armopt.onnx_export.options import OnnxOptions
from armopt.plan import threshold_policy
from armopt.runtime import load
from benchmarks.random_weights import randomize
from tests.sampling import only

#: Against the FP32 model: the rounding of weights to BF16 (2^-9 each) is the only difference but the order of sums.
LEAST_COSINE = 0.9995
#: Against the same graph in PyTorch, in FP32, with the bundle's weights; of the largest value. Over some fifty layers,
#: the order of sums; or one more rounding of the weights that the bundle holds in FP32, to 8 or 11 bits.
OTHER_ORDER, ROUNDED_TO_BF16, ROUNDED_TO_FP16 = 1e-4, 1e-2, 2e-3


@dataclass(frozen=True)
class Example:
    """A model, keyword inputs of some batch size, the dtype of weights, how far off, and the sizes of the batch."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    weights: str
    most: float
    batch: tuple[int, ...] = ()


def _images(batch: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _text(batch: int) -> dict[str, torch.Tensor]:
    """The last row is padded."""
    mask = torch.ones(batch, 24, dtype=torch.int64)
    mask[-1, 16:] = 0
    ids = torch.randint(0, 500, (batch, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


def _vision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        ensure_torchvision()
        import torchvision

        model = torchvision.models.get_model_builder(name)(weights=None, **arguments)
        randomize(model, [(2, 3, 32, 32)])
        for block in model.modules():  # as in a trained network, a block changes its input by little
            if isinstance(block, torchvision.models.resnet.Bottleneck):
                block.bn3.weight.data.mul_(0.2)
            if isinstance(block, torchvision.models.mobilenetv3.InvertedResidual) and block.use_res_connect:
                block.block[-1][1].weight.data.mul_(0.2)
        return model

    return build


def _vit() -> nn.Module:
    """vit_b_16 with two of its twelve blocks, on images of 32 by 32."""
    ensure_torchvision()
    from torchvision.models import VisionTransformer

    return randomize(
        VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072)
    )


def _gpt2() -> nn.Module:
    ensure_torchvision()
    import transformers

    sizes = {"vocab_size": 500, "n_positions": 64, "n_embd": 256, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2)
    return randomize(transformers.GPT2LMHeadModel(config))


def _bert() -> nn.Module:
    ensure_torchvision()
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    return randomize(transformers.BertModel(transformers.BertConfig(vocab_size=500, **sizes)))


EXAMPLES = {
    "resnet50": Example(_vision("resnet50"), _images, "bf16", OTHER_ORDER),
    "mobilenet_v3_large": Example(_vision("mobilenet_v3_large"), _images, "fp32", OTHER_ORDER),
    "vit_b_16": Example(_vit, _images, "fp16", ROUNDED_TO_FP16),
    "deeplabv3": Example(
        _vision("deeplabv3_mobilenet_v3_large", weights_backbone=None), _images, "bf16", ROUNDED_TO_BF16
    ),
    "gpt2": Example(_gpt2, _text, "bf16", ROUNDED_TO_BF16, batch=(1, 4)),
    "bert": Example(_bert, _text, "fp32", OTHER_ORDER, batch=(1, 4)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_functions")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", only(EXAMPLES, ["gpt2"]))
def test_a_model_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = example.build().eval()
    path = tmp_path / "bundle" / "model.onnx"
    armopt.optimize(
        model,
        example.inputs(2),
        output=armopt.Output(path.parent, onnx=OnnxOptions(example.weights)),
        batch=example.batch,
        policy=threshold_policy.ThresholdPolicy(1),
    )
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    assert all(entry.type.tensor_type.HasField("shape") for entry in graph.value_info)
    section = read_manifest(path.parent).onnxruntime
    assert section.layers.bf16 > 0
    assert {entry.domain for entry in onnx.load(path).opset_import} == {""}
    size, parameters = path.stat().st_size, sum(p.numel() for p in model.parameters())
    bytes_each = 4 if example.weights == "fp32" else 2
    tied = model.lm_head.weight.numel() if name == "gpt2" else 0  # rounded for the head, whole for the embedding
    assert bytes_each * parameters * 0.9 <= size <= bytes_each * (parameters + tied) * 1.02 + 300_000

    opened = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    read = reader.read(path.parent)
    for batch in (1, 3) if example.batch else (2,):
        inputs = example.inputs(batch)
        with torch.no_grad():
            expected = _tensors(model(**inputs))
            own = runs.InFp32(read.programs[-1].graph_module).run(*_in_order(path.parent, inputs))
        found = opened.run(None, {entry.name: inputs[entry.name].numpy() for entry in opened.get_inputs()})
        positions = read.whole.signature.outputs.positions
        for whole, position, values in zip(expected, positions, found, strict=True):
            against_model = accuracy.compare("model", whole, torch.from_numpy(values))
            assert against_model.finite
            assert against_model.similarity >= LEAST_COSINE, against_model
            against_program = accuracy.compare("program", own[position], torch.from_numpy(values))
            assert against_program.max_rel <= example.most, against_program


def _in_order(bundle: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return load.load(bundle).flatten((), inputs)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [value for value in result.values() if isinstance(value, torch.Tensor)]
