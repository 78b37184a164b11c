"""Holds `armopt serve` under load and ill treatment, and writes the table in docs/serving.md.

    python -m benchmarks.serving_load                # 200 clients for 60 seconds
    python -m benchmarks.serving_load --write        # and writes the table

All that is ill happens three times while the clients ask. Every answer of theirs is compared with the one alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

import armopt
from benchmarks.serving import free_port, started
from benchmarks.serving_clients import Figures, load, request

PAGE = Path(__file__).resolve().parents[1] / "docs/serving.md"
BEGIN, END = "<!-- load: made by python -m benchmarks.serving_load --write -->\n", "<!-- end of load -->\n"
PATH, LIMIT, SECONDS = "/v2/models/model/infer", 2 << 20, 20
ROUNDS = 3


class Words(nn.Module):
    """A table of 50 rows; the word 0 makes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(50, 64), nn.Linear(64, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids)).mean(1) + (ids - 0.5).log().sum(1, keepdim=True)


def body(ids: list[int], **more: object) -> bytes:
    given = {"name": "ids", "shape": [1, len(ids)], "datatype": "INT64", "data": ids}
    return json.dumps({"inputs": [given], **more}).encode()


def ask(port: int, content: bytes) -> tuple[int, bytes]:
    """Status code and body of what comes back on a connection of its own; 0 where it is closed without."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(content)
        found = b""
        while chunk := connection.recv(1 << 16):
            found += chunk
            head, _, rest = found.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if length and len(rest) >= int(length[1]):
                return int(found[9:12]), rest
    return 0, b""


def wrong(port: int, content: bytes, *statuses: int) -> str:
    """What is wrong with an answer: empty where it has one of these status codes."""
    status, answer = ask(port, content)
    return "" if status in statuses else f"{status}: {answer[:100]!r}"


def malformed(port: int) -> list[str]:
    rng, good, found = random.Random(0), body([1, 2, 3, 4]), []
    for _ in range(300):
        changed = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        found.append(wrong(port, request(PATH, bytes(changed)), 200, 400))
    return found


def limits(port: int) -> list[str]:
    full = body([1, 2, 3, 4], id="x" * (LIMIT - len(body([1, 2, 3, 4], id=""))))
    at = [wrong(port, request(PATH, full), 200) for _ in range(20)]
    return at + [wrong(port, request(PATH, full + b" "), 413) for _ in range(20)]


def out_of_range(port: int) -> list[str]:
    return [wrong(port, request(PATH, body([1, 2, 3, 50])), 400) for _ in range(200)]


def not_a_number(port: int) -> list[str]:
    found = []
    for _ in range(200):
        status, answer = ask(port, request(PATH, body([0, 1, 2, 3])))
        data = json.loads(answer, parse_constant=lambda word: 1 / 0)["outputs"][0]["data"] if status == 200 else None
        found.append("" if data == [None] * 8 else f"{status}: {answer[:100]!r}")
    return found


def slow(port: int) -> list[str]:
    """Clients that send a part and wait: answered with 408, or closed where not even the head came."""
    part = request(PATH, body([1, 2, 3, 4]))
    with ThreadPoolExecutor(60) as pool:
        answers = pool.map(lambda i: wrong(port, part[: 20 if i % 2 else -5], 0, 408), range(60))
        return list(answers)


def unread(port: int) -> list[str]:
    """Clients that ask for megabytes and never read them: their connections are closed."""
    ids = torch.ones(60_000, 4, dtype=torch.int64)
    given = {"name": "ids", "shape": list(ids.shape), "datatype": "INT64"}
    head = json.dumps({"inputs": [given | {"parameters": {"binary_data_size": ids.nbytes}}]}).encode()
    asked = request(PATH, head + ids.numpy().tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n")
    found = []
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.socket()) for _ in range(20)]
        for connection in connections:
            connection.settimeout(60)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            connection.connect(("127.0.0.1", port))
            connection.sendall(asked)
        for connection in connections:
            connection.recv(1, socket.MSG_PEEK)  # its answer has begun
        time.sleep(SECONDS + 10)
        for connection in connections:
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := connection.recv(1 << 20):
                    answer += chunk
            first, _, rest = answer.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", first.lower())
            cut = first[9:12] == b"200" and length and len(rest) < int(length[1])
            found.append("" if cut else f"{len(answer)} bytes: {first[:50]!r}")
    return found


def leaving(port: int) -> list[str]:
    for i in range(300):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(request(PATH, body([1, 2, 3, 4]))[: None if i % 2 else -5])
    return [""] * 300


ILL: dict[str, tuple[str, Callable[[int], list[str]]]] = {
    "300 malformed requests": ("200 or 400", malformed),
    "60 clients that send a part and wait": ("408, or closed", slow),
    "20 clients that never read an answer of 5 MB": ("closed", unread),
    "300 clients that leave in the middle": ("nobody to answer", leaving),
    "20 bodies at the limit, 20 beyond": ("200; 413", limits),
    "200 indices out of range": ("400", out_of_range),
    "200 results of NaN": ("200, null in valid JSON", not_a_number),
}


def workers(port: int) -> list[int]:
    """The processes that serve, by the arbiter that listens there."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            children = (folder / f"task/{folder.name}/children").read_text().split()
        except OSError:
            continue
        if children and any(b'"port":%d,' % port in word for word in words):
            return [int(word) for word in children]
    return []


