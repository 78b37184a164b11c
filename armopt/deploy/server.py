"""Serves one bundle over HTTP with the standard library alone: the entry point that ``armopt package`` copies.

- ``POST /predict`` with ``application/json``: ``{"inputs": {"x": [[…]]}}`` -> ``{"outputs": {"y": [[…]]}}``
- ``POST /predict`` with any other type: a safetensors file of the inputs by name -> one of the outputs
- ``GET /health``: 200 where the kernels answer as they did at load, 503 where they don't

Settings: ARMOPT_BUNDLE, ARMOPT_HOST, ARMOPT_PORT, ARMOPT_MAX_BYTES (of one request). Start it with ``armopt run``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors

from armopt.errors import ArmoptError, InputError, first_line
from armopt.ir.records import InputSpec
from armopt.runtime import onednn_log
from armopt.runtime.load import load
from armopt.runtime.model import Model

_OWN_SERVER = "Serve it with a server of your own: armopt run BUNDLE -- python serve.py"
_JSON = "application/json"
_BINARY = "application/octet-stream"


class BadRequestError(Exception):
    """What the client sent can't be used."""

    def __init__(self, what: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(what)
        self.status = status


class Service:
    """A loaded bundle, and the one thread that runs it: each other would start a pool of OpenMP threads of its own."""

    def __init__(self, bundle: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="armopt")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded = self._thread.submit(load, bundle).result()
        if not isinstance(loaded, Model):
            raise InputError('a bundle of kind "module" takes more than tensors', where=bundle, hint=_OWN_SERVER)
        self.model: Model = loaded
        self.remarks = tuple(str(each.message) for each in said)
        self.inputs = {spec.name: spec for spec in self.model.manifest.model.inputs}

    def predict(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Outputs by name from inputs by name; a list becomes a tensor of the input's dtype.

        Raises:
            BadRequestError: An input is missing, unknown, or of another shape or dtype.
        """
        missing, unknown = sorted(self.inputs.keys() - inputs), sorted(inputs.keys() - self.inputs)
        if missing or unknown:
            raise BadRequestError(
                f"missing inputs: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        tensors = {name: self._tensor(spec, inputs[name]) for name, spec in self.inputs.items()}
        try:
            return self._thread.submit(self._run, tensors).result()
        except InputError as error:
            raise BadRequestError(str(error)) from None

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Runs the model once on zeros with oneDNN's log on: no reference implementation may answer."""
        tensors = {
            name: torch.zeros([s if isinstance(s, int) else 1 for s in spec.shape], dtype=_dtype(spec))
            for name, spec in self.inputs.items()
        }
        problem = self._thread.submit(self._probe, tensors).result()
        changed = [b for entries in self.model.kernels for b in entries if b.kernel != b.planned]
        return not problem, {
            "status": problem or "ok",
            "target": self.model.manifest.target,
            "portable": self.model.portable,
            "layers": sum(len(entries) for entries in self.model.kernels),
            "changed": len(changed),
            "remarks": list(self.remarks),
        }

    def _tensor(self, spec: InputSpec, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        try:
            return torch.tensor(value, dtype=_dtype(spec))
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise BadRequestError(f"input {spec.name}: {error}") from None

    def _run(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(_named(self.model(**tensors), ""))

    def _probe(self, tensors: dict[str, torch.Tensor]) -> str:
        try:
            if self.model.portable:
                self._run(tensors)
                return ""
            with onednn_log.capture_verbose() as log:
                self._run(tensors)
        except (RuntimeError, ArmoptError) as error:
            return f"the model fails: {first_line(error, 200)}"
        layers = ("convolution", "deconvolution", "matmul", "inner_product")
        slow = {e.implementation for e in onednn_log.references(log.executions) if e.primitive in layers}
        return f"oneDNN answers with {', '.join(sorted(slow))}" if slow else ""


def _dtype(spec: InputSpec) -> torch.dtype:
    return getattr(torch, spec.dtype)  # type: ignore[no-any-return]


def _named(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a model returned, each named by its path."""
    if isinstance(value, torch.Tensor):
        yield path or "output", value.contiguous()
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _named(item, f"{path}.{key}" if path else str(key))


def handler(service: Service, max_bytes: int) -> type[BaseHTTPRequestHandler]:
    """The request handler for a service."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60  # of a client that stops in the middle of a request

        def do_GET(self) -> None:
            if self.path != "/health":
                self._error(HTTPStatus.NOT_FOUND, "there are GET /health and POST /predict")
                return
            good, found = service.health()
            self._send(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, json.dumps(found).encode(), _JSON)

        def do_POST(self) -> None:
            try:
                body = self._body()
                if self.path != "/predict":
                    raise BadRequestError("there are GET /health and POST /predict", HTTPStatus.NOT_FOUND)
                as_json = self.headers.get_content_type() == _JSON
                outputs = service.predict(_from_json(body) if as_json else _from_safetensors(body))
            except BadRequestError as error:
                self._error(error.status, str(error))
            except Exception as error:  # the server outlives any request
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self._error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
            else:
                if as_json:
                    content = {"outputs": {name: tensor.tolist() for name, tensor in outputs.items()}}
                    self._send(HTTPStatus.OK, json.dumps(content).encode(), _JSON)
                else:
                    self._send(HTTPStatus.OK, write_tensors(outputs), _BINARY)

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                self.close_connection = True
                raise BadRequestError("Content-Length is missing", HTTPStatus.LENGTH_REQUIRED)
            if int(length) > max_bytes:
                self.close_connection = True  # the body stays unread
                raise BadRequestError(f"more than {max_bytes} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return self.rfile.read(int(length))

        def _error(self, status: HTTPStatus, what: str) -> None:
            self._send(status, json.dumps({"error": what}).encode(), _JSON)

        def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            print(f"{self.address_string()} {format % args}", file=sys.stderr, flush=True)

    return Handler


def _from_json(body: bytes) -> dict[str, Any]:
    try:
        inputs = json.loads(body)["inputs"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequestError('the body is not JSON of the form {"inputs": {NAME: VALUES}}') from None
    if not isinstance(inputs, dict):
        raise BadRequestError('"inputs" is not an object of values by name')
    return inputs


def _from_safetensors(body: bytes) -> dict[str, Any]:
    try:
        return dict(read_tensors(body))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadRequestError(f"the body is not a safetensors file: {error}") from None


def main() -> None:
    """Serves until SIGTERM or Ctrl-C; requests that are running end first."""
    service = Service(os.environ.get("ARMOPT_BUNDLE", "bundle"))
    for remark in service.remarks:
        print(f"armopt: {remark}", file=sys.stderr, flush=True)
    address = (os.environ.get("ARMOPT_HOST", "127.0.0.1"), int(os.environ.get("ARMOPT_PORT", "8080")))
    kind = handler(service, int(os.environ.get("ARMOPT_MAX_BYTES", str(64 << 20))))
    server = ThreadingHTTPServer(address, kind)
    server.daemon_threads = False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"serving on {server.server_address[0]!s}:{server.server_port}", file=sys.stderr, flush=True)
    server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
