"""torchvision's ResNet-50 with one plan for each batch size.

python examples/resnet50.py
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import armopt
from armopt.models import references


def main() -> int:
    torch.manual_seed(0)
    # Random weights, so that nothing is downloaded; resolve also makes torchvision import beside a CPU-only torch.
    # Yours: torchvision.models.resnet50(weights="DEFAULT").
    model = references.resolve("torchvision:resnet50")().eval()
    image = torch.randn(1, 3, 224, 224)

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "resnet50.armopt"
        manifest = armopt.optimize(model, (image,), output=bundle, target="graviton3", batch=(1, 4)).require().manifest
        for plan in manifest.plan:
            kernels = Counter(node.kernel for node in plan.nodes)
            print(f"batch {plan.bucket['batch']}: {dict(kernels)}")
        weights = manifest.weights
        print(f"weights {weights.bytes / 1e6:.1f} MB, in FP32 {weights.fp32_bytes / 1e6:.1f} MB")

        served = armopt.load(bundle)
        for batch in (1, 2, 4):  # 2 is nearest to one of the plans in ratio, and runs with it
            images = torch.randn(batch, 3, 224, 224)
            with torch.no_grad():
                reference = model(images)
            result = served(images)
            cosine = torch.cosine_similarity(reference.flatten().double(), result.flatten().double(), dim=0)
            same = int((reference.argmax(1) == result.argmax(1)).sum())
            print(f"batch {batch}: cosine similarity to FP32 {cosine:.6f}, same class for {same} of {batch}")
            if cosine < 0.999:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
