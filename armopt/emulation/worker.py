"""A long-lived process on an emulated core, to which tests send work: importing PyTorch there costs 20 s."""

from __future__ import annotations

import ctypes
import importlib
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from armopt.emulation.folder import DEFAULT_TORCH, PreparedFolder
from armopt.emulation.runner import emulated_command
from armopt.errors import ArmoptError, InputError

# Settings that change which kernel runs: a worker has those it was given, never those of the shell that
# runs the tests.
_TUNING_PREFIXES = (
    "DNNL_",
    "ONEDNN_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "TORCH_",
    "OPENBLAS_",
    "NVPL_",
    "LRU_CACHE_",
    "THP_MEM_",
    "ATEN_",
    "LD_PRELOAD",
)
_CHECKOUT = Path(__file__).resolve().parents[2]
_STARTED = b"started"


class EmulatedError(ArmoptError):
    """A job failed on the emulated core. ``stdout`` and ``stderr`` are what it had written until then."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "", stdout: str = "", stderr: str = "") -> None:
        super().__init__(what, where=where, hint=hint)
        self.stdout = stdout
        self.stderr = stderr


@dataclass(frozen=True)
class EmulatedResult:
    """What a job returned, and what it (C libraries included) wrote to file descriptors 1 and 2."""

    value: Any
    stdout: str
    stderr: str


@dataclass(frozen=True)
class _Request:
    job: str
    arguments: bytes  # pickled apart, so that a bad argument fails the job and not the protocol


@dataclass(frozen=True)
class _Reply:
    value: bytes
    failure: str


class _Output:
    """A file that is the process's file descriptor 1 or 2, so that what it wrote outlives even its crash.

    Nothing in Python's sys.stdout is replaced: oneDNN writes its log with C's printf.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        self._start = 0

    def mark(self) -> None:
        """Forgets what was written until now."""
        self._start = os.fstat(self.file.fileno()).st_size

    def read(self) -> str:
        """Returns what was written since the mark; pread, because the process shares the file's position."""
        size = os.fstat(self.file.fileno()).st_size - self._start
        return os.pread(self.file.fileno(), size, self._start).decode(errors="replace")


