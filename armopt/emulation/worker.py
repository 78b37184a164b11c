"""A long-lived process on an emulated core, from which jobs are forked: importing PyTorch there costs 25 s."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NoReturn

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
_START_SECONDS = 300
_STARTED, _JOB = b"started", b"j"


class EmulatedError(ArmoptError):
    """A job failed on the emulated core. ``stdout`` and ``stderr`` are what it had written until then."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "", stdout: str = "", stderr: str = "") -> None:
        super().__init__(what, where=where, hint=hint)
        self.stdout = stdout
        self.stderr = stderr

    def __str__(self) -> str:
        """Its own lines and those of the core, whose last words may be several."""
        return f"{self.where}: {self.what}" + (f". {self.hint}" if self.hint else "")


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


@dataclass(frozen=True)
class _Ended:
    """The job's process ended without a reply, perhaps because it took too long."""

    code: int
    timed_out: bool = False


class EmulatedWorker:
    """A process on an emulated core that has imported PyTorch; each call runs a function in a fork of it.

    It starts with the first call. Jobs see nothing of each other, may run at the same time, called from several
    threads, and a crash or a time-out costs that job only.

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
        self._control: socket.socket | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        self._lock = threading.Lock()
        self._jobs: set[int] = set()

    def __enter__(self) -> EmulatedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, job: str | Callable[..., Any], *, timeout: float = 600.0, **arguments: Any) -> EmulatedResult:
        """Runs a function there and returns what it returned and wrote.

        Args:
            job: ``"tests.arm64.jobs:function"``, or a function of a module that can be imported there.
            timeout: Seconds until the job is killed, with all that it started.
            arguments: Its keyword arguments; they and the result are pickled (paths for anything large).

        Raises:
            EmulatedError: It raised (the message has its traceback), crashed, or took too long.
            HostError: The folder is not prepared.
        """
        name = job if isinstance(job, str) else f"{job.__module__}:{job.__qualname__}"
        request = _Request(name, pickle.dumps(arguments))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            reply = self._run(request, timeout, out, err)
            stdout, stderr = _text(out), _text(err)
        if isinstance(reply, _Reply) and not reply.failure:
            return EmulatedResult(pickle.loads(reply.value), stdout, stderr)
        failure, hint = "", ""
        if isinstance(reply, _Reply):
            failure = reply.failure.rstrip()
        elif reply.timed_out:
            failure = f"took longer than {timeout:g} s on the emulated {self.cpu} and was killed"
            hint = "Give it smaller sizes or a longer timeout: FP32 runs at about 250 M multiply-adds/s"
        else:
            failure = "\n".join([f"the emulated {self.cpu} {_ending(reply.code)}", *stderr.splitlines()[-20:]])
        raise EmulatedError(failure, where=name, hint=hint, stdout=stdout, stderr=stderr)

    def close(self) -> None:
        """Ends the process and its jobs, if there are any."""
        for pid in list(self._jobs):
            _kill(pid)
        if self._control:
            self._control.close()  # the process ends when this does
            self._control = None
        if self._process:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                _kill(self._process.pid)
                self._process.wait()
            self._process = None

    def _run(self, request: _Request, timeout: float, out: IO[bytes], err: IO[bytes]) -> _Reply | _Ended:
        """What a fork of the process answers, or how it ended; all it writes goes to `out` and `err`."""
        ours, theirs = socket.socketpair()
        with Connection(ours.detach()) as channel, theirs:
            with self._lock:
                socket.send_fds(self._running(), [_JOB], [theirs.fileno(), out.fileno(), err.fileno()])
            theirs.close()
            pid = 0
            try:
                pid = channel.recv()
                self._jobs.add(pid)
                channel.send(request)
                late = not channel.poll(timeout)
                if late:
                    _kill(pid)
                reply: _Reply | _Ended = channel.recv()
            except (EOFError, ConnectionError):
                raise self._lost(request.job) from None
            finally:
                self._jobs.discard(pid)
        return replace(reply, timed_out=late) if isinstance(reply, _Ended) else reply

    def _running(self) -> socket.socket:
        """The socket on which the process takes jobs."""
        if self._control and self._process and self._process.poll() is None:
            return self._control
        self.close()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_TUNING_PREFIXES)}
        self._control, theirs = socket.socketpair()
        with theirs:
            serve = f"from armopt.emulation import worker; worker.serve({theirs.fileno()}, {self._preload!r})"
            command, env = emulated_command(
                self.cpu,
                ["python", "-c", serve],
                torch_version=self.torch_version,
                env={**inherited, **self.env},
                folder=self._folder,
            )
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=_CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # so that all it started can be killed with it
            )
        self._control.settimeout(_START_SECONDS)
        what = f"import {self._preload}"
        try:
            started = self._control.recv(len(_STARTED))
        except TimeoutError:
            _kill(self._process.pid)
            raise EmulatedError(f"took longer than {_START_SECONDS} s on the emulated {self.cpu}", where=what) from None
        if started != _STARTED:
            raise self._lost(what)
        self._control.settimeout(None)
        return self._control

    def _lost(self, job: str) -> EmulatedError:
        """The process itself is gone: says how, with the last lines it wrote."""
        assert self._process
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            _kill(self._process.pid)
            code = -signal.SIGKILL
        said = _text(self._said)
        what = "\n".join([f"the emulated {self.cpu} {_ending(code)}", *said.splitlines()[-20:]])
        return EmulatedError(what, where=job, stderr=said)


def _text(file: IO[bytes]) -> str:
    """All that was written; pread, because processes share the file's position."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


# --- the emulated side ----------------------------------------------------------------------------


def serve(descriptor: int, preload: str) -> None:
    """Forks a process for each job until the socket closes. This is what the emulated process executes."""
    gc.disable()
    importlib.import_module(preload)
    gc.freeze()  # no job looks for cycles in what was imported, nor copies the pages that it shares
    gc.enable()
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)  # a program that a job starts must not hold it open
    control.sendall(_STARTED)
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, len(_JOB), 3)
        if not asked:
            os._exit(0)  # PyTorch's own end takes seconds under emulation, and there is nothing left to save
        if os.fork() == 0:
            control.close()
            _watch(*descriptors)
        for each in descriptors:
            os.close(each)
        with contextlib.suppress(ChildProcessError):  # of those before, so that none stays a zombie
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(descriptor: int, out: int, err: int) -> NoReturn:
    """Forks the job's own process, and says how it ended where it can't say so itself."""
    channel: Connection[Any, Any] = Connection(descriptor)
    os.set_inheritable(descriptor, False)
    pid = os.fork()
    if pid == 0:
        os.setsid()  # so that all it starts can be killed with it
        # Nothing in Python's sys.stdout is replaced: oneDNN writes its log with C's printf.
        os.dup2(out, 1)
        os.dup2(err, 2)
        channel.send(os.getpid())
        channel.send(_answer(channel.recv()))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        channel.send(_Ended(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _answer(request: _Request) -> _Reply:
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
