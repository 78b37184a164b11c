"""torchvision's operators against plain loops."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from armopt.models import torchvision_ops

torchvision_ops.ensure_torchvision()

import torchvision  # noqa: E402

THRESHOLDS = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0)


def loop_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """Greedy suppression as its definition says, in the arithmetic of the boxes' type."""
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))  # sorted() is stable
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    zero = boxes.dtype.type(0)
    keep: list[int] = []
    with np.errstate(all="ignore"):
        for j in order:
            for i in keep:
                w = max(zero, min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]))
                h = max(zero, min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]))
                inter = w * h
                if float(inter / (areas[i] + areas[j] - inter)) > threshold:
                    break
            else:
                keep.append(j)
    return keep


def loop_roi_align(
    image: np.ndarray, rois: np.ndarray, scale: float, ph: int, pw: int, ratio: int, aligned: bool
) -> np.ndarray:
    """One sample at a time, in the arithmetic of the image's type."""
    t = image.dtype.type
    _, channels, _height, _width = image.shape
    out = np.zeros((len(rois), channels, ph, pw), image.dtype)
    for k, (index, *box) in enumerate(rois):
        x1, y1, x2, y2 = (t(t(v) * t(scale) - t(0.5 if aligned else 0)) for v in box)
        w, h = t(x2 - x1), t(y2 - y1)
        if not aligned:
            w, h = max(w, t(1)), max(h, t(1))
        bin_h, bin_w = t(h / t(ph)), t(w / t(pw))
        rows = ratio if ratio > 0 else math.ceil(bin_h)
        columns = ratio if ratio > 0 else math.ceil(bin_w)
        for i in range(ph):
            for j in range(pw):
                total = np.zeros(channels, image.dtype)
                for row in range(rows):
                    y = y1 + t(i) * bin_h + t(row + 0.5) * bin_h / t(rows)
                    for column in range(columns):
                        x = x1 + t(j) * bin_w + t(column + 0.5) * bin_w / t(columns)
                        total += bilinear(image[int(index)], y, x)
                out[k, :, i, j] = total / t(max(rows * columns, 1))
    return out


def bilinear(image: np.ndarray, y: Any, x: Any) -> np.ndarray:
    """Zero further than one pixel outside; clamped to the edge within it."""
    _, height, width = image.shape
    t = image.dtype.type
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(image.shape[0], image.dtype)
    y, x = max(y, t(0)), max(x, t(0))
    y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
    y, x = min(y, t(height - 1)), min(x, t(width - 1))
    y_next, x_next = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    ly, lx = t(y - t(y0)), t(x - t(x0))
    hy, hx = t(t(1) - ly), t(t(1) - lx)
    upper = hy * hx * image[:, y0, x0] + hy * lx * image[:, y0, x_next]
    return upper + ly * hx * image[:, y_next, x0] + ly * lx * image[:, y_next, x_next]


