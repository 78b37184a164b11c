"""Batch inference over Ray Data: one bundle in each actor. An actor that dies is started again, and its rows with it.

python examples/ray_batch.py BUNDLE TABLE OUTPUT    # folders of Parquet; of the table, columns id and x
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import ray
import torch

import armopt


class Bundle:
    def __init__(self, path: str) -> None:
        self.model = armopt.load(path)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": rows["id"], "y": self.model(torch.from_numpy(rows["x"])).numpy()}


def infer(rows: ray.data.Dataset, path: str, actors: int, **more: Any) -> ray.data.Dataset:
    """The rows' ids and what the model gives for them."""
    pool = ray.data.ActorPoolStrategy(size=actors)
    return rows.map_batches(Bundle, fn_constructor_args=(path,), batch_size=32, compute=pool, num_cpus=1, **more)


if __name__ == "__main__":
    bundle, table, output = sys.argv[1:]
    infer(ray.data.read_parquet(table), bundle, actors=2).write_parquet(output)
