"""torchvision's operators, so that torchvision imports beside any build of torch.

torchvision from PyPI is compiled against a CUDA torch. Beside a CPU-only torch its library does not load,
``import torchvision`` stops at the first missing operator, and transformers stops with it.
:func:`ensure_torchvision` registers what is missing, with kernels in plain PyTorch that give its results.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from armopt.errors import InputError

# As torchvision's C++ declares them: a program exported here must load beside the compiled operators too.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": (
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
    ),
}
_BLOCK = 256  # boxes decided together
_COLUMNS = 4096  # boxes compared with a block at once: 256 x 4096 floats are 4 MiB


@dataclass
class _Operators:
    """What this process has of torchvision's operators.

    Attributes:
        ready: Whether they are all there.
        library: Where those of this module are registered; it takes them with it when it is collected.
    """

    ready: bool = False
    library: Any = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_OPERATORS = _Operators()


def ensure_torchvision() -> None:
    """Make ``import torchvision`` (and so transformers) work where its compiled library does not load.

    Does nothing where the compiled operators exist. Otherwise defines the missing schemas, CPU kernels and
    fake kernels of ``torchvision::nms``, ``qnms`` and ``roi_align``; the rarer operators (roi_pool,
    ps_roi_align, deform_conv2d…) keep torchvision's own error. Gradients are not defined. Idempotent and
    thread-safe; may follow a failed ``import torchvision``.

    Raises:
        InputError: torchvision is not installed, or fails to import for another reason.
    """
    if _OPERATORS.ready:
        return
    with _OPERATORS.lock:
        if _OPERATORS.ready:
            return
        # The real library gets its chance first: it aborts the process where an operator is defined already.
        try:
            _import_torchvision()
        except ModuleNotFoundError as error:
            raise _import_failed(error) from error
        except Exception as error:
            if _schema_exists("nms"):  # then it is not for want of operators
                raise _import_failed(error) from error
            _define_missing()
            try:
                _import_torchvision()
            except Exception as second:
                raise _import_failed(second) from second
        if not sys.modules["torchvision.extension"]._has_ops():
            _define_missing()
            _lift_guards()
        _OPERATORS.ready = True


def ensure_torchvision_if_installed() -> None:
    """Makes torchvision importable if it is installed. If not, the import of whoever needs it says so."""
    if importlib.util.find_spec("torchvision") is not None:
        with contextlib.suppress(InputError):
            ensure_torchvision()


def _import_torchvision() -> None:
    """Import torchvision afresh: what a failed import left behind would be taken for loaded."""
    if "torchvision" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]
    importlib.import_module("torchvision")


def _import_failed(error: Exception) -> InputError:
    if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
        return InputError(
            "torchvision is not installed",
            hint=f"Install the release that goes with torch {torch.__version__}: pip install torchvision",
        )
    return InputError(
        f"torchvision does not import: {type(error).__name__}: {error}",
        hint=f"Reinstall the release that goes with torch {torch.__version__}",
    )


def _schema_exists(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", key))


def _define_missing() -> None:
    """Define each schema, CPU kernel and fake kernel that does not exist yet."""
    if _OPERATORS.library is None:
        untyped: Any = torch.library
        _OPERATORS.library = untyped.Library("torchvision", "FRAGMENT")
    library = _OPERATORS.library
    kernels: dict[str, Callable[..., Tensor]] = {"nms": nms, "qnms": qnms, "roi_align": roi_align}
    for name, schema in _SCHEMAS.items():
        if not _schema_exists(name):
            library.define(schema)
        if not _has_kernel(name, "CPU"):
            library.impl(name, kernels[name], "CPU")
    # In 0.25 quantized boxes reach the same operator by dispatch; later releases call qnms on their integers.
    if not _has_kernel("nms", "QuantizedCPU"):
        library.impl("nms", _quantized_nms, "QuantizedCPU")
    # The fake kernels of nms and qnms are torchvision's to register, in Python; roi_align's it leaves out.
    if not _has_kernel("roi_align", "Meta"):
        library.impl("roi_align", _fake_roi_align, "Meta")


def _lift_guards() -> None:
    """Let torchvision call the operators defined here.

    Only the two modules concerned: elsewhere "Couldn't load custom C++ ops" remains true.
    """
    boxes = sys.modules["torchvision.ops.boxes"]
    # Not an attribute of torchvision.ops: a function there has the same name.
    roi_align = sys.modules["torchvision.ops.roi_align"]
    for module in (boxes, roi_align):
        vars(module)["_assert_has_ops"] = _operators_exist
    # Without it roi_align goes to torch.compile, which needs a C++ compiler, in a version that does not blank
    # the samples outside the image.
    vars(roi_align)["_has_ops"] = _yes


def _operators_exist() -> None:  # a function, not a lambda: TorchScript compiles it from its source
    pass


def _yes() -> bool:
    return True


def _largest_at_most(value: float, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` not above `value`: to exceed it is to exceed `value` itself."""
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded


