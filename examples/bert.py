"""A Hugging Face BERT: inputs by name, a model output with named fields.

python examples/bert.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import armopt
from armopt.models import torchvision_ops

torchvision_ops.ensure_torchvision()  # transformers imports torchvision, which needs help beside a CPU-only torch

from transformers import BertConfig, BertModel  # noqa: E402


def main() -> int:
    torch.manual_seed(0)
    # A small random one, so that nothing is downloaded. Yours: BertModel.from_pretrained(...).
    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    model = BertModel(config).eval()
    tokens = {
        "input_ids": torch.randint(0, 1000, (2, 48)),
        "attention_mask": torch.ones(2, 48, dtype=torch.int64),
    }
    tokens["attention_mask"][1, 30:] = 0  # the second sentence is shorter

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bert.armopt"
        # Example inputs by name, as the model will be called.
        manifest = armopt.optimize(model, tokens, output=bundle, target="graviton3").require().manifest
        print(f"layers: {len(manifest.plan[0].nodes)}, plain ATen: {len(manifest.refused)}")

        served = armopt.load(bundle)
        result = served(**tokens)  # called as the original, and it answers as the original
        with torch.no_grad():
            reference = model(**tokens)
        print(f"returns a {type(result).__name__} with {', '.join(result.keys())}")
        for name in reference:
            cosine = torch.cosine_similarity(reference[name].flatten().double(), result[name].flatten().double(), dim=0)
            print(f"{name}: cosine similarity to FP32 {cosine:.6f}")
            if cosine < 0.999:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
