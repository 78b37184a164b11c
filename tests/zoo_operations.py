"""What the programs of many models call: tests/data/zoo_operations.txt, against which the closed list is checked.

``python -m tests.zoo_operations --write`` goes through tests.zoo_models and through torchvision's models for
classification, segmentation, video and detection (their parts), captures, prepares and lowers each, and writes the
names of all operations. ``--only NAME`` adds those of some models to what the file has. Every program is run on tensors
without data too, as it is when its bundle is read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from armopt import capture
from armopt.bundle import codec, dry_run
from armopt.bundle.program import describe_program
from armopt.capture.files import Divided
from armopt.compiler.captured_model import CapturedModel, capture_model
from armopt.compiler.recipe import Recipe
from armopt.ir.records import Signature
from armopt.models import references, torchvision_inputs
from benchmarks.coverage import torchvision
from tests import zoo_models

FILE = Path(__file__).parent / "data" / "zoo_operations.txt"
SEGMENTATION = (
    *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
)
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v1_b", "mvit_v2_s")
DETECTION = (
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"),
    *("fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)


def captured(name: str) -> CapturedModel:
    """A model by name; detection models in parts, on small images."""
    if name not in DETECTION:
        model, args, kwargs = zoo_models.build(name)
        return capture_model(capture.module(model, args, kwargs, source=name))
    reference = f"{references.TORCHVISION}{name}"
    model = references.resolve(reference)().eval()
    if not name.startswith("ssd"):  # those have one size
        model.transform.min_size, model.transform.max_size = (128,), 192
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((96, 128), (128, 96), (96, 128))]
    return capture_model(Divided(model, torchvision_inputs.detection_calls(reference, images), reference))


def operations(name: str) -> set[str]:
    """What the programs of a model call: as captured, and lowered for a core with BF16 and for one without."""
    found: set[str] = set()
    for part in captured(name).parts:
        taken = part.captured
        specs = tuple(spec for spec in taken.input_specs)
        signature = Signature(taken.inputs, taken.outputs, specs, taken.symbols)  # type: ignore[arg-type]
        for target in ("graviton3", "graviton2"):
            recipe = Recipe.of(target)
            planned = recipe.plan_part(part)
            for program in recipe.lower_part(planned):
                dry_run.check(program, signature, program.bucket, sys.maxsize, f"{name} {part.path}")
                found |= {node.target for node in codec.encode(program).nodes if hasattr(node, "args")}
            whole = describe_program(planned.prepared.graph_module, {}, {})
            found |= {node.target for node in codec.encode(whole).nodes if hasattr(node, "args")}
    return found


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(words)
    names = asked.only or [*zoo_models.MODELS, *torchvision.names("classification"), *SEGMENTATION, *VIDEO, *DETECTION]
    found = set(FILE.read_text().split()) if asked.only else set()
    failed = []
    for name in names:
        try:
            more = operations(name) - found
        except Exception as error:
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        found |= more
        print(f"{name}: {', '.join(sorted(more)) or 'nothing new'}", flush=True)
    if asked.write:
        FILE.write_text("\n".join(sorted(found)) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
