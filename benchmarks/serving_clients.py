"""Clients that each keep one connection open and ask again as soon as they are answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Figures:
    """What clients saw: seconds of each answer, answers that were wrong, connections that broke."""

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    elapsed: float = 0

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.elapsed

    def percentile(self, percent: int) -> float:
        """Milliseconds."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[percent - 1]


def request(path: str, body: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


#: Told the client, the status code and the body; says what is wrong, empty where nothing is.
Judge = Callable[[int, int, bytes], str]


def load(
    port: int, requests: list[bytes], seconds: float, judge: Judge, more: Callable[[], bool] = lambda: False
) -> Figures:
    """Has one client for each of `requests`, all at once.

    Args:
        port: On this machine.
        requests: What each client sends, again and again.
        seconds: For how long, at least.
        judge: Judges each answer.
        more: Whether to go on for longer.
    """
    return asyncio.run(_load(port, requests, seconds, judge, more))


async def _load(port: int, requests: list[bytes], seconds: float, judge: Judge, more: Callable[[], bool]) -> Figures:
    figures, start = Figures(), time.perf_counter()

    def on() -> bool:
        return time.perf_counter() < start + seconds or more()

    await asyncio.gather(*(_client(i, port, each, on, judge, figures) for i, each in enumerate(requests)))
    figures.elapsed = time.perf_counter() - start
    return figures


async def _client(i: int, port: int, request: bytes, on: Callable[[], bool], judge: Judge, figures: Figures) -> None:
    while on():
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            last = False
            while not last and on():
                start = time.perf_counter()
                writer.write(request)
                status, body, last = await answer(reader)
                figures.seconds.append(time.perf_counter() - start)
                if wrong := judge(i, status, body):
                    figures.wrong.append(wrong)
        except (OSError, asyncio.IncompleteReadError) as error:
            figures.broken.append(repr(error))
            await asyncio.sleep(0.05)
        finally:
            if writer is not None:
                writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status code, body, and whether the connection ends behind it."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" in head
