"""The processes of a server: gunicorn's arbiter, which loads the bundle once, and uvicorn in each of its workers.

The arbiter loads on a thread that ends and forks afterwards, so all workers share one copy of the weights, also of the
packed ones. It starts workers again that die, and kills those that hang. SIGHUP loads the bundle again, which may be
another by then: new workers start with it, and the old ones end when they have answered. SIGTERM ends them all so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

import torch
import uvicorn
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker
from prometheus_client import multiprocess
from starlette.types import ASGIApp

from armopt import environment
from armopt.deploy.server.app import Service
from armopt.deploy.server.connection import protocol
from armopt.deploy.server.observe import LOGGER, ToStderr
from armopt.deploy.server.seats import Seats
from armopt.deploy.server.served import Served, prepare
from armopt.deploy.server.settings import Settings
from armopt.deploy.server.shared import scratch
from armopt.errors import ArmoptError
from armopt.runtime import forks

#: A worker whose event loop stands still for so long is killed.
_HANGS = 60
_KEEP_ALIVE = 15
_BACKLOG = 2048
#: Connections beyond the limit, so that a worker with many clients still tells that it lives.
_SPARE = 64


#: Seconds for which a worker leaves a connection to others that have fewer.
_LEFT = 0.003


def serve(settings: Settings) -> None:
    """Serves until SIGTERM; the process exits with it.

    Raises:
        ArmoptError: The bundle can't be loaded.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + _SPARE + 200  # and what else a worker has open
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard >= 0 else wanted, hard))
    Arbiter(_Server(settings)).run()


class _Server(BaseApplication):
    """What gunicorn asks for: the settings, and the application, loaded before workers are forked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cores = environment.cores_for_workers(settings.workers)
        self.seats = Seats(4 * settings.workers)  # of old and new workers, while a bundle is exchanged
        self.threads = settings.threads or environment.threads_for_host(settings.workers)
        super().__init__()

    def load_config(self) -> None:
        settings = self.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        chosen: dict[str, Any] = {
            "bind": f"{host}:{settings.port}",
            "workers": settings.workers,
            "worker_class": _Worker,
            "preload_app": True,
            "logger_class": _Logger,
            "loglevel": "info",
            "timeout": _HANGS,
            "graceful_timeout": max(1, round(settings.drain_seconds)),
            "backlog": _BACKLOG,
            "worker_tmp_dir": scratch(),
            "control_socket_disable": True,
            "when_ready": self._when_ready,
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
        }
        for name, value in chosen.items():
            if name in self.cfg.settings:  # older releases lack some
                self.cfg.set(name, value)

    def load(self) -> ASGIApp:
        """The application around the bundle, which is loaded and tried; its threads are each worker's own."""

        def work() -> Served:
            torch.set_num_threads(self.threads)
            return prepare(self.settings)

        served = forks.before_forks(work)
        _settle()
        for remark in served.remarks:
            _say(remark, logging.WARNING)
        _say(f"loaded {self.settings.bundle}, version {served.version}: {served.model!r}")
        self.service = Service(served, self.settings, threads=self.threads)
        return self.service.app

    def reload(self) -> None:
        """Loads the bundle again; one that can't be loaded leaves the old one in place."""
        try:
            self.callable = self.load()
        except (ArmoptError, RuntimeError, OSError) as error:
            _say(f"not reloaded, the old bundle stays: {error}", logging.ERROR)
        _settle()  # the old one goes: graphs are cycles

    def _when_ready(self, arbiter: Any) -> None:
        for listener in arbiter.LISTENERS:
            _say(f"serving {self.settings.model_name} on {listener}")

    def _pre_fork(self, arbiter: Any, worker: Any) -> None:
        """The cores that fewest workers sit on: while a bundle is exchanged there are twice as many."""
        taken = [getattr(other, "place", -1) for other in arbiter.WORKERS.values()]
        worker.place = min(range(self.settings.workers), key=taken.count)
        worker.seat = self.seats.take()

    def _post_fork(self, arbiter: Any, worker: Any) -> None:
        if self.cores:
            os.sched_setaffinity(0, self.cores[worker.place])

    def _child_exit(self, arbiter: Any, worker: Any) -> None:
        self.seats.leave(worker.seat)
        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def _settle() -> None:
    """Frees what nothing uses, and has later collections in workers touch no page that they share."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _say(event: str, level: int = logging.INFO) -> None:
    logging.getLogger("gunicorn.error").log(level, "%s", event)


class _Logger(Logger):
    """gunicorn's, which writes JSON lines too."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers = [ToStderr()]


