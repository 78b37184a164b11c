"""Runs the fuzzer: every input in a forked child that is bounded in time and memory and watched for what it touches.

``python -m tests.fuzz.run --count 100000`` spreads that many inputs over all readers, prints one line for each that
failed, keeps it in build/fuzz, and with ``--write`` puts its table into docs/security.md. An input is made of the seed,
its reader and its number alone: ``--reader bundle --only 17`` makes and reads that one again, in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from armopt.errors import ArmoptError
from benchmarks import process_time
from tests.fuzz import kills, mutations
from tests.fuzz.reader import Reader

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
KEPT = REPOSITORY / "build" / "fuzz"
PAGE = REPOSITORY / "docs" / "security.md"
BEGIN, END = "<!-- fuzz: make fuzz -->", "<!-- end of fuzz -->"
#: What may become of an input: the first two are as it should be.
OUTCOMES = ("read", "refused", "traceback", "crash", "hang", "allocation", "touched")
GOOD = ("read", "refused")
#: Of work, and of waiting for nothing, after which an input hangs.
SECONDS, WAITING = 20.0, 120.0
#: Bytes beyond what a child has when it begins: of address space, which is what a bundle may ask for, and of memory
#: that it may touch.
ADDRESS_SPACE, MEMORY = 1 << 30, 1 << 30
#: Inputs of one child; a leak of armopt's would show at its end, and a fork costs as much as an input.
BATCH = 50


def readers() -> dict[str, Reader]:
    """All readers, by name: those of every module here that has some."""
    found: dict[str, Reader] = {}
    for file in sorted(HERE.glob("*.py")):
        if file.stem not in ("run", "reader", "mutations", "kills") and not file.stem.startswith("test_"):
            found |= getattr(importlib.import_module(f"tests.fuzz.{file.stem}"), "READERS", {})
    return found


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that failed."""

    reader: str
    number: int
    outcome: str
    said: str


@dataclass(frozen=True, slots=True)
class Job:
    """One reader with its seeds, and which inputs are to be made of them."""

    reader: Reader
    seeds: Sequence[Path]
    seed: int

    def make(self, number: int, folder: Path) -> Path:
        """Makes an input, in a folder that is empty."""
        rng = random.Random(f"{self.seed} {self.reader.name} {number}")
        seed = rng.choice(self.seeds)
        path = folder / seed.name
        shutil.copytree(seed, path) if seed.is_dir() else shutil.copyfile(seed, path)
        if self.reader.mutate is None or rng.random() < 0.1:
            mutations.change_bytes(rng, path)
        else:
            with contextlib.suppress(RecursionError):  # of what nests deeply since the change before
                self.reader.mutate(rng, path)
        return path


class Watch:
    """Notes whatever a process opens to write, runs or connects to, outside of the folders that it may use."""

    _PATHS: Mapping[str, Sequence[int]] = {
        **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.chown"), (0,)),
        **dict.fromkeys(("os.rename", "os.link", "os.symlink"), (0, 1)),
    }
    _NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "socket.bind")

    def __init__(self) -> None:
        self.found: list[str] = []
        self.folder = ""
        self.seeds: tuple[str, ...] = ()
        self._read = tuple({os.path.realpath(each) for each in (sys.prefix, sys.base_prefix, REPOSITORY, *sys.path)})

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in self._NEVER:
            self.found.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, writes = self._real(args[0]), bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if path.startswith((self.folder, "/dev/null")):
                return
            if writes or not path.startswith(
                (*self._read, *self.seeds, "/proc/", "/sys/", "/dev/urandom", "/etc/", "/usr/", "/lib")
            ):
                self.found.append(f"open {path} {'to write' if writes else ''}")
        elif event in self._PATHS:
            for place in self._PATHS[event]:
                if not (path := self._real(args[place])).startswith(self.folder):
                    self.found.append(f"{event} {path}")

    @staticmethod
    def _real(path: Any) -> str:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return os.path.realpath(os.fsdecode(path))
        return str(path)


