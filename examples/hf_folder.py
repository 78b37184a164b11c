"""A Hugging Face folder as it is: config.json says what model it holds, and texts may have any length.

python examples/hf_folder.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import armopt
from armopt.models import torchvision_ops

torchvision_ops.ensure_torchvision()  # transformers imports torchvision, which needs help beside a CPU-only torch

from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification  # noqa: E402


def small(folder: Path) -> Path:
    """A small classifier of texts with random weights, so that nothing is downloaded."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        num_labels=3,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else small(Path(work) / "model")
        bundle = Path(work) / "bundle"
        # On the command line: armopt optimize FOLDER -o BUNDLE
        manifest = armopt.optimize(folder, output=bundle, target="graviton3").require().manifest
        print(
            f"{manifest.model.source}: {len(manifest.plan[0].nodes)} layers, planned at {dict(manifest.plan[0].bucket)}"
        )

        served = armopt.load(bundle)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for length in (7, 128, 300):  # every length runs at its own size: nothing is padded
            ids = torch.randint(0, model.config.vocab_size, (1, length))
            mask = torch.ones_like(ids)
            with torch.no_grad():
                reference = model(input_ids=ids, attention_mask=mask).logits
            logits = served(input_ids=ids, attention_mask=mask).logits
            error = float((logits - reference).abs().max() / reference.abs().max())
            print(f"{length} tokens: largest error {100 * error:.2f} % of the largest logit")
            if error > 0.05:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
