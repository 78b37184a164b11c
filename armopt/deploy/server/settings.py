"""What a server is told: a record that the command makes and the serving process reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """How a bundle is served.

    Attributes:
        bundle: A folder or a zip.
        name: Of the model in URLs; empty takes the bundle's file name.
        host: Address to listen on.
        port: 0 takes a free one.
        workers: Processes.
        threads: Of each worker; 0 takes its share of the cores.
        max_bytes: Of one request.
        max_json_bytes: Of the JSON in one request. Reading it holds up all other requests of that worker.
        max_connections: Of one worker.
        max_waiting: Requests of one worker that wait for the model.
        request_seconds: From the last byte of a request to its answer, and from its first byte to its last.
        drain_seconds: From SIGTERM to the end.
        batching: Whether requests that wait are put together.
        batch_wait_ms: How long a request may wait for others while the model is busy.
        any_kernel: Whether a server is ready though layers run another kernel than planned.
        strict: See :func:`armopt.load`.
        tuning: See :func:`armopt.load`.
    """

    bundle: str
    name: str = ""
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    workers: Positive = 1
    threads: Annotated[int, Meta(ge=0)] = 0
    max_bytes: Positive = 64 << 20
    max_json_bytes: Positive = 8 << 20
    max_connections: Positive = 1000
    max_waiting: Positive = 256
    request_seconds: Seconds = 30
    drain_seconds: Seconds = 20
    batching: bool = True
    batch_wait_ms: Annotated[float, Meta(ge=0, le=10000)] = 2
    any_kernel: bool = False
    strict: bool = False
    tuning: str | None = None

    @property
    def model_name(self) -> str:
        """The name of the model in URLs."""
        path = Path(self.bundle)
        name = self.name or (path.stem if path.suffix == ".zip" else path.absolute().name)
        return re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "model"
