"""Models by name: torchvision's, made to import beside any build of torch, and the user's own factories.

torchvision from PyPI is compiled against a CUDA torch. Beside a CPU-only torch its library does not load,
``import torchvision`` stops at the first missing operator, and transformers stops with it.
:func:`ensure_torchvision` registers what is missing, with kernels in plain PyTorch that give its results.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from armopt.errors import InputError

_Model = TypeVar("_Model", bound=nn.Module)
#: Builds a model; called without arguments.
ModelFactory = Callable[[], nn.Module]
#: "natural" is what the model was made for; "smallest" is quick to run and still keeps every layer at work.
Size = Literal["natural", "smallest"]
Kind = Literal["classification", "segmentation", "detection", "video", "quantization", "optical_flow"]

# --- torchvision's operators ---

# As torchvision's C++ declares them: a program exported here must load beside the compiled operators too.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": (
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
    ),
}
_NMS_BLOCK = 256  # boxes decided together
_NMS_COLUMNS = 4096  # boxes compared with a block at once: 256 x 4096 floats are 4 MiB
_ROI_CHUNK = 1 << 21  # elements of one temporary of roi_align: 8 MiB in float32

_lock = threading.RLock()
_ready = False
# A Library takes its registrations with it when it is collected, so it lives as long as this module.
_library: Any = None


def ensure_torchvision() -> None:
    """Make ``import torchvision`` (and so transformers) work where its compiled library does not load.

    Does nothing where the compiled operators exist. Otherwise defines the missing schemas, CPU kernels and
    fake kernels of ``torchvision::nms``, ``qnms`` and ``roi_align``; the rarer operators (roi_pool,
    ps_roi_align, deform_conv2d…) keep torchvision's own error. Gradients are not defined. Idempotent and
    thread-safe; may follow a failed ``import torchvision``.

    Raises:
        InputError: torchvision is not installed, or fails to import for another reason.
    """
    global _ready
    if _ready:
        return
    with _lock:
        if _ready:
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
        _ready = True


def ensure_torchvision_if_installed() -> None:
    """The same where torchvision may be missing: whoever needs it says so at its own import."""
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
    global _library
    if _library is None:
        untyped: Any = torch.library
        _library = untyped.Library("torchvision", "FRAGMENT")
    kernels: dict[str, Callable[..., Tensor]] = {"nms": _nms, "qnms": _qnms, "roi_align": _roi_align}
    for name, schema in _SCHEMAS.items():
        if not _schema_exists(name):
            _library.define(schema)
        if not _has_kernel(name, "CPU"):
            _library.impl(name, kernels[name], "CPU")
    # In 0.25 quantized boxes reach the same operator by dispatch; later releases call qnms on their integers.
    if not _has_kernel("nms", "QuantizedCPU"):
        _library.impl("nms", _quantized_nms, "QuantizedCPU")
    # The fake kernels of nms and qnms are torchvision's to register, in Python; roi_align's it leaves out.
    if not _has_kernel("roi_align", "Meta"):
        _library.impl("roi_align", _fake_roi_align, "Meta")


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


def _greedy(boxes: Tensor, areas: Tensor, order: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the survivors, visited in `order`: a box goes when a kept one before it overlaps it."""
    threshold = _largest_at_most(iou_threshold, boxes.dtype)
    waiting = order
    kept: list[Tensor] = []
    while waiting.numel():
        block, waiting = waiting[:_NMS_BLOCK], waiting[_NMS_BLOCK:]
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
            columns[~_overlaps(boxes[block], areas[block], boxes[columns], areas[columns], threshold).any(0)]
            for columns in _split(waiting, _NMS_COLUMNS)
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


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    _check_boxes(dets, scores)
    if dets.dtype in (torch.float16, torch.bfloat16):  # torchvision refuses these; a BF16 model brings them
        dets = dets.float()
    areas = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    return _greedy(dets, areas, scores.sort(stable=True, descending=True).indices, iou_threshold)


