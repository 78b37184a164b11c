"""The model that servers are compared with, in eager PyTorch behind a plain FastAPI server.

python -m benchmarks.serving_fastapi PORT
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

WIDTH, DEPTH, INPUTS = 1024, 4, 64
MOST = 32


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


if __name__ == "__main__":
    fastapi(int(sys.argv[1]))