class _Worker(Worker):
    """One process that serves: uvicorn with the limits of the settings."""

    app: _Server
    place: int
    seat: int

    def run(self) -> None:
        settings, service = self.app.settings, self.app.service
        config = uvicorn.Config(
            service.app,
            http=protocol(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.max_connections + _SPARE,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_notify=int(self.timeout),
            callback_notify=self._notify,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds * 0.6)),
        )
        server = _Uvicorn(config, service, self.app.seats, self.seat, self.ppid)
        try:
            server.run(sockets=self.sockets)
        finally:
            if server.started:
                # the model's thread may be in the middle of a run that nobody waits for
                logging.shutdown()
                os._exit(0)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def init_signals(self) -> None:
        """uvicorn sets those it needs."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGQUIT, lambda *_: os._exit(0))

    async def _notify(self) -> None:
        self.notify()


class _Uvicorn(uvicorn.Server):
    """uvicorn, which shares connections out among workers, and tells clients of open ones before it closes them."""

    def __init__(self, config: uvicorn.Config, service: Service, seats: Seats, seat: int, arbiter: int) -> None:
        super().__init__(config)
        self._service = service
        self._seats, self._seat = seats, seat
        self._arbiter = arbiter  # which may have ended before this worker could ask who forked it
        self._accepting: set[asyncio.Task[Any]] = set()
        service.connections = lambda: len(self.server_state.connections)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes one connection at a time, and leaves it to others for a moment where they have fewer."""
        await super().startup(sockets=[])
        for name in ("uvicorn", "asyncio"):  # their lines are lines of the same log
            logging.getLogger(name).handlers = logging.getLogger(LOGGER).handlers
            logging.getLogger(name).propagate = False
        self._listeners = sockets or []
        for listener in self._listeners:
            listener.setblocking(False)
            self._listen(listener)

    def _listen(self, listener: socket.socket, left: bool = False) -> None:
        if not self._service.draining:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, left)

    def _pause(self, listener: socket.socket, seconds: float, left: bool) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        loop.call_later(seconds, self._listen, listener, left)

    def _accept(self, listener: socket.socket, left: bool) -> None:
        """Takes a connection, unless it should be `left` to others and wasn't yet."""
        self._tell()
        if not left and self._seats.crowded(self._seat):
            self._pause(listener, _LEFT, left=True)
            return
        try:
            self._take(listener)
        except (BlockingIOError, ConnectionAbortedError):  # another worker took it, or the client is gone
            pass
        except OSError:  # too many open files
            self._pause(listener, 0.5, left=False)
            return
        else:
            self._tell()
        if left:
            self._listen(listener)

    def _take(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    def _tell(self) -> None:
        if not self._service.draining:
            self._seats.tell(self._seat, len(self._accepting) + len(self.server_state.connections))

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: connections also end, and so may the arbiter, with nobody left to end its workers."""
        self._tell()
        self.should_exit |= os.getppid() != self._arbiter
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new connections, and closes open ones behind their next answer, or when they were idle for long."""
        self._service.draining = True
        self._seats.leave(self._seat)
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            with contextlib.suppress(OSError):
                while True:  # those that the system has taken already would be reset
                    self._take(listener)
            listener.close()
        until = loop.time() + 0.2 * self._service.settings.drain_seconds
        while (self._accepting or self.server_state.connections) and loop.time() < until and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown()
