"""The ASGI application: routes of the Open Inference Protocol v2, limits, and what is told of each request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armopt._version import __version__
from armopt.deploy.server import openapi, protocol
from armopt.deploy.server.engine import Engine
from armopt.deploy.server.observe import Metrics, log, logging_to_stderr
from armopt.deploy.server.protocol import RefusedError
from armopt.deploy.server.served import Served
from armopt.deploy.server.settings import Settings
from armopt.errors import printable

#: How long a probe of the kernels counts.
_PROBE_SECONDS = 30
#: What else clients are told that come while too many others are there.
_BUSY = {
    HTTPStatus.TOO_MANY_REQUESTS: {"retry-after": "1"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"retry-after": "1", "connection": "close"},
}
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """One worker's part of a server: the model's thread, and what the routes need.

    Attributes:
        app: The ASGI application.
        draining: Whether the worker ends: each answer then closes its connection.
        connections: Tells how many the worker has.
    """

    def __init__(self, served: Served, settings: Settings, *, threads: int = 0) -> None:
        self.served = served
        self.settings = settings
        self.draining = False
        self.connections: Callable[[], int] = lambda: 0
        self._threads = threads
        self._metrics = Metrics()
        self._engine: Engine | None = None
        self._probed: tuple[float, str] | None = None
        self._pages = openapi.describe(settings.model_name, served)
        model = f"/v2/models/{settings.model_name}"
        routes = [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/metrics", self._counted),
            Route("/openapi.json", self._openapi),
            Route("/docs", self._docs),
        ]
        for prefix in (model, f"{model}/versions/{served.version}"):
            routes += [
                Route(prefix, self._model),
                Route(f"{prefix}/ready", self._ready),
                Route(f"{prefix}/infer", self._infer, methods=["POST"]),
            ]
        starlette = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                HTTPException: _http_error,
                RefusedError: _refused,
                ClientDisconnect: _gone,
                Exception: _fault,
            },
        )
        starlette.router.redirect_slashes = False  # to where the client's Host header says
        self.app: ASGIApp = _Told(starlette, self, frozenset(route.path for route in routes))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Has the model's thread and the log while the block runs."""
        settings = self.settings
        with logging_to_stderr():
            self._engine = Engine(
                self.served,
                most_waiting=settings.max_waiting,
                wait_seconds=settings.batch_wait_ms / 1000,
                threads=self._threads,
                ran=self._metrics.ran,
            )
            try:
                yield
            finally:
                self._engine.stop(1)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with self.running():
            yield

    @property
    def engine(self) -> Engine:
        """The model's thread."""
        assert self._engine is not None, "the application's lifespan has not begun"
        return self._engine

    # --- routes ---

    async def _server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return _json({"name": "armopt", "version": __version__, "extensions": extensions})

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        problem = await self._problem()
        status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
        answer: dict[str, Any] = {"name": self.settings.model_name, "ready": not problem}
        return _json(answer | ({"error": problem} if problem else {}), status)

    async def _problem(self) -> str:
        """Why no request should be sent here; empty where there is no reason."""
        if self.draining:
            return "the server is ending"
        if self.served.changed and not self.settings.any_kernel:
            return self.served.changed
        if self._probed is None or time.monotonic() - self._probed[0] > _PROBE_SECONDS:
            found = await self.engine.probe(self.settings.request_seconds)
            if found != (self._probed[1] if self._probed else ""):
                log("kernels probed", level=logging.WARNING, problem=found)
            self._probed = (time.monotonic(), found)
        return self._probed[1]

    async def _model(self, request: Request) -> Response:
        return _json(openapi.metadata(self.settings.model_name, self.served))

    async def _counted(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=_PROMETHEUS)

    async def _openapi(self, request: Request) -> Response:
        return _json(self._pages)

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(openapi.page(self._pages))

    async def _infer(self, request: Request) -> Response:
        if self.connections() > self.settings.max_connections:
            what = f"more than {self.settings.max_connections} connections"
            raise RefusedError(what, HTTPStatus.SERVICE_UNAVAILABLE)
        coding = request.headers.get("content-encoding", "").lower()
        transfer = request.headers.get("transfer-encoding", "").lower()
        if coding not in ("", "identity") or transfer not in ("", "chunked"):
            raise RefusedError("compressed bodies are not read", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        body = await self._body(request)
        asked = protocol.read(body, request.headers.get(protocol.HEADER_LENGTH), self.settings.max_json_bytes)
        names = [spec.name for spec in self.served.inputs]
        missing, unknown = sorted(set(names) - asked.tensors.keys()), sorted(asked.tensors.keys() - set(names))
        if missing or unknown:
            raise RefusedError(
                f"missing inputs: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        outputs = await self.engine.run([asked.tensors[name] for name in names], self.settings.request_seconds)
        parts, headers = protocol.write(asked, outputs, self.settings.model_name, self.served.version)
        return Response(b"".join(parts), headers=headers)

    async def _body(self, request: Request) -> bytearray:
        most = self.settings.max_bytes
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > most:
            raise RefusedError(f"more than {most} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.request_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise RefusedError(f"more than {most} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        except TimeoutError:
            what = f"the body did not come within {self.settings.request_seconds:g} seconds"
            raise RefusedError(what, HTTPStatus.REQUEST_TIMEOUT) from None
        return body

    def told(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        """Counts one request and writes its line."""
        self._metrics.requests.labels(route, status).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        self._metrics.waiting.set(self.engine.waiting)
        client = scope.get("client") or ("",)
        log(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=round(1000 * seconds, 2),
            client=client[0],
        )


class _Told:
    """Around the application: counts, writes a line, and lets no connection outlive a drain."""

    def __init__(self, app: ASGIApp, service: Service, known: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.draining:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            log("a request failed", level=logging.ERROR, error=error)
        finally:
            route = scope["path"] if scope["path"] in self._known else "other"
            self._service.told(scope, route, status or 499, time.perf_counter() - started)


def _json(
    content: Mapping[str, Any], status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type=protocol.JSON)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _json({"error": str(error)}, error.status, _BUSY.get(error.status))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = error.status_code == HTTPStatus.NOT_FOUND
    what = f"there is no {printable(request.url.path)}: /docs lists what there is" if missing else error.detail
    return _json({"error": what}, error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    """What went wrong is for the log alone."""
    return _json({"error": "internal error"}, HTTPStatus.INTERNAL_SERVER_ERROR)


async def _gone(request: Request, error: Exception) -> Response:
    """The client is gone; nobody reads this."""
    return _json({"error": "the client closed the connection"}, 499)
