"""The example for Ray, on two raylets of this machine, while one of its actors is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.serving import made

ray = pytest.importorskip("ray", reason="the example needs ray[data]")
EXAMPLE = Path(__file__).parents[2] / "examples/ray_batch.py"


@pytest.mark.full
def test_exactly_the_rows_that_went_in_also_when_an_actor_dies(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    described = importlib.util.spec_from_file_location("ray_batch", EXAMPLE)
    assert described
    assert described.loader
    example = importlib.util.module_from_spec(described)
    described.loader.exec_module(example)
    torch.manual_seed(0)
    model = nn.Linear(8, 4).eval()
    bundle = made(model, torch.rand(4, 8), tmp_path / "bundle", (1, 32))
    x = np.random.default_rng(0).random((4000, 8), dtype=np.float32)
    # workers of Ray have none of this process's paths
    env = {"PYTHONPATH": str(EXAMPLE.parents[1]), "ARMOPT_TEST_ACTORS": str(tmp_path)}
    killed: list[int] = []

    class Noted(example.Bundle):  # type: ignore[name-defined, misc]
        """Writes down its process, and takes its time."""

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            (Path(os.environ["ARMOPT_TEST_ACTORS"]) / f"{os.getpid()}.actor").touch()
            time.sleep(0.05)
            result: dict[str, Any] = super().__call__(rows)
            return result

    def kill() -> None:
        while not (found := list(tmp_path.glob("*.actor"))):
            time.sleep(0.05)
        time.sleep(0.5)
        killed.append(int(found[0].stem))
        os.kill(killed[0], signal.SIGKILL)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, runtime_env={"env_vars": env}, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        example.Bundle = Noted
        rows = ray.data.from_items([{"id": i, "x": row} for i, row in enumerate(x)], override_num_blocks=40)
        threading.Thread(target=kill, daemon=True).start()
        found = example.infer(rows, str(bundle), actors=2).take_all()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert sorted(row["id"] for row in found) == list(range(len(x)))
    wanted = model(torch.from_numpy(x)).detach()
    for row in found:
        # products of BF16 operands
        torch.testing.assert_close(torch.tensor(row["y"]), wanted[row["id"]], rtol=0.02, atol=0.02)
