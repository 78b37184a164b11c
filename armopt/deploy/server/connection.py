"""One connection: HTTP by httptools, with limits of size and time, to the end of what can be answered."""

from __future__ import annotations

import asyncio
import fcntl
import math
import re
import sys
import termios
from http import HTTPStatus

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from armopt.deploy.server.settings import Settings

#: Bytes of a request that are not its body: the head, what is behind the last chunk.
_MOST_AROUND = 64 << 10
#: How many such bytes each byte of a body may bring: the shortest chunk has five.
_AROUND = 5
#: How often it is seen whether a client reads, while it has the time that a client may read nothing.
_LOOKS = 10
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class _Connection(HttpToolsProtocol):
    """uvicorn's, with limits.

    Attributes:
        seconds: For a request to come in, and in which a client must take something of its answer.
    """

    seconds: float
    _timer: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _in_head = True
    _around = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._around += len(data)
        super().data_received(_without_upgrade(data) if self._in_head else data)
        if self._around > _MOST_AROUND and not self.transport.is_closing():
            self.send_400_response("")

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that sends no more may still read: the connection stays open until all is answered."""
        return self._ends_behind_answers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._around = True, 0
        self._arm()

    def on_headers_complete(self) -> None:
        self._in_head = False
        head = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        self._around = max(self._around, head)
        if self._around > _MOST_AROUND:
            raise ValueError("too large")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._around = max(0, self._around - (1 + _AROUND) * len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._around = True, 0
        self._disarm()

    def send_400_response(self, msg: str) -> None:
        """Behind the answers to what came before, nothing is said of what can't be read."""
        if self._ends_behind_answers():
            self.transport.pause_reading()
        elif self._around > _MOST_AROUND:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {_MOST_AROUND} bytes of head")
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._taking is not None:
            self._taking.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._taking is not None:
            self._taking.cancel()
        self._look(math.inf, 0)

    def _ends_behind_answers(self) -> bool:
        """Whether the last request came whole and has no answer yet; if so, the connection ends behind that."""
        last = self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False
        return True

    def _refuse(self, status: HTTPStatus, what: str) -> None:
        content = orjson.dumps({"error": what})
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + content)
        self.transport.close()

    def _look(self, before: float, still: int) -> None:
        """An answer that its client doesn't read stays in memory, and closing would wait for it."""
        left = _untaken(self.transport)
        still = still + 1 if left >= before else 0
        self._taking = None
        if still == _LOOKS:
            self.transport.abort()
        elif left:
            self._taking = self.loop.call_later(self.seconds / _LOOKS, self._look, left, still)

    def _arm(self) -> None:
        self._disarm()
        # a body that is late is answered before that, where its head came
        self._timer = self.loop.call_later(self.seconds + 1, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self.transport.close()


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """The class of a server's connections."""

    class Limited(_Connection):
        seconds = settings.request_seconds

    return Limited


def _without_upgrade(data: bytes) -> bytes:
    """A head without the wish for another protocol, which a server may pass over; httptools passes over the body."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + data[len(head) :] if _UPGRADE.search(head) else data


def _untaken(connection: asyncio.Transport) -> int:
    """Bytes of answers that a client hasn't taken, where some of them are still this process's; 0 else."""
    ours = connection.get_write_buffer_size()
    if not ours:
        return 0
    sent = fcntl.ioctl(connection.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return ours + int.from_bytes(sent, sys.byteorder)
