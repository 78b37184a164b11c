"""The examples for Ray, on two raylets: rows while an actor is killed, requests while replicas are added."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.serving import made

ray = pytest.importorskip("ray", reason="pip install 'ray[data,serve]'")
pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
NOTES = "ARMOPT_TEST_NOTES"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where actors write down what they do: they are processes of their own."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def cluster(notes: Path) -> Iterator[None]:
    from ray.cluster_utils import Cluster

    # workers of Ray have none of this process's paths
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", NOTES: str(notes)}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, runtime_env={"env_vars": env}, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4).eval()


@pytest.fixture(scope="module")
def bundle(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(model, torch.rand(4, 8), tmp_path_factory.mktemp("made") / "bundle", (1, 32))


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    __import__(name)
    return sys.modules[name]


@pytest.mark.usefixtures("cluster")
def test_exactly_the_rows_that_went_in_also_when_an_actor_dies(
    bundle: Path, model: nn.Module, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = example("ray_batch", monkeypatch)
    x = np.random.default_rng(0).random((4000, 8), dtype=np.float32)
    killed: list[int] = []

    class Noted(batch.Bundle):
        """Writes down its process, and takes its time."""

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            (Path(os.environ[NOTES]) / f"{os.getpid()}.{ray.get_runtime_context().get_node_id()}.actor").touch()
            time.sleep(0.05)
            result: dict[str, Any] = super().__call__(rows)
            return result

    def kill() -> None:
        while len(found := list(notes.glob("*.actor"))) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        killed.append(int(found[0].name.split(".")[0]))
        os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(batch, "Bundle", Noted)
    rows = ray.data.from_items([{"id": i, "x": row} for i, row in enumerate(x)], override_num_blocks=40)
    threading.Thread(target=kill, daemon=True).start()
    found = batch.infer(rows, str(bundle), actors=3).take_all()
    actors = [note.name.split(".") for note in notes.glob("*.actor")]
    assert killed
    assert len(actors) > 3  # one was started again
    assert len({node for _, node, _ in actors}) == 2
    assert sorted(row["id"] for row in found) == list(range(len(x)))
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))
    for row in found:
        # products of BF16 operands
        torch.testing.assert_close(torch.tensor(row["y"]), wanted[row["id"]], rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("cluster")
def test_ray_serve_answers_in_batches_and_adds_replicas(
    bundle: Path, model: nn.Module, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    online = example("ray_serve", monkeypatch)

    class Noted(online.Bundle.func_or_class):
        """Writes down its process and the rows of each run, and takes its time."""

        def __init__(self, path: str) -> None:
            super().__init__(path)
            model = self.model

            def noted(x: torch.Tensor) -> torch.Tensor:
                with (Path(os.environ[NOTES]) / f"{os.getpid()}.replica").open("a") as note:
                    note.write(f"{len(x)}\n")
                time.sleep(0.2)
                y: torch.Tensor = model(x)
                return y

            self.model = noted

    assert online.app({"bundle": str(bundle)})
    scaling = online.Bundle._deployment_config.autoscaling_config.dict()
    scaling |= {"upscale_delay_s": 1, "metrics_interval_s": 0.5, "look_back_period_s": 1, "max_replicas": 2}
    deployed = online.Bundle.options(func_or_class=Noted, autoscaling_config=scaling)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port, "host": "127.0.0.1"})
    try:
        serve.run(deployed.bind(str(bundle)))
        x = torch.rand(64, 8)
        with torch.no_grad():
            wanted = model(x)

        def replicas() -> list[list[int]]:
            return [[int(line) for line in note.read_text().split()] for note in notes.glob("*.replica")]

        def client(row: int) -> list[float]:
            body = json.dumps(x[row].tolist()).encode()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", body, timeout=60) as answer:
                found: list[float] = json.loads(answer.read())
            torch.testing.assert_close(torch.tensor(found), wanted[row], rtol=0.02, atol=0.02)
            return found

        client(0)
        assert replicas() == [[1]]
        until = time.monotonic() + 60
        with ThreadPoolExecutor(64) as clients:
            while len(replicas()) < 2 and time.monotonic() < until:
                assert len(list(clients.map(client, range(64)))) == 64
    finally:
        serve.shutdown()
    assert len(replicas()) == 2
    assert max(max(sizes) for sizes in replicas()) > 8
