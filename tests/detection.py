"""Detection models of torchvision, made small: seeded weights, scaled so that there is something to detect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from armopt.models import torchvision_ops

IMAGES = ((3, 96, 128), (3, 128, 112))
_CLASSES = 4


def images(*sizes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Images of blurred patches, whose features differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    patches = [torch.rand((1, 3, 6, 6), generator=generator) for _ in sizes or IMAGES]
    resize = torch.nn.functional.interpolate
    return [
        resize(patch, size=size[1:], mode="bilinear")[0] for patch, size in zip(patches, sizes or IMAGES, strict=True)
    ]


def mask_rcnn(size: int = 128) -> torch.nn.Module:
    """Mask R-CNN as torchvision builds it, narrow, on a ResNet of four blocks; images become `size`."""
    return spread(bare_mask_rcnn(size))


def bare_mask_rcnn(size: int = 128) -> torch.nn.Module:
    """The same with weights as they are initialised: for its Python."""
    torchvision_ops.ensure_torchvision()
    import torchvision
    from torchvision.models.detection import MaskRCNN, backbone_utils, faster_rcnn, mask_rcnn
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    width, classes = 32, _CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        resnet = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        layers = {f"layer{i}": str(i - 2) for i in range(2, 5)}
        backbone = backbone_utils.BackboneWithFPN(resnet, layers, [128, 256, 512], width)
        anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
        return MaskRCNN(
            backbone,
            num_classes=None,
            rpn_anchor_generator=anchors,
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
            mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=14, sampling_ratio=2),
            min_size=size,
            max_size=size * 5 // 4,
            box_head=faster_rcnn.TwoMLPHead(width * 7**2, 128),
            box_predictor=faster_rcnn.FastRCNNPredictor(128, classes),
            mask_head=mask_rcnn.MaskRCNNHeads(width, (width, width), 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, classes),
            **_STABLE,
        ).eval()


#: Every anchor is a proposal, and only boxes that nearly coincide drop one another: which one stays, when scores differ
#: by less than BF16 rounds, then changes no box by more than the comparison allows.
_STABLE: dict[str, Any] = {
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_test": 1000,
    "rpn_nms_thresh": 0.95,
    "box_nms_thresh": 0.9,
    "box_score_thresh": 0.4,
    "box_detections_per_img": 200,
}


def named(name: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """One of torchvision's own, with fewer proposals where it has any."""
    torchvision_ops.ensure_torchvision()
    from torchvision.models import get_model

    small: dict[str, Any] = {"num_classes": 2 if "keypoint" in name else _CLASSES}
    if "rcnn" in name:
        small |= {"rpn_nms_thresh": 0.95, "box_nms_thresh": 0.9}
        small |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 60}
    else:
        small |= {"nms_thresh": 0.95, "score_thresh": 0.3, "topk_candidates": 1000, "detections_per_img": 1000}
    if not name.startswith("ssd"):
        small |= {"min_size": 96, "max_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spread(get_model(name, weights=None, weights_backbone=None, **(small | options)).eval())


#: The least spread that values are scaled by, for their size: what varies less is magnified no more, nor its rounding.
_LEAST = 0.3

#: Last layers of the heads, stage by stage: the mean and spread that their outputs get.
_HEADS = (
    {"rpn.head.cls_logits": (0.0, 1.0), "rpn.head.bbox_pred": (0.0, 0.05)},
    {
        "box_predictor.cls_score": (0.0, 0.5),
        "box_predictor.bbox_pred": (0.0, 0.05),
        "classification_head.cls_logits": (-3.0, 1.0),
        "regression_head.bbox_reg": (0.0, 0.2),
        "regression_head.bbox_ctrness": (2.0, 0.5),
        "classification_head.module_list": (0.0, 0.6),
        "regression_head.module_list": (0.0, 0.3),
    },
    {"mask_predictor.mask_fcn_logits": (0.0, 0.3), "keypoint_predictor.kps_score_lowres": (0.0, 1.0)},
)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Statistics for batch norms, and heads whose outputs differ enough: scores on both sides of 0.5.

    What a residual block adds is made small, as training starts it: else a deep network of random weights magnifies any
    difference, rounding too.
    """
    from torchvision.models.detection.fcos import FCOS
    from torchvision.models.detection.ssd import SSD

    norms: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)
    }
    with torch.no_grad():
        for name in _last_norms(model):
            norms[name].weight.mul_(0.2)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    _run(model)
    for norm in norms.values():
        norm.running_var.clamp_(min=(_LEAST * norm.running_mean).square())
        norm.eval()
    for stage in _HEADS:
        seen: dict[torch.nn.Module, list[torch.Tensor]] = {}
        aims: dict[torch.nn.Module, tuple[float, float]] = {}
        for name, module in model.named_modules():
            aim = next((aim for key, aim in stage.items() if key in name), None)
            last = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))
            if aim is not None and last and module.bias is not None:
                aims[module] = aim

        def note(module: torch.nn.Module, args: Any, output: torch.Tensor, seen: Any = seen) -> None:
            seen.setdefault(module, []).append(output)

        handles = [module.register_forward_hook(note) for module in aims]
        _run(model)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for module, outputs in seen.items():
                values = torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], 1)  # by channel
                mean, aim = values.mean(1), aims[module]
                size = (values - module.bias[:, None]).square().mean().sqrt()
                scale = aim[1] / max((values - mean[:, None]).std(), _LEAST * size)
                module.weight.mul_(scale)
                module.bias.sub_(mean).mul_(scale).add_(aim[0])
    if isinstance(model, SSD):
        for level in model.head.classification_head.module_list:
            last = level if isinstance(level, torch.nn.Conv2d) else level[-1]
            last.bias.data[::_CLASSES] += 2  # the background: few boxes are anything else
    if isinstance(model, FCOS):
        model.head.regression_head.bbox_reg.bias.data += 2  # distances to the sides, in strides
    return model


def _last_norms(model: torch.nn.Module) -> Iterator[str]:
    """Names of the norms whose output is added to the block's input."""
    from torchvision.models import mobilenetv3, resnet

    for name, module in model.named_modules():
        if isinstance(module, (resnet.BasicBlock, resnet.Bottleneck)):
            yield f"{name}.bn{3 if isinstance(module, resnet.Bottleneck) else 2}"
        if isinstance(module, mobilenetv3.InvertedResidual) and module.use_res_connect:
            yield f"{name}.block.{len(module.block) - 1}.1"


def _run(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model(images(*IMAGES * 4, seed=7))


def found_again(reference: list[dict[str, Any]], result: list[dict[str, Any]]) -> tuple[int, int]:
    """Detections above 0.5, and how many of them the other has: same label, IoU of 0.9 and more, alike in all else.

    Slivers that the image's border leaves of a box don't count: a hundredth of a pixel changes their IoU.
    """
    from torchvision.ops import box_iou

    above = alike = 0
    for wanted, found in zip(reference, result, strict=True):
        iou = box_iou(wanted["boxes"], found["boxes"])
        for i, score in enumerate(wanted["scores"]):
            width, height = wanted["boxes"][i, 2:] - wanted["boxes"][i, :2]
            if score <= 0.5 or min(width, height) < 4:
                continue
            above += 1
            alike += any(
                iou[i, j] >= 0.9
                and wanted["labels"][i] == found["labels"][j]
                and abs(score - found["scores"][j]) < 0.15
                and _same_mask(wanted, i, found, j)
                for j in range(len(found["scores"]))
            )
    return above, alike


def _same_mask(wanted: dict[str, Any], i: int, found: dict[str, Any], j: int) -> bool:
    """Whether two masks agree within 0.02 on average: random weights give probabilities near 0.5 everywhere."""
    return "masks" not in wanted or bool((wanted["masks"][i] - found["masks"][j]).abs().mean() < 0.02)