WATCH = Watch()


def outcome(job: Job, path: Path, folder: Path) -> tuple[str, str]:
    """What becomes of an input in this process, and what was said."""
    before = _memory()
    WATCH.found.clear()
    WATCH.folder = str(folder)
    WATCH.seeds = tuple(os.path.realpath(seed.parent) for seed in job.seeds)
    try:
        job.reader.read(path)
        found, said = "read", ""
    except ArmoptError as error:
        found, said = "refused", str(error)
    except MemoryError as error:
        found, said = "allocation", f"{error!r}\n{traceback.format_exc()}"
    except BaseException as error:
        found, said = "traceback", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        WATCH.folder = ""
    if WATCH.found:
        return "touched", "; ".join(WATCH.found)
    if (taken := _memory() - before) > MEMORY:
        return "allocation", f"{taken >> 20} MB\n{said}"
    return found, said


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _child(job: Job, numbers: Sequence[int], folder: Path, pipe: int) -> None:
    """Makes and reads inputs one by one, and says before and after each."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    os.environ.update(HOME=str(folder), ARMOPT_CACHE=str(folder / "cache"), TMPDIR=str(folder))
    tempfile.tempdir = str(folder)
    os.chdir(folder)
    sys.addaudithook(WATCH)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for number in numbers:
        place = Path(tempfile.mkdtemp(dir=folder))
        _say(pipe, number, "began", "")
        try:
            path = job.make(number, place)
        except Exception as error:
            _say(pipe, number, "traceback", f"in the fuzzer: {error!r}\n{traceback.format_exc()}")
            continue
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            result = outcome(job, path, folder)
        shutil.rmtree(place, ignore_errors=True)
        _say(pipe, number, *result)


def _say(pipe: int, number: int, what: str, said: str) -> None:
    shown = said if len(said) < 5000 else f"{said[:1000]}\n…\n{said[-4000:]}"
    data = json.dumps([number, what, shown]).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def run(job: Job, numbers: Sequence[int]) -> Iterator[tuple[int, str, str]]:
    """What became of each input."""
    left = list(numbers)
    while left:
        batch = left[:BATCH]
        with tempfile.TemporaryDirectory(prefix="armopt-fuzz-") as name:
            canary = Path(name) / "canary"
            canary.write_text("untouched")
            folder = Path(name) / "work"
            folder.mkdir()
            done = yield from _watched(job, batch, folder)
            if canary.read_text() != "untouched" or {*os.listdir(name)} != {"canary", "work"}:
                yield batch[max(done - 1, 0)], "touched", "what lies beside its folder"
        left = left[done:]


def _watched(job: Job, batch: Sequence[int], folder: Path) -> Iterator[tuple[int, str, str]]:
    """Runs a child; ends it where it takes too long. Returns how many inputs are done."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.close(reading)
            _child(job, batch, folder, writing)
            code = 0
        os._exit(code)
    os.close(writing)
    done, began, hung = 0, batch[0], False
    worked, heard = 0.0, time.monotonic()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while True:
            if not select.select([pipe], [], [], 1.0)[0]:
                if process_time.worked(child) - worked > SECONDS or time.monotonic() - heard > WAITING:
                    os.kill(child, signal.SIGKILL)
                    hung = True
                    break
                continue
            worked, heard = process_time.worked(child), time.monotonic()
            data = pipe.read(1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                number, what, said = json.loads(line)
                if what == "began":
                    began = number
                else:
                    done += 1
                    yield number, what, said
    _, status = os.waitpid(child, 0)
    if hung:
        yield began, "hang", f"more than {SECONDS:.0f} s of work, or {WAITING:.0f} s of none"
        return done + 1
    if status:
        yield began, "crash", f"{signal.Signals(status & 127).name if status & 127 else f'exit code {status >> 8}'}"
        return done + 1
    return done


def keep(job: Job, finding: Finding) -> Path:
    """Makes an input that failed once more, and keeps it with what was said."""
    folder = KEPT / f"{finding.outcome}-{finding.reader}-{job.seed}-{finding.number}".replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.suppress(Exception):  # then the fuzzer itself is at fault, and what was said says so
        job.make(finding.number, folder)
    (folder / "said.txt").write_text(finding.said, errors="backslashreplace")
    return folder


def fuzz(
    count: int, seed: int, names: Sequence[str] = (), log: Any = print
) -> tuple[dict[str, Counter[str]], list[Finding]]:
    """Spreads `count` inputs over readers: how many of each outcome, and those that failed."""
    torch.set_num_threads(1)
    chosen = {name: reader for name, reader in readers().items() if not names or name in names}
    table, findings = {}, []
    with tempfile.TemporaryDirectory(prefix="armopt-seeds-") as made:
        for i, (name, reader) in enumerate(chosen.items()):
            folder = Path(made) / name
            folder.mkdir()
            job = Job(reader, reader.seeds(folder), seed)
            began, counts = time.monotonic(), Counter[str]()
            share = count // len(chosen) + (i < count % len(chosen))
            for number, what, said in run(job, range(share)):
                counts[what] += 1
                if what not in GOOD:
                    findings.append(Finding(name, number, what, said))
                    first = said.strip().splitlines()[0] if said.strip() else ""
                    log(f"{name} {number}: {what}: {first[:200]}\n    kept in {keep(job, findings[-1])}")
            table[name] = counts
            log(f"{name}: {dict(counts)} in {time.monotonic() - began:.0f} s")
    return table, findings


def as_table(table: Mapping[str, Counter[str]], seed: int) -> str:
    """The table of a run, for docs/security.md."""
    total = Counter[str]()
    lines = [f"| reader | inputs | {' | '.join(OUTCOMES)} |", f"| --- |{' ---: |' * (1 + len(OUTCOMES))}"]
    for name, counts in table.items():
        total += counts
        lines.append(f"| {name} | {counts.total()} | {' | '.join(str(counts[each]) for each in OUTCOMES)} |")
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[each]) for each in OUTCOMES)} |")
    return "\n".join([*lines, "", f"Seed {seed}, torch {torch.__version__}."])