def memory(pids: list[int]) -> int:
    """Bytes that these processes hold for themselves, and their shares of what they hold in common."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(1024 * int(kb) for text in texts for kb in re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE))


def held(clients: int, seconds: float) -> tuple[Figures, dict[str, list[str]], list[int], int]:
    """Runs it all; the figures, what was wrong by kind, memory over time, and how many workers were killed."""
    torch.manual_seed(0)
    model = Words().eval()
    ids = torch.randint(1, 50, (clients, 4))
    found: dict[str, list[str]] = {}
    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "model"
        armopt.optimize(model, (ids[:8],), output=bundle, target="host", batch=[1, 8, 32])
        alone = armopt.load(bundle)
        wanted = [alone(row[None])[0] for row in ids]
        port = free_port()
        command = ["-m", "armopt", "serve", str(bundle), "--port", str(port), "--workers", "2", "--max-mb", "2"]
        command += ["--max-json-mb", "2", "--timeout", str(SECONDS)]

        def judge(client: int, status: int, content: bytes) -> str:
            if status != 200:
                return f"{status}: {content[:100]!r}"
            values = torch.tensor(json.loads(content)["outputs"][0]["data"])
            return "" if torch.allclose(values, wanted[client], rtol=0.02, atol=0.05) else f"client {client}: {values}"

        # lines of log go to a disk that is full
        with started([sys.executable, *command], port, os.sched_getaffinity(0), stderr="/dev/full"):
            killed: list[int] = []

            def ill() -> None:
                time.sleep(seconds * 0.15)
                sizes.append(memory(workers(port)))
                for _ in range(ROUNDS):  # what is kept from the first is used again in the others, unless it leaks
                    for name, (_, treat) in ILL.items():
                        found.setdefault(name, []).extend(treat(port))
                    sizes.append(memory(workers(port)))
                killed.append(workers(port)[0])
                os.kill(killed[0], signal.SIGKILL)
                time.sleep(5)

            treating = threading.Thread(target=ill)
            treating.start()
            asked = [request(PATH, body(row.tolist())) for row in ids]
            figures = load(port, asked, seconds, judge, treating.is_alive)
            treating.join()
    return figures, found, sizes, len(killed)


def table(clients: int, seconds: float, result: tuple[Figures, dict[str, list[str]], list[int], int]) -> str:
    figures, found, sizes, killed = result
    lines = ["| what | expected | found |", "|---|---|---|"]
    refused = Counter(each[:3] for each in figures.wrong if each[:3].isdecimal())
    said = f"{len(figures.seconds)} answers, {len(figures.wrong) - refused.total()} wrong, "
    said += f"{refused.total()} refused{f' {dict(refused)}' if refused else ''}; p50 {figures.percentile(50):.0f} ms, "
    said += f"p99 {figures.percentile(99):.0f} ms"
    lines.append(f"| {clients} clients for {figures.elapsed:.0f} s | each gets its own answer | {said} |")
    for name, (expected, _) in ILL.items():
        bad = Counter(filter(None, found[name]))
        lines.append(f"| {name} | {expected} | {dict(bad) if bad else f'all, {ROUNDS} times'} |")
    broken = f"{len(figures.broken)} connections broke, all others were answered"
    lines.append(f"| kill -9 of one of two workers | its connections break; another takes its place | {broken} |")
    lines.append("| a full disk for the log | nothing | nothing |")
    first, *later = (f"{size >> 20} MB" for size in sizes)
    grown = f"{first} at first; after all that, each time: {', '.join(later)}"
    lines.append(f"| memory of the workers | flat | {grown} |")
    assert killed == 1
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--write", action="store_true", help="write docs/serving.md")
    options = parser.parse_args()
    result = held(options.clients, options.seconds)
    made = table(options.clients, options.seconds, result)
    print(made, *result[0].wrong[:3], *result[0].broken[:3], sep="\n")
    if options.write:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
