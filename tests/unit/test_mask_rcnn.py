"""Detection on the real Mask R-CNN: in FP32 against itself with weights rounded to BF16, and drawn side by side."""

from __future__ import annotations

import copy

import pytest
import torch

from armopt.accuracy import compare_callables, gates
from armopt.accuracy.report import page, pictures
from armopt.models import torchvision_ops

GATES = [gates.parse(text) for text in ("box_recall>=0.7", "box_iou>=0.7", "score_drift<=0.1")]


@pytest.fixture(scope="module")
def detector() -> torch.nn.Module:
    torchvision_ops.ensure_torchvision()
    from torchvision.models import detection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        # three classes, so that scores of random weights reach a half; small images, few boxes, for speed
        model = detection.maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=3,
            min_size=128,
            max_size=160,
            box_detections_per_img=8,
            rpn_post_nms_top_n_test=30,
        )
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> list[torch.Tensor]:
    coarse = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return list(torch.nn.functional.interpolate(coarse, (96, 128), mode="bicubic").clamp(0, 1))


@pytest.mark.slow
def test_rounded_weights_find_the_same_objects(detector: torch.nn.Module, photographs: list[torch.Tensor]) -> None:
    rounded = copy.deepcopy(detector)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    outcome, checker = compare_callables(detector, rounded, [(photographs,)], gates=GATES)
    assert outcome.task == "detection"
    figures = outcome.figures["static"].task
    assert set(figures) == {"box_recall", "box_precision", "box_iou", "score_drift", "instance_iou"}
    assert outcome.passed, outcome.failures()
    assert figures["score_drift"] > 0

    evidence = checker.evidence["static"]
    assert evidence.reference["0.masks"].shape[1:] == (1, 96, 128)
    shown = pictures.pairs(evidence, "detection")
    assert [pair.title for pair in shown] == ["image 1", "image 2"]
    assert all(pair.reference != pair.found for pair in shown)
    text = page.render(page.About("b", "graviton3", "Mask R-CNN", ""), outcome, [], evidence)
    assert text.count("<img") == 4


def test_another_detector_fails(detector: torch.nn.Module, photographs: list[torch.Tensor]) -> None:
    other = copy.deepcopy(detector)
    with torch.no_grad():
        other.roi_heads.box_predictor.cls_score.bias[0] += 9.0  # all background
    outcome, _ = compare_callables(detector, other, [(photographs,)], gates=GATES[:1])
    assert not outcome.passed
    assert outcome.figures["static"].task["box_recall"] == 0.0