def random_boxes(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 100
    size = torch.rand(count, 2, generator=generator, dtype=dtype) * 40
    return torch.cat([corner, corner + size], 1), torch.rand(count, generator=generator, dtype=dtype)


# Whole coordinates: the reference's arithmetic is then exact, and overlaps meet the thresholds exactly.
corners = st.tuples(*[st.integers(0, 12)] * 4)


class TestNms:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.tuples(corners, st.integers(0, 3)), max_size=40),
        st.sampled_from(THRESHOLDS),
        st.sampled_from([torch.float32, torch.float64]),
    )
    def test_equals_the_loop_with_ties_and_degenerate_boxes(
        self, items: list[tuple[tuple[int, ...], int]], threshold: float, dtype: torch.dtype
    ) -> None:
        boxes = torch.tensor([list(box) for box, _ in items], dtype=dtype).reshape(-1, 4)
        scores = torch.tensor([score for _, score in items], dtype=dtype)
        kept = torch.ops.torchvision.nms(boxes, scores, threshold)
        assert kept.dtype == torch.int64
        assert kept.tolist() == loop_nms(boxes.numpy(), scores.numpy(), threshold)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("threshold", THRESHOLDS)
    def test_many_boxes_cross_blocks(self, dtype: torch.dtype, threshold: float) -> None:
        boxes, scores = random_boxes(700, dtype)
        kept = torchvision.ops.nms(boxes, scores, threshold)
        assert kept.tolist() == loop_nms(boxes.numpy(), scores.numpy(), threshold)

    @pytest.mark.parametrize(("block", "columns"), [(1, 1), (2, 3), (64, 7)])
    def test_blocks_do_not_matter(self, block: int, columns: int) -> None:
        boxes, scores = random_boxes(150)
        expected = torchvision_ops.nms(boxes, scores, 0.3)
        assert torchvision_ops.nms(boxes, scores, 0.3, block=block, columns=columns).equal(expected)

    def test_chain_in_which_each_box_suppresses_the_next(self) -> None:
        boxes = torch.arange(600.0)[:, None] + torch.tensor([0.0, 0.0, 3.0, 3.0])
        scores = torch.arange(600.0, 0, -1)
        assert torchvision_ops.nms(boxes, scores, 0.2).tolist() == list(range(0, 600, 2))

    def test_threshold_is_compared_as_a_double(self) -> None:
        # Overlap of 1/10. In float32 that is a little more than the double 0.1, in float64 the same.
        boxes = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
        scores = torch.tensor([2.0, 1.0])
        assert torchvision.ops.nms(boxes, scores, 0.1).tolist() == [0]
        assert torchvision.ops.nms(boxes.double(), scores.double(), 0.1).tolist() == [0, 1]

    def test_no_boxes(self) -> None:
        kept = torchvision.ops.nms(torch.empty(0, 4), torch.empty(0), 0.5)
        assert kept.shape == (0,)
        assert kept.dtype == torch.int64

    def test_nan_suppresses_nothing(self) -> None:
        boxes = torch.tensor([[math.nan, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
        assert torchvision.ops.nms(boxes, torch.tensor([3.0, 2.0, 1.0]), 0.5).tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("boxes", "scores", "message"),
        [
            (torch.zeros(4), torch.zeros(4), "2d tensor"),
            (torch.zeros(3, 5), torch.zeros(3), "4 elements"),
            (torch.zeros(3, 4), torch.zeros(3, 1), "1d tensor"),
            (torch.zeros(3, 4), torch.zeros(2), "same number"),
            (torch.zeros(3, 4), torch.zeros(3, dtype=torch.float64), "same type"),
        ],
    )
    def test_wrong_shapes(self, boxes: Tensor, scores: Tensor, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.torchvision.nms(boxes, scores, 0.5)

    def test_bfloat16(self) -> None:
        """So many that areas in BF16 would decide otherwise."""
        boxes, scores = (tensor.bfloat16() for tensor in random_boxes(700))
        assert torchvision_ops.nms(boxes, scores, 0.3).equal(torchvision_ops.nms(boxes.float(), scores.float(), 0.3))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(corners, st.integers(0, 255)), max_size=30), st.sampled_from(THRESHOLDS))
    def test_quantized(self, items: list[tuple[tuple[int, ...], int]], threshold: float) -> None:
        boxes = torch.tensor([list(box) for box, _ in items], dtype=torch.uint8).reshape(-1, 4)
        scores = torch.tensor([score for _, score in items], dtype=torch.uint8)
        expected = loop_nms(boxes.float().numpy(), scores.float().numpy(), threshold)
        assert (
            torchvision_ops.qnms(boxes, scores, threshold).tolist() == expected
        )  # 0.25's compiled library has no qnms
        quantized = [torch._make_per_tensor_quantized_tensor(tensor, 0.5, 0) for tensor in (boxes, scores)]
        assert torchvision.ops.nms(*quantized, threshold).tolist() == expected

    @pytest.mark.parametrize("count", [300, 1500])  # torchvision goes class by class above 1000 boxes
    def test_batched(self, count: int) -> None:
        boxes, scores = random_boxes(count, torch.float64)
        classes = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(0))
        kept = torchvision.ops.batched_nms(boxes, scores, classes, 0.4).tolist()
        expected = []
        for label in range(3):
            index = (classes == label).nonzero().flatten()
            survivors = loop_nms(boxes[index].numpy(), scores[index].numpy(), 0.4)
            expected += index[survivors].tolist()
        assert sorted(kept) == sorted(expected)
        assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)


