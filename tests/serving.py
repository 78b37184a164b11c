"""Bundles to serve, and a server in processes of its own, as `armopt serve` starts it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import armopt


class Rows(nn.Module):
    """Three outputs of three dtypes, NaN where a logarithm has none."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"log": (y + 4).log(), "sum": x.sum(1), "positive": x > 0, "half": x.bfloat16()}


class Tokens(nn.Module):
    """Whole numbers that a table of 50 rows has, of two dynamic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids)).mean(1)


class Centred(nn.Module):
    """Rows that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0, keepdim=True))


def made(
    model: nn.Module, example: torch.Tensor, path: Path, batch: Sequence[int] = (1, 4), target: str = "graviton3"
) -> Path:
    checks = armopt.Checks(min_cosine=-1.0)
    armopt.optimize(model.eval(), (example,), output=path, batch=list(batch), target=target, checks=checks)
    return path


@dataclass
class Running:
    """A server that runs: its arbiter's process, its port, its lines of log so far."""

    process: subprocess.Popen[str]
    port: int = 0
    name: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content.startswith(b"{") else {"text": content}
        finally:
            connection.close()

    def infer(
        self, x: Sequence[Sequence[float]], name: str = "x", datatype: str = "FP32"
    ) -> tuple[int, dict[str, Any]]:
        given = {"name": name, "shape": [len(x), len(x[0])], "datatype": datatype, "data": list(x)}
        return self.ask("POST", f"/v2/models/{self.name}/infer", json.dumps({"inputs": [given]}).encode())

    def workers(self) -> list[int]:
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in task.read_text().split()]

    def said(self, pattern: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if re.search(pattern, line["event"])]

    def wait_until_ready(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self.ask("GET", "/v2/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.lines}")


@contextmanager
def running(command: Sequence[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> Iterator[Running]:
    process = subprocess.Popen(command, env=env, cwd=cwd, stderr=subprocess.PIPE, text=True)
    server = Running(process)
    heard = threading.Event()

    def listen() -> None:
        assert process.stderr
        for line in process.stderr:
            server.lines.append(json.loads(line) if line.startswith("{") else {"event": line})
            if found := re.match(r"serving (\S+) on http://\S+:(\d+)$", server.lines[-1]["event"]):
                server.name, server.port = found[1], int(found[2])
                heard.set()
        heard.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        heard.wait(120)
        assert server.port, server.lines
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextmanager
def served(bundle: Path, *options: str, **environ: str) -> Iterator[Running]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "DNNL_"))} | environ
    command = [sys.executable, "-m", "armopt", "serve", str(bundle), "--port", "0", *options]
    with running(command, env) as server:
        server.wait_until_ready()
        yield server
