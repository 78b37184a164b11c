"""A language model that generates with its cache: generate() stays as it is, each step runs in armopt's kernels.

python examples/generate.py
"""

from __future__ import annotations

import sys

import torch

import armopt
from armopt.models import torchvision_ops

torchvision_ops.ensure_torchvision()  # transformers imports torchvision, which needs help beside a CPU-only torch

from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

NEW = 8


def main() -> int:
    torch.manual_seed(0)
    # A small random one, so that nothing is downloaded. Yours: AutoModelForCausalLM.from_pretrained(...).
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    prompt = torch.randint(1, 512, (1, 12))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    run = armopt.compile(model, target="graviton3")  # on the server leave target out: "host" is the default
    ids = run.generate(prompt, use_cache=True, output_logits=True, return_dict_in_generate=True, **options)
    print("tokens:", ids.sequences[0, 12:].tolist())

    # Both sides on the same text: each step's logits against one call of the model in FP32 on all of it.
    with torch.no_grad():
        reference = model(ids.sequences).logits[0, 11:-1]
    found = torch.cat(ids.logits)
    cosine = float(torch.cosine_similarity(found.double(), reference.double(), dim=1).min())
    print(f"{len(found)} steps with a cache: cosine similarity to FP32 {cosine:.6f}")
    print(f"layers: {len(armopt.explain(run).layers)}")
    return 0 if cosine > 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
