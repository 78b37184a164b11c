"""Example inputs for torchvision's models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from armopt.errors import InputError
from armopt.models import references, torchvision_inputs, torchvision_ops
from benchmarks import random_weights
from benchmarks.coverage import torchvision as list_of_models

torchvision_ops.ensure_torchvision()

import torchvision  # noqa: E402


class TestEntries:
    def test_the_coverage_lists_every_model(self) -> None:
        listed = list_of_models.names()
        models = torchvision.models
        assert sorted(listed) == models.list_models()
        assert list_of_models.names("segmentation") == models.list_models(models.segmentation)
        assert [case.name for case in list_of_models.cases()] == listed

    def test_every_model_has_inputs(self) -> None:
        kinds = set()
        for name in torchvision.models.list_models():
            for size in ("natural", "smallest"):
                found = torchvision_inputs.entry(name, size)
                kinds.add(found.kind)
                assert all(3 in shape[:2] for shape in found.input_shapes)
            smallest = math.prod(found.input_shapes[0])
            assert smallest <= math.prod(torchvision_inputs.entry(name).input_shapes[0])
        assert kinds == {
            "classification",
            "segmentation",
            "detection",
            "video",
            "quantization",
            "optical_flow",
        }

    def test_example_inputs_are_seeded(self) -> None:
        one, again, other = (
            torchvision_inputs.example_inputs("torchvision:resnet18", seed=seed)[0] for seed in (0, 0, 1)
        )
        assert one.shape == (1, 3, 224, 224)
        assert one.equal(again)
        assert not one.equal(other)

    def test_example_inputs_of_another_model(self) -> None:
        with pytest.raises(InputError, match="--input"):
            torchvision_inputs.example_inputs("package:factory")

    @pytest.mark.parametrize(
        "name",
        [
            "squeezenet1_1",
            "lraspp_mobilenet_v3_large",
            "convnext_tiny",
            "swin_t",
            "quantized_resnet18",
            "r3d_18",
        ],
    )
    def test_smallest_input_runs(self, name: str) -> None:
        found = torchvision_inputs.entry(name, "smallest")
        model = random_weights.randomize(references.resolve(found.reference)(), found.input_shapes)
        with torch.no_grad():
            outputs = [
                pytree.tree_leaves(model(*torchvision_inputs.example_inputs(found.reference, "smallest", seed)))[0]
                for seed in (0, 1)
            ]
        assert outputs[0].isfinite().all()
        assert 1e-3 < outputs[0].std() < 1e3
        assert not torch.allclose(*outputs, rtol=1e-3)  # 1e-3: it depends on the input, not on rounding

    def test_detection_runs(self) -> None:
        reference = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
        model = references.resolve(reference)().eval()
        with torch.no_grad():
            (found,) = model(*torchvision_inputs.example_inputs(reference, "smallest"))
        assert set(found) == {"boxes", "labels", "scores"}
        assert found["boxes"].shape[1] == 4
