"""Compares servers of one model in one run on this machine, and writes the table in docs/serving.md.

    python -m benchmarks.serving             # prints the table
    python -m benchmarks.serving --write     # and writes it

All servers run at once, on cores of their own and apart from the clients'. They take turns, so that whatever else the
machine does hits them alike. A figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

import armopt
from benchmarks import serving_fastapi as eager
from benchmarks.serving_clients import Figures, load, request

PAGE = Path(__file__).resolve().parents[1] / "docs/serving.md"
BEGIN, END = "<!-- servers: made by python -m benchmarks.serving --write -->\n", "<!-- end of servers -->\n"
CLIENTS = (1, 16, 64)
ARMOPT, ALONE = "armopt serve", "armopt serve --no-batching"
#: What the ratios are of.
NAMES = {
    ARMOPT: "the bundle, batches",
    ALONE: "the bundle, one request at a time",
    "FastAPI": "eager PyTorch, one request in each thread",
    "LitServe": "eager PyTorch, batches",
}


def cores() -> tuple[set[int], set[int]]:
    """Those of the servers, and those of the clients."""
    every = sorted(os.sched_getaffinity(0))
    return set(every[: max(1, len(every) // 2)]), set(every[len(every) // 2 :] or every)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], port: int, on: set[int], stderr: str = os.devnull) -> Iterator[None]:
    """A server that runs, until it answers."""
    env = os.environ | {"OMP_NUM_THREADS": str(len(on))}
    with open(stderr, "w") as log:
        quiet = {"stdout": log, "stderr": log}
        process = subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, on), **quiet
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.returncode}")
            time.sleep(0.1)
        time.sleep(3)  # LitServe listens before its workers have loaded
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:  # LitServe leaves processes behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def judge(key: str, wanted: torch.Tensor) -> Callable[[int, int, bytes], str]:
    """Compares every answer with what eager PyTorch gives for that client's row."""

    def found(client: int, status: int, body: bytes) -> str:
        if status != 200:
            return f"{status}: {body[:200]!r}"
        answer = json.loads(body)
        values = answer["outputs"][0]["data"] if key == "outputs" else answer["output"][0]
        distance = float((torch.tensor(values) - wanted[client]).norm() / wanted[client].norm())
        return "" if distance < 0.05 else f"off by {distance:.3f}"

    return found


def measure(seconds: float, rounds: int) -> dict[tuple[str, int], list[Figures]]:
    own, others = cores()
    os.sched_setaffinity(0, others)
    torch.set_num_threads(1)
    model = eager.model()
    rows = torch.randn(max(CLIENTS), eager.INPUTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(rows)
    described = {"name": "input", "shape": [1, eager.INPUTS], "datatype": "FP32"}
    of_protocol = [json.dumps({"inputs": [described | {"data": row.tolist()}]}).encode() for row in rows]
    plain = [json.dumps({"x": [row.tolist()]}).encode() for row in rows]
    found: dict[tuple[str, int], list[Figures]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        bundle = Path(folder) / "model"
        armopt.optimize(model, (rows[:8],), output=bundle, target="host", batch=[1, 8, eager.MOST])
        ports = {name: free_port() for name in NAMES}
        serve = [sys.executable, "-m", "armopt", "serve", str(bundle), "--port"]
        commands = {
            ARMOPT: [*serve, str(ports[ARMOPT])],
            ALONE: [*serve, str(ports[ALONE]), "--no-batching"],
            "FastAPI": [sys.executable, "-m", "benchmarks.serving_fastapi", str(ports["FastAPI"])],
            "LitServe": [sys.executable, "-m", "benchmarks.serving_litserve", str(ports["LitServe"])],
        }
        for name, command in commands.items():
            running.enter_context(started(command, ports[name], own))
        for number in range(rounds + 1):
            for clients in CLIENTS:
                for name in NAMES:
                    v2 = name in (ARMOPT, ALONE)
                    path, bodies = ("/v2/models/model/infer", of_protocol) if v2 else ("/predict", plain)
                    asked = [request(path, each) for each in bodies[:clients]]
                    figures = load(ports[name], asked, seconds, judge("outputs" if v2 else "output", wanted))
                    if figures.wrong or figures.broken:
                        raise RuntimeError(f"{name}: {(figures.wrong or figures.broken)[0]}")
                    if number:  # the first round warms up
                        found.setdefault((name, clients), []).append(figures)
    return found


def table(found: dict[tuple[str, int], list[Figures]], busy: float) -> str:
    lines = [
        f"Load of the machine before: {busy:.1f}.",
        "",
        "| clients | server | requests a second | p50, ms | p99, ms | `armopt serve` to it |",
        "|---|---|---|---|---|---|",
    ]
    for clients in CLIENTS:
        for name, what in NAMES.items():
            each = found[name, clients]
            rate = statistics.median(figures.per_second for figures in each)
            p50, p99 = (statistics.median(figures.percentile(p) for figures in each) for p in (50, 99))
            ratio = statistics.median(
                ours.per_second / theirs.per_second for ours, theirs in zip(found[ARMOPT, clients], each, strict=True)
            )
            shown = "" if name == ARMOPT else f"{ratio:.2f} times the requests"
            lines.append(f"| {clients} | {name}: {what} | {rate:.0f} | {p50:.1f} | {p99:.1f} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write docs/serving.md")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    made = table(measure(options.seconds, options.rounds), busy)
    print(made)
    if options.write:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
