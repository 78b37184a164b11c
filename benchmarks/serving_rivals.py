"""What `armopt serve` is compared with: a plain FastAPI server and LitServe, both with the model in eager PyTorch.

python -m benchmarks.serving_rivals fastapi PORT
python -m benchmarks.serving_rivals litserve PORT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

WIDTH, DEPTH, INPUTS = 1024, 4, 64
MOST = 32
#: How long a batch may wait for more, in seconds; armopt's default too.
WAIT = 0.002


def model() -> nn.Module:
    """Layers whose weights take longer to read than one row to multiply."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(INPUTS, WIDTH), nn.ReLU()]
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10)).eval()


def fastapi(port: int) -> None:
    import uvicorn
    from fastapi import FastAPI

    app, served = FastAPI(), model()

    # as such servers are written: a function that is no coroutine, in one of the framework's threads
    def predict(data: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return {"output": served(torch.tensor(data["x"])).tolist()}

    app.post("/predict")(predict)
    uvicorn.run(app, port=port, access_log=False, log_level="warning")


def litserve(port: int) -> None:
    import litserve

    class Api(litserve.LitAPI):
        def setup(self, device: Any) -> None:
            torch.set_num_threads(torch.get_num_threads())
            self.served = model()

        def decode_request(self, request: Any, **kwargs: Any) -> torch.Tensor:
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

    api = Api(max_batch_size=MOST, batch_timeout=WAIT)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, disable_openapi_url=True)
    server.run(port=port, host="127.0.0.1", num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    {"fastapi": fastapi, "litserve": litserve}[sys.argv[1]](int(sys.argv[2]))