class TestRoiAlign:
    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
        corners=st.lists(st.tuples(*[st.floats(-6, 14, width=32)] * 2, *[st.floats(0, 12, width=32)] * 2), max_size=4),
        scale=st.sampled_from([1.0, 0.5, 0.3]),
        size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        ratio=st.sampled_from([-1, 0, 1, 2, 3]),
        aligned=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def test_equals_the_loop_to_the_bit(
        self,
        shape: tuple[int, ...],
        corners: list[tuple[float, ...]],
        scale: float,
        size: tuple[int, int],
        ratio: int,
        aligned: bool,
        dtype: torch.dtype,
    ) -> None:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        rows = [[k % shape[0], x, y, x + w, y + h] for k, (x, y, w, h) in enumerate(corners)]
        rois = torch.tensor(rows, dtype=dtype).reshape(-1, 5)
        pooled = torch.ops.torchvision.roi_align(image, rois, scale, *size, ratio, aligned)
        expected = loop_roi_align(image.numpy(), rois.numpy(), scale, *size, ratio, aligned)
        # To the bit: the order of every sum is the reference's.
        torch.testing.assert_close(pooled, torch.from_numpy(expected), rtol=0, atol=0)

    @pytest.mark.parametrize("ratio", [-1, 2])
    @pytest.mark.parametrize("aligned", [False, True])
    def test_equals_torchvisions_own_python(self, ratio: int, aligned: bool) -> None:
        reference = sys.modules["torchvision.ops.roi_align"]._roi_align.__wrapped__
        image = torch.randn(2, 5, 30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        boxes = torch.cat([box for box, _ in [random_boxes(40, torch.float64)]]).clamp(1, 115)
        rois = torch.cat([torch.arange(40)[:, None] % 2, boxes], 1)
        pooled = torchvision.ops.roi_align(image, rois, (7, 5), 0.25, ratio, aligned)
        expected = reference(image, rois, 0.25, 7, 5, ratio, aligned)
        torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)  # the order of the sum differs

    def test_chunks_do_not_matter(self) -> None:
        image = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
        boxes, _ = random_boxes(30)
        rois = torch.cat([torch.zeros(30, 1), boxes / 6], 1)
        expected = torchvision_ops.roi_align(image, rois, 1.0, 3, 3, -1, False)
        assert torchvision_ops.roi_align(image, rois, 1.0, 3, 3, -1, False, chunk=1).equal(expected)

    def test_strided_image(self) -> None:
        image = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
        rois = torch.tensor([[1, 2.0, 3, 12, 15]])
        expected = torchvision.ops.roi_align(image, rois, 4)
        strided = image.to(memory_format=torch.channels_last)
        assert torchvision.ops.roi_align(strided, rois, 4).equal(expected)

    def test_no_regions_and_no_area(self) -> None:
        image = torch.randn(1, 3, 8, 8)
        assert torchvision.ops.roi_align(image, torch.empty(0, 5), (2, 3)).shape == (0, 3, 2, 3)
        inverted = torch.tensor([[0, 5.0, 5, 2, 2]])
        assert torchvision.ops.roi_align(image, inverted, 2, aligned=True).eq(0).all()

    def test_nan_and_far_outside_give_zero(self) -> None:
        image = torch.randn(1, 3, 8, 8)
        rois = torch.tensor([[0, math.nan, 1, 4, 4], [0, 50.0, 50, 60, 60], [0, -60.0, -60, -50, -50]])
        # Ours by name: torchvision 0.25's compiled one reads out of bounds here and crashes.
        assert torchvision_ops.roi_align(image, rois, 1.0, 2, 2, 2, False).eq(0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        rois = torch.tensor([[0, 1.0, 2, 9, 12], [0, 4.0, 4, 15, 15]], dtype=dtype)
        pooled = torchvision_ops.roi_align(image, rois, 0.5, 3, 3, 2, True)
        assert pooled.dtype == dtype
        expected = torchvision_ops.roi_align(image.double(), rois.double(), 0.5, 3, 3, 2, True)
        # Values of about 1, four samples, some ten roundings each of 2**-9 (bfloat16) at most.
        torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=0.02)

    def test_wrong_arguments(self) -> None:
        image = torch.zeros(1, 3, 8, 8)
        with pytest.raises(RuntimeError, match="K, 5"):
            torch.ops.torchvision.roi_align(image, torch.zeros(2, 4), 1.0, 2, 2, 2, False)
        with pytest.raises(RuntimeError, match="same type"):
            torch.ops.torchvision.roi_align(image, torch.zeros(2, 5).double(), 1.0, 2, 2, 2, False)

    def test_exports_as_one_node(self) -> None:
        class Pool(nn.Module):
            def forward(self, image: Tensor, rois: Tensor) -> Tensor:
                return torchvision.ops.roi_align(image, rois, (3, 2))

        inputs = (torch.randn(1, 3, 8, 8), torch.tensor([[0, 1.0, 1, 5, 5]]))
        program = torch.export.export(Pool().eval(), inputs, strict=False)
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert targets == [torch.ops.torchvision.roi_align.default]
        assert program.module()(*inputs).equal(Pool()(*inputs))