def _overlaps(a: Tensor, area_a: Tensor, b: Tensor, area_b: Tensor, threshold: Tensor) -> Tensor:
    """Which boxes of `a` [A, 4] overlap which of `b` [B, 4] by more than the threshold: [A, B], bool."""
    width = torch.minimum(a[:, None, 2], b[None, :, 2]).sub_(torch.maximum(a[:, None, 0], b[None, :, 0]))
    height = torch.minimum(a[:, None, 3], b[None, :, 3]).sub_(torch.maximum(a[:, None, 1], b[None, :, 1]))
    inter = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = (area_a[:, None] + area_b[None, :]).sub_(inter)
    return inter.div_(union) > threshold


def _split(indices: Tensor, size: int) -> tuple[Tensor, ...]:
    untyped: Any = indices
    return tuple(untyped.split(size))


def _greedy(
    boxes: Tensor, areas: Tensor, order: Tensor, iou_threshold: float, size: int = _BLOCK, columns: int = _COLUMNS
) -> Tensor:
    """Indices of the survivors, visited in `order`: a box goes when a kept one before it overlaps it."""
    threshold = _largest_at_most(iou_threshold, boxes.dtype)
    waiting = order
    kept: list[Tensor] = []
    while waiting.numel():
        block, waiting = waiting[:size], waiting[size:]
        over = _overlaps(boxes[block], areas[block], boxes[block], areas[block], threshold).triu_(diagonal=1)
        # alive[j] = no kept i < j overlaps j. Each round settles at least one more box, so the answer is the
        # greedy one, in as many rounds as the longest chain of boxes that suppress one another.
        alive = torch.ones(block.numel(), dtype=torch.bool)
        while True:
            after = ~(over & alive[:, None]).any(0)
            if torch.equal(after, alive):
                break
            alive = after
        block = block[alive]
        kept.append(block)
        survivors = [
            others[~_overlaps(boxes[block], areas[block], boxes[others], areas[others], threshold).any(0)]
            for others in _split(waiting, columns)
        ]
        waiting = torch.cat(survivors)
    return torch.cat(kept) if kept else order


def _check_boxes(dets: Tensor, scores: Tensor) -> None:
    if dets.dim() != 2:
        raise RuntimeError(f"boxes should be a 2d tensor, got {dets.dim()}D")
    if dets.size(1) != 4:
        raise RuntimeError(f"boxes should have 4 elements in dimension 1, got {dets.size(1)}")
    if scores.dim() != 1:
        raise RuntimeError(f"scores should be a 1d tensor, got {scores.dim()}D")
    if dets.size(0) != scores.size(0):
        raise RuntimeError(
            "boxes and scores should have same number of elements in dimension 0, "
            f"got {dets.size(0)} and {scores.size(0)}"
        )
    if dets.dtype != scores.dtype:
        raise RuntimeError("dets should have the same type as scores")


def nms(dets: Tensor, scores: Tensor, iou_threshold: float, *, block: int = _BLOCK, columns: int = _COLUMNS) -> Tensor:
    """The boxes that no better one overlaps too much, the best first.

    Args:
        dets: [N, 4]: x1, y1, x2, y2.
        scores: [N].
        iou_threshold: The most that two of them may overlap: intersection over union.
        block: How many boxes are decided together.
        columns: How many are compared with a block at once.

    Returns:
        Indices into `dets`.
    """
    _check_boxes(dets, scores)
    if dets.dtype in (torch.float16, torch.bfloat16):  # torchvision refuses these; a BF16 model brings them
        dets = dets.float()
    areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    return _greedy(dets, areas, scores.sort(stable=True, descending=True).indices, iou_threshold, block, columns)