class EmulatedWorker:
    """A process on an emulated core that has imported PyTorch and runs functions sent to it, one by one.

    It starts with the first call. A crash or a time-out costs that call only: the next one starts it anew.

    Args:
        cpu: A core by QEMU's name (``neoverse-v1``).
        torch_version: The aarch64 PyTorch it imports.
        env: Settings such as DNNL_DEFAULT_FPMATH_MODE. The rest of the environment is this process's, without
            its own settings of that kind.
        folder: The prepared folder; the user's by default.
        preload: The module imported before the first job.
    """

    def __init__(
        self,
        cpu: str,
        torch_version: str = DEFAULT_TORCH,
        env: Mapping[str, str] | None = None,
        *,
        folder: PreparedFolder | None = None,
        preload: str = "torch",
    ) -> None:
        self.cpu = cpu
        self.torch_version = torch_version
        self.env = dict(env or {})
        self._folder = folder
        self._preload = preload
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection[bytes, bytes] | None = None
        self._stdout, self._stderr = _Output(), _Output()

    def __enter__(self) -> EmulatedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, job: str | Callable[..., Any], *, timeout: float = 600.0, **arguments: Any) -> EmulatedResult:
        """Runs a function there and returns what it returned and wrote.

        Args:
            job: ``"tests.arm64.jobs:function"``, or a function of a module that can be imported there.
            timeout: Seconds until the worker is killed.
            arguments: Its keyword arguments; they and the result are pickled (paths for anything large).

        Raises:
            EmulatedError: It raised (the message has its traceback), crashed, or took too long.
            HostError: The folder is not prepared.
        """
        name = job if isinstance(job, str) else f"{job.__module__}:{job.__qualname__}"
        request = pickle.dumps(_Request(name, pickle.dumps(arguments)))
        channel = self._running()
        self._mark()
        try:
            channel.send_bytes(request)
            reply = pickle.loads(self._receive(channel, timeout, name))
        except (EOFError, OSError):
            raise self._lost(name) from None
        assert isinstance(reply, _Reply)
        if reply.failure:
            raise self._error(reply.failure.rstrip(), name)
        return EmulatedResult(pickle.loads(reply.value), self._stdout.read(), self._stderr.read())

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._channel:
            self._channel.close()  # it ends when its channel does
            self._channel = None
        if self._process:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._kill()
            self._process = None

    def _running(self) -> Connection[bytes, bytes]:
        if self._channel and self._process and self._process.poll() is None:
            return self._channel
        self.close()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_TUNING_PREFIXES)}
        ours, theirs = socket.socketpair()
        with theirs:
            serve = f"from armopt.emulation import worker; worker.serve({theirs.fileno()}, {self._preload!r})"
            command, env = emulated_command(
                self.cpu,
                ["python", "-c", serve],
                torch_version=self.torch_version,
                env={**inherited, **self.env},
                folder=self._folder,
            )
            self._mark()
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=_CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=self._stdout.file,
                stderr=self._stderr.file,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that all it started can be killed with it
            )
        self._channel = Connection(ours.detach())
        try:
            assert self._receive(self._channel, 300, f"import {self._preload}") == _STARTED
        except (EOFError, OSError):
            raise self._lost(f"import {self._preload}") from None
        return self._channel

    def _receive(self, channel: Connection[bytes, bytes], timeout: float, job: str) -> bytes:
        if channel.poll(timeout):
            return channel.recv_bytes()
        self._kill()
        raise self._error(
            f"took longer than {timeout:g} s on the emulated {self.cpu} and was killed",
            job,
            hint="Give it smaller sizes or a longer timeout: FP32 runs at about 250 M multiply-adds/s",
        )

    def _lost(self, job: str) -> EmulatedError:
        """The process is gone: says how, with the last lines it wrote."""
        assert self._process
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
            code = -signal.SIGKILL
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        tail = "\n".join(self._stderr.read().splitlines()[-20:])
        return self._error(f"the emulated {self.cpu} {ended}\n{tail}".rstrip(), job)

    def _error(self, what: str, job: str, hint: str = "") -> EmulatedError:
        return EmulatedError(what, where=job, hint=hint, stdout=self._stdout.read(), stderr=self._stderr.read())

    def _mark(self) -> None:
        for output in (self._stdout, self._stderr):
            output.mark()

    def _kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


# --- the emulated side ----------------------------------------------------------------------------


def serve(descriptor: int, preload: str) -> None:
    """Runs jobs until the channel closes. This is what the emulated process executes."""
    importlib.import_module(preload)
    channel: Connection[bytes, bytes] = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # a program that a job starts must not hold the channel open
    channel.send_bytes(_STARTED)
    while True:
        try:
            request = pickle.loads(channel.recv_bytes())
        except EOFError:
            os._exit(0)  # PyTorch's own end takes seconds under emulation, and there is nothing left to save
        channel.send_bytes(pickle.dumps(_run(request)))


def _run(request: _Request) -> _Reply:
    value, failure = b"", ""
    try:
        arguments = pickle.loads(request.arguments)
        value = pickle.dumps(_resolve(request.job)(**arguments))
    except (Exception, SystemExit):
        failure = traceback.format_exc()
    # Before the reply, so that the caller finds all that was written: Python's buffers, then C's.
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    return _Reply(value, failure)


def _resolve(job: str) -> Callable[..., Any]:
    module, _, name = job.partition(":")
    if not name:
        raise InputError(f"{job!r} is not of the form module:function")
    function = operator.attrgetter(name)(importlib.import_module(module))
    if not callable(function):
        raise InputError(f"{job!r} is not a function")
    return function  # type: ignore[no-any-return]
