"""The model of PyTorch's Graviton tutorial through the Python interface: optimize, load, compare with FP32.

python examples/tutorial_mlp.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import armopt


class TutorialMLP(nn.Module):
    """flatten, Linear 4096 -> 4096, ReLU, Linear 4096 -> 11008, ReLU, Linear 11008 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(
            nn.Linear(64 * 64, 4096), nn.ReLU(), nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.flatten(x))


def main() -> int:
    torch.manual_seed(0)
    model = TutorialMLP().eval()
    example = torch.rand(256, 64, 64)

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "mlp.armopt"
        # Two batch sizes. At 32 rows the tutorial found BLAS faster, because PyTorch packs the weights on each call;
        # packed once, the Compute Library in BF16 wins at both.
        manifest = (
            armopt.optimize(model, (example,), output=bundle, target="graviton3", batch=(32, 256)).require().manifest
        )
        for plan in manifest.plan:
            print(f"batch {plan.bucket['batch']}:")
            for node in plan.nodes:
                print(f"  {node.node:10} {node.kernel:14} {node.reason}")
        weights = manifest.weights
        print(f"weights {weights.bytes / 1e6:.1f} MB, in FP32 {weights.fp32_bytes / 1e6:.1f} MB")

        # On another machine than the target this warns: the portable twins run, with the target's rounding.
        served = armopt.load(bundle)

        for batch in (1, 32, 256):  # any batch size goes; the nearest plan is taken
            x = torch.rand(batch, 64, 64)
            with torch.no_grad():
                reference = model(x)
            cosine = torch.cosine_similarity(reference.flatten().double(), served(x).flatten().double(), dim=0)
            print(f"batch {batch:3}: cosine similarity to FP32 {cosine:.6f}")
            if cosine < 0.999:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