def write(text: str) -> None:
    """Puts a table between its markers."""
    page = PAGE.read_text()
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL))


def main() -> None:
    """Fuzzes; exit code 1 where an input failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[], help="one of them; repeatable")
    parser.add_argument("--only", type=int, help="one input, read in this process")
    parser.add_argument("--kill", type=int, default=0, help="how many runs of optimize to kill as well")
    parser.add_argument("--write", action="store_true", help="write the table into docs/security.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.only is not None:
        (name,) = asked.reader
        folder = Path(tempfile.mkdtemp(prefix="armopt-fuzz-"))
        (folder / "seeds").mkdir()
        (folder / "input").mkdir()
        reader = readers()[name]
        job = Job(reader, reader.seeds(folder / "seeds"), asked.seed)
        path = job.make(asked.only, folder / "input")
        print(path, flush=True)
        print(*outcome(job, path, folder), sep="\n")
        return
    table, findings = fuzz(asked.count, asked.seed, asked.reader, lambda line: print(line, flush=True))
    said = as_table(table, asked.seed)
    killed = Counter[str]()
    if asked.kill:
        with tempfile.TemporaryDirectory(prefix="armopt-kills-") as folder:
            killed = kills.kill(Path(folder), asked.kill, asked.seed)
        found = ", ".join(f"{what} {count}" for what, count in sorted(killed.items()))
        said += f"\n\n{asked.kill} runs of `optimize` killed at random moments, half with `--force`; found: {found}."
    print(said)
    if asked.write:
        write(said)
    sys.exit(bool(findings) or any(what.startswith("wrong") for what in killed))


if __name__ == "__main__":
    main()
