"""What a server tells of itself: log lines as JSON, and metrics for Prometheus."""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from armopt.deploy.server.shared import SHARED
from armopt.errors import printable

LOGGER = "armopt.serve"
_MOST_LINES = 10_000
#: Seconds for which lines gather before they are written.
_GATHERED = 0.1
_STDERR = 2
_PATIENCE_MS = 100
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class JsonLines(logging.Formatter):
    """One JSON object on each line. Nothing that a client sent reaches a terminal as a control character."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "process": record.process,
            "event": printable(record.getMessage()),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {name: printable(value) if isinstance(value, str) else value for name, value in fields.items()}
        if record.exc_info:
            line["error"] = printable(self.formatException(record.exc_info), keep="\n")
        return json.dumps(line)


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Writes one line."""
    logging.getLogger(LOGGER).log(level, event, extra={"fields": fields}, exc_info=error)


class ToStderr(logging.Handler):
    """Writes a line at once, and loses one that can't be written: to a full disk, or to a reader that stopped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it, in parts that a pipe takes whole."""
        line = JsonLines().format(record).encode() + b"\n"
        with suppress(OSError):
            takes = select.poll()
            takes.register(_STDERR, select.POLLOUT)
            while line and takes.poll(_PATIENCE_MS):
                line = line[os.write(_STDERR, line[: select.PIPE_BUF]) :]


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Sends this process's lines to stderr by a thread: a full disk or a reader that stopped holds up no request."""
    lines = _Lines()
    logger = logging.getLogger(LOGGER)
    logger.handlers, logger.propagate = [lines], False
    logger.setLevel(logging.INFO)
    writer = threading.Thread(target=lines.write, name="armopt-log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        lines.ended.set()
        writer.join(1)  # a reader that stopped doesn't hold up the end


class _Lines(logging.Handler):
    """Keeps records until its thread writes them, some at a time: one that woke for each would hold up requests.

    Attributes:
        ended: Set when no more come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self._records: deque[logging.LogRecord] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps it; the oldest goes where too many wait."""
        self._records.append(record)

    def write(self) -> None:
        """Writes until the end."""
        last, to_stderr = False, ToStderr()
        while not last:
            last = self.ended.wait(_GATHERED)
            while self._records:
                to_stderr.emit(self._records.popleft())


class Metrics:
    """Counters of one process, which :meth:`text` adds up over all workers where they share a folder."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "armopt_requests", "Requests by route and status code.", ("route", "code"), registry=registry
        )
        self.seconds = Histogram(
            "armopt_request_seconds", "From a request's head to the end of its answer.", ("route",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.model_seconds = Histogram(
            "armopt_model_seconds", "Of one run of the model.", buckets=_SECONDS, registry=registry
        )
        self.rows = Histogram("armopt_batch_rows", "Rows of one run of the model.", buckets=_ROWS, registry=registry)
        self.joined = Histogram(
            "armopt_batch_requests", "Requests of one run of the model.", buckets=_ROWS, registry=registry
        )
        self.waiting = Gauge(
            "armopt_waiting_requests", "Requests that wait for the model.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def ran(self, requests: int, rows: int, seconds: float) -> None:
        """Counts one run of the model."""
        self.joined.observe(requests)
        self.rows.observe(rows)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        """All metrics as Prometheus reads them."""
        if SHARED not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
