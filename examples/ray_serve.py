"""A bundle on Ray Serve: as many replicas as the load needs, and in each, requests that wait run as one batch.

cd examples && serve run ray_serve:app bundle=/absolute/path/of/BUNDLE     # POST / with one row as a JSON list
"""

from __future__ import annotations

import numpy as np
import torch
from ray import serve
from starlette.requests import Request

import armopt


@serve.deployment(
    ray_actor_options={"num_cpus": 1},
    max_ongoing_requests=64,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 16, "upscale_delay_s": 3},
)
class Bundle:
    def __init__(self, path: str) -> None:
        self.model = armopt.load(path)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def rows(self, rows: list[np.ndarray]) -> list[list[float]]:
        return self.model(torch.from_numpy(np.stack(rows))).tolist()

    async def __call__(self, request: Request) -> list[float]:
        return await self.rows(np.asarray(await request.json(), dtype=np.float32))


def app(arguments: dict[str, str]) -> serve.Application:
    return Bundle.bind(arguments["bundle"])
