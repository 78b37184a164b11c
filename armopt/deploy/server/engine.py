"""The one thread that runs the model, and the requests that wait for it: joined up to the next bucket, split again.

Each other thread would start a pool of OpenMP threads of its own. While the model is idle a request runs at once. While
it works, requests gather; those whose rows have one shape then run together, up to the largest bucket. Where they
don't fill the next bucket yet, the first of them waits for more, never longer than the bound since it came.

A model of one thread starts no pool. There the event loop itself runs a request that comes alone to an idle model, if
such runs are short: the way to the other thread and back may take longer than they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from typing import Any

import torch

from armopt.deploy.server.protocol import RefusedError
from armopt.deploy.server.served import Served
from armopt.errors import InputError, first_line

Outputs = dict[str, torch.Tensor]
#: Seconds of work for which the event loop may stand still: as long as Python lets one thread hold up another.
_SHORT = 0.005


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits: checked inputs, their values, their rows, what must be equal to be joined, who waits."""

    tensors: Sequence[torch.Tensor]
    values: int
    rows: int
    key: tuple[Any, ...]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Outputs]
    came: float = field(default_factory=time.monotonic)


class Engine:
    """Runs a served bundle on its own thread.

    Args:
        served: The bundle.
        most_waiting: How many requests may wait.
        wait_seconds: How long the first of those that wait may wait for others.
        threads: Of the model; 0 leaves PyTorch's number.
        ran: Told after each run: its requests, rows and seconds.
    """

    def __init__(
        self,
        served: Served,
        *,
        most_waiting: int,
        wait_seconds: float,
        threads: int = 0,
        ran: Callable[[int, int, float], None] = lambda requests, rows, seconds: None,
    ) -> None:
        self._served = served
        self._most_waiting = most_waiting
        self._wait = wait_seconds
        self._threads = threads or torch.get_num_threads()
        torch.set_num_threads(1)  # of the event loop, which then starts no pool
        self._ran = ran
        self._waiting: deque[_Waiting] = deque()
        self._probing: asyncio.Future[str] | None = None
        self._to_probe: asyncio.Future[str] | None = None
        self._changed = threading.Condition()
        self._works = False
        self._called = False
        self._took: dict[int, float] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="armopt-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    async def run(self, tensors: Sequence[torch.Tensor], seconds: float) -> Outputs:
        """The outputs of one request, whatever it runs together with.

        Raises:
            RefusedError: The inputs don't fit (400), too many requests wait (429), or time is up (504).
        """
        served = self._served
        try:
            tensors = served.model.check_inputs(tensors)
        except InputError as error:
            raise RefusedError(str(error)) from None
        if len(self._waiting) >= self._most_waiting:
            raise RefusedError(f"{self._most_waiting} requests wait already: try again", HTTPStatus.TOO_MANY_REQUESTS)
        joins = served.most_rows > 1
        rows = tensors[0].shape[0] if joins else 1
        key = tuple(tensor.shape[1:] for tensor in tensors) if joins and rows else ()
        loop = asyncio.get_running_loop()
        values = sum(tensor.numel() for tensor in tensors)
        waiting = _Waiting(tensors, values, rows, key, loop, loop.create_future())
        with self._changed:
            self._waiting.append(waiting)
            if self._threads != 1:
                self._changed.notify()
            elif not self._called:  # when all that came at once wait too
                self._called = True
                loop.call_soon(self._here)
        try:
            async with asyncio.timeout(seconds):
                return await waiting.future
        except TimeoutError:
            raise RefusedError(f"no answer within {seconds:g} seconds", HTTPStatus.GATEWAY_TIMEOUT) from None
        finally:
            if not waiting.future.done() or waiting.future.cancelled():  # whoever waited is gone
                with self._changed, contextlib.suppress(ValueError):
                    self._waiting.remove(waiting)

    async def probe(self, seconds: float) -> str:
        """Why the kernels can't be trusted now; empty where they can."""
        if self._probing is None or self._probing.done():
            with self._changed:
                self._probing = self._to_probe = asyncio.get_running_loop().create_future()
                self._changed.notify()
        try:
            return await asyncio.wait_for(asyncio.shield(self._probing), seconds)
        except TimeoutError:
            return f"the model is busy since {seconds:g} seconds"

    def stop(self, seconds: float) -> bool:
        """Ends the thread; whether it did so in time."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _here(self) -> None:
        """On the event loop: runs the one request that waits, if that is short. All else is for the other thread."""
        self._called = False
        with self._changed:
            alone = len(self._waiting) == 1 and not (self._works or self._to_probe)
            if not alone or self._took.get(_size(self._waiting), inf) > _SHORT:
                self._changed.notify()
                return
            group = self._take()
        _deliver(group, self._results(group))

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        busy = False
        while not self._stopped:
            with self._changed:
                if not (self._waiting or self._to_probe or self._stopped):
                    busy = self._works = False
                    self._changed.wait()
                self._works = True
                probe, self._to_probe = self._to_probe, None
                if busy and probe is None:
                    self._gather()
                group = self._take()
            if probe is not None:
                self._answer_probe(probe)
            if group:
                self._answer(group)
                busy = True
            del group  # idle, the thread holds nobody's tensors

    def _gather(self) -> None:
        """Waits until the next bucket is full, but not longer than the bound."""
        while self._waiting and not self._stopped:
            first = self._waiting[0]
            left = first.came + self._wait - time.monotonic()
            rows = sum(each.rows for each in self._waiting if each.key == first.key)
            wanted = next((size for size in self._served.buckets if size >= rows), self._served.most_rows)
            if left <= 0 or rows >= wanted:
                return
            self._changed.wait(left)

    def _take(self) -> list[_Waiting]:
        """The first that waits and those that can join it, in order."""
        group: list[_Waiting] = []
        left: deque[_Waiting] = deque()
        rows = 0
        for each in self._waiting:
            if not group or (each.key and each.key == group[0].key and rows + each.rows <= self._served.most_rows):
                group.append(each)
                rows += each.rows
            else:
                left.append(each)
        self._waiting = left
        return group

    def _answer(self, group: Sequence[_Waiting]) -> None:
        results = self._results(group)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            group[0].loop.call_soon_threadsafe(_deliver, group, results)

    def _results(self, group: Sequence[_Waiting]) -> list[Outputs | Exception]:
        """What each of the group gets; what went wrong where it gets nothing."""
        start, own = time.perf_counter(), time.thread_time()
        try:
            results: list[Outputs | Exception] = list(self._run_joined(group))
            self._took[_size(group)] = time.thread_time() - own
        except Exception as error:  # the thread outlives any request
            if len(group) > 1:  # one of them may be at fault: the others are answered
                return [self._results([each])[0] for each in group]
            results = [error]
        self._ran(len(group), sum(each.rows for each in group), time.perf_counter() - start)
        return results

    def _run_joined(self, group: Sequence[_Waiting]) -> list[Outputs]:
        run = self._served.run
        if len(group) == 1:
            return [run(group[0].tensors)]
        outputs = run([torch.cat(parts) for parts in zip(*(each.tensors for each in group), strict=True)])
        rows = [each.rows for each in group]
        # refuses another number of rows
        split = {name: torch.split_with_sizes(value, rows) for name, value in outputs.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(group))]

    def _answer_probe(self, probe: asyncio.Future[str]) -> None:
        try:
            found = self._served.probe()
        except Exception as error:
            found = f"the probe fails: {first_line(error)}"
        with contextlib.suppress(RuntimeError):
            probe.get_loop().call_soon_threadsafe(probe.set_result, found)


def _size(group: Iterable[_Waiting]) -> int:
    """What has the same one takes about as long: the power of two of all values that go in."""
    return sum(each.values for each in group).bit_length()


def _deliver(group: Sequence[_Waiting], results: Sequence[Outputs | Exception]) -> None:
    for each, result in zip(group, results, strict=True):
        if each.future.done():
            continue
        if isinstance(result, InputError):
            each.future.set_exception(RefusedError(str(result)))
        elif isinstance(result, Exception):
            each.future.set_exception(result)
        else:
            each.future.set_result(result)
