"""A detector on an image: its Python stays, its parts become a bundle, and its boxes are drawn.

    python examples/detector.py [IMAGE] [OUTPUT.png]

The weights are random, so that nothing is downloaded: the boxes show that both sides agree, not what is in the picture.
Yours: ssdlite320_mobilenet_v3_large(weights="DEFAULT").
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import armopt
from armopt.models import references


def build() -> nn.Module:
    """What the server builds too: the bundle brings all weights."""
    torch.manual_seed(0)
    return references.resolve("torchvision:ssdlite320_mobilenet_v3_large")().eval()


def picture() -> Image.Image:
    """A picture of three discs, where none is given."""
    image = Image.new("RGB", (400, 300), (225, 230, 235))
    draw = ImageDraw.Draw(image)
    for centre, radius, colour in (((90, 90), 60, "firebrick"), ((250, 170), 90, "seagreen"), ((340, 60), 40, "navy")):
        draw.ellipse([c + sign * radius for sign in (-1, 1) for c in centre], fill=colour)
    return image


def tensor(image: Image.Image) -> Tensor:
    """[3, height, width] from 0 to 1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


def main() -> int:
    image = Image.open(sys.argv[1]).convert("RGB") if len(sys.argv) > 1 else picture()
    x = tensor(image)
    model = build()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "detector"
        other = nn.functional.interpolate(x[None], scale_factor=0.75)[0]  # a second size: heights and widths vary
        result = armopt.optimize(model, [([x],), ([other],)], kind="module", output=bundle, target="graviton3")
        result.require()
        print("parts:", ", ".join(dict.fromkeys(plan.part for plan in result.manifest.plan)))

        served = armopt.load(bundle, model=build)
        (found,) = served([x])
        with torch.no_grad():
            (reference,) = model([x])

    count = min(5, len(found["boxes"]), len(reference["boxes"]))
    draw = ImageDraw.Draw(image)
    for box, score, label in zip(found["boxes"][:count], found["scores"], found["labels"], strict=False):
        draw.rectangle(box.tolist(), outline="orange", width=2)
        print(f"class {int(label)}, score {float(score):.4f}, box {[round(c) for c in box.tolist()]}")
    image.save(sys.argv[2] if len(sys.argv) > 2 else Path(tempfile.gettempdir()) / "detected.png")
    sure = [float(side["scores"][:count].sum()) for side in (reference, found)]
    print(f"{count} boxes; scores differ from FP32's by {100 * abs(sure[1] / sure[0] - 1):.2f} %")
    return 0 if count and abs(sure[1] / sure[0] - 1) < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
