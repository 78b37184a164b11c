"""``armopt serve``: sets the environment of a bundle, then becomes its server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from armopt.cli import options
from armopt.cli.run import become
from armopt.deploy.server.settings import Settings

_default = Settings("")
_MB = 1 << 20


def serve(
    bundle: options.BundlePath,
    name: Annotated[
        str, typer.Option("--name", help="Of the model in URLs; by default the bundle's file name.", show_default=False)
    ] = "",
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = _default.host,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = _default.port,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the weights.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each worker; by default its share of the cores.")
    ] = None,
    max_mb: Annotated[
        int, typer.Option("--max-mb", min=1, help="Of one request; more is answered with 413.")
    ] = _default.max_bytes // _MB,
    max_json_mb: Annotated[
        int, typer.Option("--max-json-mb", min=1, help="Of the JSON in one request: reading it holds up all others.")
    ] = _default.max_json_bytes // _MB,
    max_connections: Annotated[
        int, typer.Option("--max-connections", min=1, help="Of one worker; more are answered with 503.")
    ] = _default.max_connections,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests of one worker that wait; more are answered with 429.")
    ] = _default.max_waiting,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.01, help="Seconds for a request to come (408) and be answered (504).")
    ] = _default.request_seconds,
    drain: Annotated[
        float, typer.Option("--drain", min=1, help="Seconds from SIGTERM to the end, at most.")
    ] = _default.drain_seconds,
    batching: Annotated[
        bool, typer.Option("--batching/--no-batching", help="Put requests that wait together, up to a planned batch.")
    ] = True,
    batch_wait: Annotated[
        float, typer.Option("--batch-wait", min=0, help="Milliseconds to wait for others, while the model is busy.")
    ] = _default.batch_wait_ms,
    any_kernel: Annotated[
        bool, typer.Option("--any-kernel", help="Be ready though layers run another kernel than planned.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Don't start where this host differs from the bundle's.")
    ] = False,
    tuning: Annotated[
        Path | None, typer.Option("--tuning", metavar="FILE", help="Times of armopt tune.", show_default=False)
    ] = None,
) -> None:
    """Serve a bundle by the Open Inference Protocol v2: batches, workers that share weights, metrics, reload."""
    import msgspec

    from armopt import environment
    from armopt.errors import InputError

    if not bundle.exists():
        raise InputError("there is no such bundle", where=str(bundle), hint="armopt optimize makes one")
    settings = Settings(
        bundle=str(bundle.absolute()),
        name=name,
        host=host,
        port=port,
        workers=workers,
        threads=threads or 0,
        max_bytes=max_mb * _MB,
        max_json_bytes=max_json_mb * _MB,
        max_connections=max_connections,
        max_waiting=max_waiting,
        request_seconds=timeout,
        drain_seconds=drain,
        batching=batching,
        batch_wait_ms=batch_wait,
        any_kernel=any_kernel,
        strict=strict,
        tuning=str(tuning.absolute()) if tuning else None,
    )
    limit = environment.threads_for_host(workers)
    command = [sys.executable, "-m", "armopt.deploy.server", msgspec.json.encode(settings).decode()]
    become(command, bundle, threads=threads, limit=limit)
