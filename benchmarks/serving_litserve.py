"""The same model in eager PyTorch behind LitServe, in batches.

python -m benchmarks.serving_litserve PORT
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch

from benchmarks.serving_fastapi import MOST, model

#: How long a batch may wait for more, in seconds; armopt's default too.
WAIT = 0.002


class Api(litserve.LitAPI):
    def setup(self, device: Any) -> None:
        self.served = model()

    def decode_request(self, request, **kwargs):
        return torch.tensor(request["x"][0])

    def batch(self, inputs: Any) -> torch.Tensor:
        return torch.stack(list(inputs))

    def predict(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.served(x)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"output": [output.tolist()]}


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=MOST, batch_timeout=WAIT), accelerator="cpu", workers_per_device=1)
    server.run(
        port=int(sys.argv[1]), host="127.0.0.1", num_api_servers=1, generate_client_file=False, log_level="warning"
    )