def _qnms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Like _nms on the integers of quantized boxes: their scale cancels out."""
    _check_boxes(dets, scores)
    wide = dets.long()
    areas = ((wide[:, 2] - wide[:, 0]) * (wide[:, 3] - wide[:, 1])).float()
    return _greedy(dets.float(), areas, scores.sort(stable=True, descending=True).indices, iou_threshold)


def _quantized_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _qnms(dets.int_repr(), scores.int_repr(), iou_threshold)


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


def _roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The arithmetic of torchvision's CPU kernel, step by step, on all samples of all regions at once.

    The same to the bit in float32 and float64; in float16 the sum is rounded less often.

    Args:
        input: [N, C, H, W].
        rois: [K, 5]: batch index, x1, y1, x2, y2.

    Returns:
        [K, C, pooled_height, pooled_width].
    """
    if rois.dim() != 2 or rois.size(1) != 5:
        raise RuntimeError("rois must have shape as Tensor[K, 5]")
    if input.dtype != rois.dtype:
        raise RuntimeError("input should have the same type as rois")
    if input.dtype == torch.bfloat16:  # torchvision refuses it; a BF16 model brings it
        pooled = _roi_align(
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
    for part in _split(torch.arange(region.numel()), max(1, _ROI_CHUNK // (bins * channels))):
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


# --- references ---

_PREFIX = "torchvision:"
_FORMS = "Give torchvision:NAME (say torchvision:resnet50) or package.module:factory"


def resolve(reference: str) -> ModelFactory:
    """Find what builds a model.

    Args:
        reference: ``torchvision:NAME``, a name from ``torchvision.models.list_models()``, built with random
            weights; or ``package.module:factory``, something called without arguments that returns an
            ``nn.Module``. The module is looked for in the current folder too.

    Returns:
        A function that builds the model; it raises InputError where the factory fails or returns none.

    Raises:
        InputError: The reference names nothing that exists.
    """
    if reference.startswith(_PREFIX):
        return _torchvision_factory(reference)
    module_name, colon, attribute = reference.partition(":")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError("not a reference to a model", where=repr(reference), hint=_FORMS)
    ensure_torchvision_if_installed()
    target: object = _import_user_module(module_name, reference)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise InputError(
                f"no {name!r} in {getattr(target, '__name__', type(target).__name__)}",
                where=reference,
                hint=_suggest(name, [known for known in dir(target) if not known.startswith("_")], _FORMS),
            )
        target = getattr(target, name)
    return checked(target, reference)


def _torchvision_factory(reference: str) -> ModelFactory:
    ensure_torchvision()
    models = importlib.import_module("torchvision.models")
    name = reference.removeprefix(_PREFIX).lower()
    known = models.list_models()
    if name not in known:
        raise InputError(
            f"torchvision has no model {name!r}",
            where=reference,
            hint=_suggest(name, known, "torchvision.models.list_models() lists them all"),
        )
    options: dict[str, Any] = {"weights": None}
    if _kind(name) in ("detection", "segmentation"):
        options["weights_backbone"] = None  # its default downloads
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = True  # leaving it out warns
    return checked(lambda: models.get_model(name, **options), reference)


def _import_user_module(name: str, reference: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # and it stays: a factory may import its neighbours when it is called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(
                f"no module {missing!r}",
                where=reference,
                hint=f"Install it in this environment, or run from the folder that holds it (now {here})",
            ) from error
        raise InputError(
            f"{name} needs the module {missing!r}, which is not installed",
            where=reference,
            hint="Install it in this environment",
        ) from error
    except Exception as error:
        raise InputError(
            f"importing {name} raised {type(error).__name__}: {error}",
            where=reference,
            hint=f"Try it alone: python -c 'import {name}'",
        ) from error


def checked(target: object, reference: str) -> ModelFactory:
    """`target` as a factory whose failures name the reference.

    Raises:
        InputError: It can't be called.
    """
    if isinstance(target, nn.Module):  # a ready model is callable too, but calling it would run it
        model = target
        return lambda: model
    if not callable(target):
        raise InputError(
            f"a {type(target).__name__} is not a factory",
            where=reference,
            hint="Name a function or an nn.Module class that takes no arguments",
        )
    build = target

    def factory() -> nn.Module:
        try:
            model = build()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the factory raised {type(error).__name__}: {error}",
                where=reference,
                hint="It is called without arguments; wrap it in a function that gives it what it needs",
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"the factory returned a {type(model).__name__}, not an nn.Module",
                where=reference,
                hint="Let it return the model itself",
            )
        return model

    return factory


def _suggest(name: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else otherwise


# --- inputs ---

# The resolution each was published for, where it is not 224.
_NATURAL = {
    "inception_v3": 299,
    "efficientnet_b1": 240,
    "efficientnet_b2": 260,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    "swin_v2_t": 256,
    "swin_v2_s": 256,
    "swin_v2_b": 256,
}
# 64 leaves 2x2 pixels after the usual five halvings; one pixel would hide what a 3x3 kernel does.
_SMALLEST = 64
# Positions are learnt for this size, or (inception) the last layers need more pixels.
_SMALLEST_EXCEPTIONS = {"vit_": 224, "maxvit_": 224, "inception_": 96}


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """One torchvision model and the shapes of its inputs.

    Attributes:
        name: As in ``torchvision.models.list_models()``.
        kind: The family it belongs to.
        input_shapes: One shape for each input; for detection, the shape of each image of the one list.
    """

    name: str
    kind: Kind
    input_shapes: tuple[tuple[int, ...], ...]

    @property
    def reference(self) -> str:
        """What :func:`resolve` takes."""
        return _PREFIX + self.name


def classification_and_segmentation(size: Size = "smallest") -> tuple[ZooEntry, ...]:
    """Every torchvision classification and segmentation model, in that order, each sorted by name."""
    ensure_torchvision()
    models = importlib.import_module("torchvision.models")
    modules = (models, importlib.import_module("torchvision.models.segmentation"))
    return tuple(entry(name, size) for module in modules for name in models.list_models(module=module))


def entry(name: str, size: Size = "natural") -> ZooEntry:
    """The entry of any torchvision model.

    Args:
        name: As in ``torchvision.models.list_models()``.
        size: Which input it gets.

    Raises:
        InputError: torchvision has no such model.
    """
    resolve(_PREFIX + name)
    kind = _kind(name)
    return ZooEntry(name, kind, _input_shapes(name, kind, size))


def _kind(name: str) -> Kind:
    models = importlib.import_module("torchvision.models")
    module = str(models.get_model_builder(name).__module__)
    kinds: tuple[Kind, ...] = ("segmentation", "detection", "video", "quantization", "optical_flow")
    return next((kind for kind in kinds if f".{kind}." in module), "classification")


def _input_shapes(name: str, kind: Kind, size: Size) -> tuple[tuple[int, ...], ...]:
    small = size == "smallest"
    if kind == "optical_flow":  # RAFT's pyramid halves an eighth of the image three times more
        return ((1, 3, 128, 128),) * 2 if small else ((1, 3, 368, 496),) * 2
    if kind == "video":
        return (_clip(name, small),)
    if kind == "detection":
        return ((3, 64, 64) if small else (3, 480, 640),)
    if kind == "segmentation":
        return ((1, 3, 64, 64) if small else (1, 3, 520, 520),)
    name = name.removeprefix("quantized_")
    side = _NATURAL.get(name, 224)
    if small:
        side = next((least for stem, least in _SMALLEST_EXCEPTIONS.items() if name.startswith(stem)), _SMALLEST)
    return ((1, 3, side, side),)


def _clip(name: str, small: bool) -> tuple[int, ...]:
    """Channels first, then frames."""
    if name.startswith("mvit"):  # positions are learnt for this size
        return (1, 3, 16, 224, 224)
    if name == "s3d":  # its last pooling covers 2x7x7
        return (1, 3, 16, 224, 224)
    if name.startswith("swin3d"):
        return (1, 3, 8, 64, 64) if small else (1, 3, 32, 224, 224)
    return (1, 3, 8, 56, 56) if small else (1, 3, 16, 112, 112)


def example_inputs(reference: str, size: Size = "natural", seed: int = 0) -> tuple[Any, ...]:
    """Positional inputs for a torchvision model.

    Args:
        reference: ``torchvision:NAME``.
        size: Which input it gets.
        seed: Of the random numbers.

    Returns:
        Float32 tensors; for detection one list of images with values in [0, 1].

    Raises:
        InputError: Not a torchvision model.
    """
    if not reference.startswith(_PREFIX):
        raise InputError(
            "inputs are known for torchvision's models only",
            where=reference,
            hint="Describe them with --input NAME=1x3x224x224:float32",
        )
    found = entry(reference.removeprefix(_PREFIX).lower(), size)
    generator = torch.Generator().manual_seed(seed)
    if found.kind == "detection":
        return ([torch.rand(shape, generator=generator) for shape in found.input_shapes],)
    return tuple(torch.randn(shape, generator=generator) for shape in found.input_shapes)


def is_detection(reference: str) -> bool:
    """Whether a reference names one of torchvision's detection models, which take a list of images."""
    return reference.startswith(_PREFIX) and entry(reference.removeprefix(_PREFIX).lower()).kind == "detection"


def detection_calls(
    reference: str, images: Sequence[Tensor] = (), seed: int = 0
) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]:
    """Calls that show what may vary: one image, and two of other sizes in one list.

    Args:
        reference: ``torchvision:NAME`` of a detection model.
        images: To take instead of random ones; as one list, and the first alone.
        seed: Of the random ones.
    """
    if not images:
        generator = torch.Generator().manual_seed(seed)
        (shape,) = entry(reference.removeprefix(_PREFIX).lower()).input_shapes
        sizes = (shape, (shape[0], shape[2], shape[1]), shape)
        images = [torch.rand(size, generator=generator) for size in sizes]
        return (([images[0]],), {}), (([images[1], images[2]],), {})
    if len(images) == 1:
        images = [images[0], images[0].transpose(1, 2).contiguous()]
    return (([images[0]],), {}), ((list(images),), {})


# --- random weights that behave ---


def randomize(model: _Model, input_shapes: Sequence[Sequence[int]] = (), *, seed: int = 0) -> _Model:
    """Give a randomly initialised model weights on which a comparison of numerics means something.

    Initialisation leaves biases at 0, norms at 1, some heads at 0 and ConvNeXt's layer scales at 1e-6: such a
    model hides errors in whatever is multiplied away. Parameters left at one value get noise; batch norms get
    the statistics of random input, so that activations neither fade nor explode.

    Args:
        model: Changed in place, and left in eval mode.
        input_shapes: Of its inputs, as in :class:`ZooEntry`; empty leaves the batch norms as they are.
        seed: Of the random numbers; equal seeds give equal weights for equal models.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                _roughen(parameter, generator)
        if input_shapes:
            _calibrate_batch_norm(model, input_shapes, generator)
    return model


def _roughen(parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    value = parameter.flatten()[0].item()
    if value == 0 and parameter.dim() == 2:  # a head
        parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    elif 0 < abs(value) < 1e-3:  # a layer scale
        parameter.copy_(0.1 + 0.02 * noise)
    else:
        parameter.add_(0.1 * noise)


def _calibrate_batch_norm(model: nn.Module, shapes: Sequence[Sequence[int]], generator: torch.Generator) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average: one forward gives just its statistics
        norm.train()  # the rest stays in eval: no dropout, no auxiliary heads
    # Many examples: after global pooling a norm sees one value of each, and with too few, EfficientNet's
    # statistics fit them so closely that other inputs explode. Large examples bring many values themselves.
    batch = max(8, min(32, (1 << 17) * 3 // max(math.prod(shape[1:]) for shape in shapes)))
    model(*(torch.randn((batch, *shape[1:]), generator=generator) for shape in shapes))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        if norm.running_var is not None:
            # A channel that happened to be silent would amplify the next input three hundredfold.
            norm.running_var.clamp_(min=0.01 * norm.running_var.mean().item())