def qnms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Like nms on the integers of quantized boxes: their scale cancels out."""
    _check_boxes(dets, scores)
    wide = dets.long()
    areas = ((wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])).float()
    return _greedy(dets.float(), areas, scores.sort(stable=True, descending=True).indices, iou_threshold)


def _quantized_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return qnms(dets.int_repr(), scores.int_repr(), iou_threshold)


def _fake_roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return input.new_empty((rois.size(0), input.size(1), pooled_height, pooled_width))


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    chunk: int = 1 << 21,
) -> Tensor:
    """The arithmetic of torchvision's CPU kernel, step by step, on all samples of all regions at once.

    The same to the bit in float32 and float64; in float16 the sum is rounded less often.

    Args:
        input: [N, C, H, W].
        rois: [K, 5]: batch index, x1, y1, x2, y2.
        spatial_scale: From the coordinates of regions to pixels.
        pooled_height: Bins of a region, along its height.
        pooled_width: And along its width.
        sampling_ratio: Samples of a bin along each side; below one, as many as it has pixels.
        aligned: Whether the middle of a pixel is at half a pixel.
        chunk: Elements of one temporary: 8 MiB in float32.

    Returns:
        [K, C, pooled_height, pooled_width].
    """
    if rois.dim() != 2 or rois.size(1) != 5:
        raise RuntimeError("rois must have shape as Tensor[K, 5]")
    if input.dtype != rois.dtype:
        raise RuntimeError("input should have the same type as rois")
    if input.dtype == torch.bfloat16:  # torchvision refuses it; a BF16 model brings it
        pooled = roi_align(
            input.float(), rois.float(), spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned
        )
        return pooled.bfloat16()
    _, channels, height, width = input.shape
    count, bins = rois.size(0), pooled_height * pooled_width
    output = input.new_zeros((count, bins, channels))
    if output.numel() == 0:
        return output.reshape(count, channels, pooled_height, pooled_width)

    scale = torch.tensor(spatial_scale, dtype=rois.dtype)  # rounded first, as C++ does
    x1, y1, x2, y2 = (rois[:, 1:] * scale - (0.5 if aligned else 0.0)).unbind(1)
    # Without `aligned`, a region is at least one pixel wide and high.
    least = -math.inf if aligned else 1.0
    bin_h = (y2 - y1).clamp(min=least) / pooled_height
    bin_w = (x2 - x1).clamp(min=least) / pooled_width
    if sampling_ratio > 0:
        grid_h = grid_w = torch.full((count,), sampling_ratio, dtype=torch.int64)
    else:
        grid_h, grid_w = (side.ceil().nan_to_num(0).clamp(min=0).long() for side in (bin_h, bin_w))

    # One entry for each sample of a bin: region by region, in rows, which is also the order of the sum.
    samples = grid_h * grid_w
    region = torch.repeat_interleave(samples)
    place = torch.arange(region.numel()) - (samples.cumsum(0) - samples)[region]
    columns = grid_w[region]
    row, column = place // columns, place % columns

    # Channels last: a sample is then one contiguous row.
    pixels = input.permute(0, 2, 3, 1).reshape(-1, channels)
    for part in _split(torch.arange(region.numel()), max(1, chunk // (bins * channels))):
        k = region[part]
        y = _coordinates(y1[k], bin_h[k], pooled_height, row[part], grid_h[k])
        x = _coordinates(x1[k], bin_w[k], pooled_width, column[part], grid_w[k])
        inside = ((y >= -1.0) & (y <= height))[:, :, None] & ((x >= -1.0) & (x <= width))[:, None, :]
        y_low, y_high, ly = _neighbours(y, height)
        x_low, x_high, lx = _neighbours(x, width)
        hy, hx = 1.0 - ly, 1.0 - lx
        image = (rois[k, 0].long() * (height * width))[:, None, None]
        total: Tensor | None = None
        for rows, wy, cols, wx in (
            (y_low, hy, x_low, hx),
            (y_low, hy, x_high, lx),
            (y_high, ly, x_low, hx),
            (y_high, ly, x_high, lx),
        ):
            weight = (wy[:, :, None] * wx[:, None, :]).masked_fill_(~inside, 0)
            index = image + (rows[:, :, None] * width + cols[:, None, :]).masked_fill_(~inside, 0)
            term = pixels[index.view(-1)].view(-1, bins, channels).mul_(weight.view(-1, bins, 1))
            total = term if total is None else total.add_(term)
        assert total is not None
        output.index_add_(0, k, total)
    output /= samples.clamp(min=1)[:, None, None].to(output.dtype)
    return output.transpose(1, 2).reshape(count, channels, pooled_height, pooled_width)


def _coordinates(start: Tensor, bin_size: Tensor, bins: int, step: Tensor, steps: Tensor) -> Tensor:
    """Where sample `step` of `steps` lies in each of `bins` bins along one axis: [S, bins]."""
    dtype = start.dtype
    offset = (step + 0.5).to(dtype) * bin_size / steps.to(dtype)
    return start[:, None] + torch.arange(bins, dtype=dtype) * bin_size[:, None] + offset[:, None]


def _neighbours(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels below and above a coordinate, and how far it lies from the lower one."""
    at = at.nan_to_num(0).clamp(min=0, max=size)  # beyond the ends the sample is blanked anyway
    low = at.long().clamp(max=size - 1)
    high = (low + 1).clamp(max=size - 1)
    return low, high, torch.where(low >= size - 1, 0, at - low.to(at.dtype))
