"""oneDNN's verbose log: which implementation really ran, on which data types, in which layouts.

The probe, ``armopt doctor`` and the tests on the emulated cores all judge by it. Format: oneDNN's developer
guide, "Verbose mode"; read here are v1 of oneDNN 3.x and the older lines without a version.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType

from armopt.errors import HostError
from armopt.ir.onednn_names import is_reference

_PREFIX = re.compile(r"(?:onednn|dnnl|mkldnn)_verbose,")
_ENGINES = ("cpu", "gpu")
_DTYPE = re.compile(r"(?:undef|boolean|[fsue]\d+|bf16|f8_e\dm\d|f4_e\dm\d)$")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One memory descriptor: its data type (``f32``, ``bf16``…) and layout tag (``acdb``, ``BA4b4a``…)."""

    dtype: str
    layout: str = ""


@dataclass(frozen=True, slots=True)
class Execution:
    """One primitive that ran.

    Attributes:
        primitive: ``matmul``, ``convolution``, ``inner_product``, ``reorder``…
        implementation: Its name in oneDNN, e.g. ``gemm:acl``, ``jit_dw:sve_256``, ``ref:any``; others elsewhere.
        prop_kind: ``forward_inference``… or ``undef``.
        tensors: By role: ``src``, ``wei``, ``bia``, ``dst``, ``data``…
        attributes: Without the prefix ``attr-``: ``fpmath``, ``post-ops``, ``scratchpad``…
        auxiliary: The algorithm, mostly: ``alg:convolution_direct``.
        problem: Shapes as oneDNN writes them: ``32x64:64x64``, ``mb1_ic16oc32_ih8…``.
    """

    primitive: str
    implementation: str
    prop_kind: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    auxiliary: str = ""
    problem: str = ""

    @property
    def is_reference(self) -> bool:
        """Whether a reference kernel ran (``ref:any``, ``gemm:ref``): correct, and far too slow to deploy."""
        return is_reference(self.implementation)

    @property
    def weight_dtype(self) -> str:
        """Data type of the weights as the kernel read them; empty where it has none."""
        wei = self.tensors.get("wei")
        return wei.dtype if wei else ""

    def reorders(self, shapes: Collection[tuple[int, ...]]) -> bool:
        """Whether this is a reorder of a tensor with one of `shapes`: PyTorch's shapes of the weights.

        oneDNN splits the groups off (``4x8x4x3x3`` for 32x4x3x3), a matmul sees a Linear's weight transposed,
        and a Linear run as a convolution has ones at the end: all that is undone before comparing.
        """
        if self.primitive != "reorder" or not re.fullmatch(r"\d{1,18}(x\d{1,18})*", self.problem):
            return False
        dims = tuple(int(d) for d in self.problem.split("x"))
        found = {_squeeze(dims)}
        if len(dims) > 2:
            found.add(_squeeze((dims[0] * dims[1], *dims[2:])))
        else:
            found.add(_squeeze(dims[::-1]))
        return any(_squeeze(shape) in found for shape in shapes)


@dataclass(frozen=True, slots=True)
class Header:
    """What oneDNN says of itself once per process, before its first line; empty where it said nothing.

    Attributes:
        onednn_version: E.g. ``3.7.1``.
        commit: Of oneDNN.
        runtime: Threading runtime of the CPU engine, e.g. ``OpenMP``.
        threads: Number of threads at that time; 0 where unknown.
        isa: The instruction set that oneDNN dispatches to, e.g. ``AArch64 SVE (256 bits)``.
    """

    onednn_version: str = ""
    commit: str = ""
    runtime: str = ""
    threads: int = 0
    isa: str = ""


@dataclass(slots=True)
class Log:
    """A parsed log: :func:`parse` returns it whole, :func:`capture_verbose` fills it when its block ends."""

    header: Header = field(default_factory=Header)
    executions: tuple[Execution, ...] = ()
    text: str = ""


def parse(text: str) -> Log:
    """Reads all that oneDNN wrote into `text`, whatever else stands there; lines cut short are left out."""
    header: dict[str, str] = {}
    executions: list[Execution] = []
    for line in text.splitlines():
        if not (start := _PREFIX.search(line)):
            continue
        # Nested creation is logged as well; other components (graph, ukernel) have "exec" lines of their own.
        fields = line[start.end() :].split(",")
        if "exec" in fields[:4]:
            at = fields.index("exec")
            component = fields[at - 1] if at else ""
            execution = None if component in ("graph", "ukernel") else _execution(fields[at + 1 :])
            if execution:
                executions.append(execution)
        elif "info" in fields[:3]:
            header = _info(line) | header
    threads = header.get("threads", "")
    return Log(
        Header(
            onednn_version=header.get("version", ""),
            commit=header.get("commit", ""),
            runtime=header.get("runtime", ""),
            threads=int(threads) if threads else 0,
            isa=header.get("isa", ""),
        ),
        tuple(executions),
        text,
    )


def references(executions: Iterable[Execution]) -> tuple[Execution, ...]:
    """Those of `executions` that ran a reference kernel."""
    return tuple(e for e in executions if e.is_reference)


