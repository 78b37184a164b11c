"""Files of this host: times of kernels, verdicts of probes; files of tensors; requests to the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from functools import cache
from pathlib import Path
from typing import Any

import httptools
import torch
from safetensors.torch import save_file
from starlette.types import ASGIApp
from torch import nn

import armopt
from armopt.bundle.mapped_weights import MappedTensors
from armopt.deploy.server.app import Service
from armopt.deploy.server.observe import LOGGER
from armopt.deploy.server.served import prepare
from armopt.deploy.server.settings import Settings
from armopt.ir.records import Op, Site
from armopt.kernels import timings
from armopt.kernels.timings import Timings
from armopt.runtime import probe_cache
from tests.fuzz.bundle_files import change_weights
from tests.fuzz.mutations import as_json, change_json, changed
from tests.fuzz.reader import Reader

SITE = Site("fc", Op.LINEAR, 8, 64, 32, (8, 64), (32, 64), weight_key="fc_weight", source="x")


def _tuning(folder: Path) -> list[Path]:
    path = folder / "tuning.json"
    times = {"conv1x1_bf16": 1e-5, "blas_fp32": 2e-5}
    timings.write(Timings({"core": "neoverse-v1", "threads": "1"}, {timings.site_key(SITE): times}), path)
    return [path]


def _read_tuning(path: Path) -> object:
    return timings.read(path).of(SITE)


def _verdicts(folder: Path) -> list[Path]:
    path = folder / "verdicts.json"
    keys = [probe_cache.key(kernel, SITE, SITE.shape) for kernel in ("conv1x1_bf16", "blas_fp32")]
    probe_cache.write(path, dict(zip(keys, (None, "ref:any"), strict=True)))
    return [path]


def _read_verdicts(path: Path) -> object:
    """Whatever it holds means no more than nothing remembered."""
    found = probe_cache.read(path)
    assert all(isinstance(key, str) and (value is None or isinstance(value, str)) for key, value in found.items())
    probe_cache.write(path, {"more": None})
    return found


def _change_json_file(rng: random.Random, path: Path) -> None:
    content = json.loads(path.read_text())
    change_json(rng, content)
    path.write_bytes(as_json(content))


def _tensors(folder: Path) -> list[Path]:
    path = folder / "weights.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(1)}, path)
    return [path]


def _read_tensors(path: Path) -> object:
    return [tensor.clone() for tensor in MappedTensors(path).tensors.values()]


# --- requests to the server ---


@cache
def _app() -> ASGIApp:
    settings = Settings(str(_served()), max_bytes=1 << 20)
    service = Service(prepare(settings), settings)
    _RUNNING.append(service.running())
    _RUNNING[0].__enter__()
    logging.getLogger(LOGGER).setLevel(logging.CRITICAL)
    return service.app


#: The thread of the model, which lives as long as the process.
_RUNNING: list[contextlib.AbstractContextManager[None]] = []


@cache
def _served() -> Path:
    path = _PLACES[0] / "served"
    armopt.optimize(nn.Linear(4, 2).eval(), (torch.zeros(1, 4),), output=path, checks=armopt.Checks(min_cosine=-1.0))
    return path


#: Where the seeds of a run are: the server's bundle lies beside its requests.
_PLACES: list[Path] = []


def _request(method: str, path: str, headers: str, body: bytes) -> bytes:
    return f"{method} {path} HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _requests(folder: Path) -> list[Path]:
    _PLACES[:] = [folder]
    _served()
    given: dict[str, Any] = {"name": "input", "shape": [1, 4], "datatype": "FP32"}
    as_text = json.dumps({"id": "1", "inputs": [given | {"data": [[1, 2, 3.5, 4]]}]}).encode()
    wanted = {"name": "output", "parameters": {"binary_data": True}}
    head = {"inputs": [given | {"parameters": {"binary_data_size": 16}}], "outputs": [wanted]}
    binary = json.dumps(head).encode()
    infer, length = "/v2/models/served/infer", f"Inference-Header-Content-Length: {len(binary)}\r\n"
    content = {
        "json": _request("POST", infer, "", as_text),
        "tensors": _request("POST", infer, length, binary + torch.ones(4).numpy().tobytes()),
        "model": _request("GET", "/v2/models/served", "", b""),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in content]


def _change_request(rng: random.Random, path: Path) -> None:
    """Changes a request's body, and mostly says how long it is now."""
    head, _, body = path.read_bytes().partition(b"\r\n\r\n")
    if b"Inference-Header" not in head and body and rng.random() < 0.7:
        content = json.loads(body)
        change_json(rng, content)
        body = as_json(content)
    else:
        body = changed(rng, body)
    if rng.random() < 0.2:
        head = changed(rng, head)
    elif rng.random() < 0.9:
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
        head = b"\r\n".join([*lines, b"Content-Length: %d" % len(body)])
    path.write_bytes(head + b"\r\n\r\n" + body)


def _answer(path: Path) -> bytes:
    """What the application answers to what httptools reads; an answer of 500 is a traceback."""
    heard = _Heard()
    try:
        parser = httptools.HttpRequestParser(heard)
        parser.feed_data(path.read_bytes())
        url = httptools.parse_url(heard.url)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return b"400"
    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": "", "headers": heard.headers}
    scope |= {
        "method": parser.get_method().decode(),
        "path": url.path.decode("ascii"),
        "query_string": url.query or b"",
    }
    scope |= {"client": ("127.0.0.1", 1), "server": ("x", 1)}
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": heard.body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(_app()(scope, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent)
    if sent[0]["status"] == 500:
        raise AssertionError(answer.decode(errors="replace"))
    return answer


class _Heard:
    """What a parser of HTTP tells."""

    def __init__(self) -> None:
        self.url, self.body, self.headers = b"/", b"", list[tuple[bytes, bytes]]()

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body


READERS = {
    each.name: each
    for each in (
        Reader("file of tensors", _tensors, _read_tensors, change_weights),
        Reader("times of kernels", _tuning, _read_tuning, _change_json_file),
        Reader("verdicts of probes", _verdicts, _read_verdicts, _change_json_file),
        Reader("request to the server", _requests, _answer, _change_request),
    )
}