def weight_reorders(executions: Iterable[Execution], shapes: Collection[tuple[int, ...]]) -> tuple[Execution, ...]:
    """The reorders of a weight with one of `shapes`: from the second call on there should be none."""
    return tuple(e for e in executions if e.reorders(shapes))


_lock = threading.Lock()


@contextmanager
def capture_verbose() -> Iterator[Log]:
    """Switches oneDNN's log on for the block and collects it; whatever else is printed still goes to stdout.

    oneDNN writes to the C library's stdout, hence descriptor 1 of the whole process is redirected meanwhile:
    one block at a time (other threads wait; it doesn't nest), and all text comes out when the block ends.

    Yields:
        A log whose `executions` are there once the block has ended, also where it ended by an exception.

    Raises:
        HostError: This torch has no oneDNN, or refuses to switch its log on.
    """
    import torch

    set_verbose = getattr(getattr(torch._C, "_verbose", None), "mkldnn_set_verbose", None)
    if set_verbose is None or not getattr(torch._C, "_has_mkldnn", False):
        raise HostError("this torch has no oneDNN", hint="Install a CPU wheel of torch from PyPI")
    # oneDNN has no getter for the level, so what the user asked for at the start is what is restored.
    level = _user_level()
    log = Log()
    with _lock:
        restore = _redirect()
        try:
            if not set_verbose(1):
                raise HostError("oneDNN refuses to log", hint="Unset ONEDNN_VERBOSE and try again")
            yield log
        finally:
            set_verbose(level)
            text = restore(bool(level))
            parsed = parse(text)
            log.header, log.executions, log.text = parsed.header, parsed.executions, text


def _redirect() -> _Restore:
    _flush()
    try:
        stdout = os.dup(1)
    except OSError:  # a daemon may have closed it; the next descriptor opened would become number 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stdout = os.dup(1)
    fd = _scratch()
    os.dup2(fd, 1)
    return _Restore(stdout, fd)


@dataclass(frozen=True, slots=True)
class _Restore:
    """Undoes a redirection: returns what was written meanwhile, passing on what is not oneDNN's."""

    stdout: int
    scratch: int

    def __call__(self, keep_log: bool) -> str:
        _flush()
        os.dup2(self.stdout, 1)
        os.close(self.stdout)
        os.lseek(self.scratch, 0, os.SEEK_SET)
        with os.fdopen(self.scratch, "rb") as stream:
            content = stream.read()
        lines = content.splitlines(keepends=True)
        _write(b"".join(line for line in lines if keep_log or not line.startswith(b"onednn_verbose,")))
        return content.decode(errors="replace")


def _scratch() -> int:
    # In memory: it has to work where no folder can be written.
    if hasattr(os, "memfd_create"):
        return os.memfd_create("armopt-onednn-log")
    with tempfile.TemporaryFile() as stream:
        return os.dup(stream.fileno())


def _write(content: bytes) -> None:
    with suppress(OSError):  # a closed pipe is the caller's affair, at its own next print
        while content:
            content = content[os.write(1, content) :]


def _flush() -> None:
    with suppress(Exception):  # sys.stdout may be closed, or anything at all
        sys.stdout.flush()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)


def _user_level() -> int:
    value = os.environ.get("ONEDNN_VERBOSE") or os.environ.get("DNNL_VERBOSE") or "0"
    return int(value) if value in ("0", "1", "2") else 1


def _info(line: str) -> dict[str, str]:
    patterns = {
        "version": r"oneDNN v(\d[\w.\-]*)",
        "commit": r"\(commit (\w+)\)",
        "runtime": r",cpu,runtime:(\w+)",
        "threads": r",nthr:(\d{1,9})(?!\d)",
        "isa": r",cpu,isa:(.+)",
    }
    return {name: m[1].strip() for name, p in patterns.items() if (m := re.search(p, line, re.ASCII))}


def _execution(fields: list[str]) -> Execution | None:
    # engine, primitive, implementation, prop_kind, memory descriptors, attributes, auxiliary, problem[, time]
    if len(fields) < 8 or not fields[0].startswith(_ENGINES):
        return None
    _, primitive, implementation, prop_kind, memory, attributes, auxiliary, problem, *_ = fields
    return Execution(
        primitive=primitive,
        implementation=implementation,
        prop_kind=prop_kind,
        tensors=MappingProxyType(dict(t for token in memory.split() if (t := _tensor(token)))),
        attributes=MappingProxyType(dict(_attribute(token) for token in attributes.split())),
        auxiliary=auxiliary,
        problem=problem,
    )


def _tensor(token: str) -> tuple[str, Tensor] | None:
    # Role, type, properties, kind, tag: `wei:bf16:a:blocked:BA4b4a::f0`; in oneDNN 2 `wei_bf16:a:blocked:…`.
    role, *rest = token.split(":")
    if not (rest and _DTYPE.match(rest[0])):
        role, _, dtype = role.rpartition("_")
        rest = [dtype, *rest]
    if not role or not _DTYPE.match(rest[0]):
        return None
    return role, Tensor(rest[0], rest[3] if len(rest) > 3 else "")


def _attribute(token: str) -> tuple[str, str]:
    name, _, value = token.removeprefix("attr-").partition(":")
    return name, value


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in shape if d != 1)
