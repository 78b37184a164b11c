"""`armopt serve` as it is deployed: processes, limits, signals, exchange of the bundle, Triton's client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from armopt.bundle import files
from tests.serving import Rows, Running, made, served

pytestmark = pytest.mark.slow
#: Of the large model's linear: enough megabytes to be seen in a process.
WIDTH = 1 << 20


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of one model with other weights."""
    folder, found = tmp_path_factory.mktemp("served"), []
    for seed, name in enumerate(("rows", "other")):
        torch.manual_seed(seed)
        found.append(made(Rows(), torch.rand(4, 8), folder / name))
    return found


@pytest.fixture(scope="module")
def server(bundles: list[Path]) -> Iterator[Running]:
    options = ("--workers", "2", "--max-mb", "1", "--timeout", "1.5", "--max-connections", "40")
    with served(bundles[0], *options) as server:
        yield server
    assert server.process.returncode == 0


def test_tritons_client(server: Running) -> None:
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("rows")
    assert not client.is_model_ready("other")
    described = client.get_model_metadata("rows")
    assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}]
    assert client.is_model_ready("rows", described["versions"][0])
    x = np.random.default_rng(0).random((3, 8), dtype=np.float32)
    for binary_in in (True, False):
        for binary_out in (True, False):
            given = triton.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x, binary_data=binary_in)
            names = ["sum", "positive", "half"] if binary_out else ["sum", "positive"]  # it reads BF16 as binary alone
            wanted = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in names]
            found = client.infer("rows", [given], outputs=wanted, request_id="7")
            assert found.get_response()["id"] == "7"
            np.testing.assert_allclose(found.as_numpy("sum"), x.sum(1), rtol=1e-6)
            assert found.as_numpy("positive").all()
            if binary_out:
                np.testing.assert_allclose(found.as_numpy("half"), x, rtol=0.01)
    given = triton.InferInput("x", [1, 8], "FP64")
    given.set_data_from_numpy(np.zeros((1, 8)))
    with pytest.raises(InferenceServerException, match="expected float32, found float64"):
        client.infer("rows", [given])
    client.close()


def raw(port: int, content: bytes, seconds: float = 10) -> bytes:
    """What comes back for these bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(content)
        found = b""
        while chunk := connection.recv(1 << 16):
            found += chunk
        return found


def answered(connection: socket.socket) -> bytes:
    """One answer on a connection that stays open."""
    found = b""
    while chunk := connection.recv(1 << 16):
        found += chunk
        head, end, rest = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if end and length and len(rest) >= int(length[1]):
            break
    return found


def test_requests_that_are_none(server: Running) -> None:
    line = b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\n"
    both = line + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    twice = line + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde"
    for content in (both, twice, b"x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", line + b"Content-Length: -1\r\n\r\n"):
        found = raw(server.port, content)
        assert found.startswith(b"HTTP/1.1 400 "), content
        assert found.count(b"HTTP/1.1 ") == 1


LINE = b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\n"
GOOD = json.dumps({"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}]}).encode()


def test_what_is_around_a_body_has_a_limit_too(server: Running) -> None:
    """Of the head, of its parts, and behind the last chunk; a body in the smallest chunks is none of it."""
    large, chunked = b"a" * (1 << 20), LINE + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    last = b"%x\r\n%s\r\n0\r\n" % (len(GOOD), GOOD)
    for content in (
        LINE + b"X: " + large,
        LINE + b"X: " + large[: 70 << 10] + b"\r\n\r\n",
        LINE + b"".join(b"x%d: 1\r\n" % i for i in range(20_000)) + b"\r\n",
        b"GET /" + large + b" HTTP/1.1\r\n\r\n",
        chunked + last + b"X: " + large,
        chunked + last[:-3] + b"0;" + large,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(content)
            assert connection.recv(1 << 10).startswith(b"HTTP/1.1 431 "), content[:100]
    single = b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD[:-1] + b" " * 20_000 + b"}")
    found = raw(server.port, chunked + single + b"0\r\nX: y\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_sends_no_more_is_answered(server: Running) -> None:
    ask = LINE + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    for content, answers in ((ask, 1), (3 * ask, 3), (ask[:-1], 0), (b"", 0)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while chunk := connection.recv(1 << 16):
                found += chunk
        assert found.count(b"HTTP/1.1 200 ") == answers
        assert found.count(b"HTTP/1.1 ") == answers


def test_what_can_not_be_read_does_not_take_the_answers_before_it(server: Running) -> None:
    ask = LINE + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    found = raw(server.port, 2 * ask + b"what is this?\r\n\r\n")
    assert found.count(b"HTTP/1.1 200 ") == found.count(b"HTTP/1.1 ") == 2


def test_a_client_that_would_rather_speak_http_2(server: Running) -> None:
    """As Java's and curl's do: the server passes over the wish, and not over the body."""
    head = LINE + b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    ask = head + b"Content-Length: %d\r\n\r\n" % len(GOOD)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(ask)
            connection.sendall(GOOD)
            assert answered(connection).startswith(b"HTTP/1.1 200 ")


def test_bodies_beyond_the_limit_and_clients_that_are_slow(server: Running) -> None:
    status, found = server.ask("POST", "/v2/models/rows/infer", b"x" * (1 << 21))
    assert (status, found["error"]) == (413, "more than 1048576 bytes")
    line = b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\n"
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        silent, head, body = pool.map(
            lambda content: raw(server.port, content), (b"", line, line + b"Content-Length: 100\r\n\r\nabc")
        )
    assert (silent, head) == (b"", b"")
    assert body.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start < 8
    assert server.infer([[0.5] * 8])[0] == 200


def large(rows: int = 20_000) -> bytes:
    """A request below the limit, whose answer is several megabytes of JSON."""
    given = {"name": "x", "shape": [rows, 8], "datatype": "FP32", "parameters": {"binary_data_size": 32 * rows}}
    head = json.dumps({"inputs": [given]}).encode()
    line = b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n" % len(head)
    body = head + np.random.default_rng(0).random((rows, 8), dtype=np.float32).tobytes()
    return line + b"Content-Length: %d\r\n\r\n" % len(body) + body


def taken(connection: socket.socket, found: bytes = b"") -> tuple[int, int]:
    """Bytes of an answer that came before its end or the connection's, and how many there should have been."""
    rest, length = b"", -1
    with contextlib.suppress(ConnectionResetError):
        while len(rest) != length and (chunk := connection.recv(1 << 20)):
            found += chunk
            head, _, rest = found.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head.lower())[1])  # type: ignore[index]
    assert found.startswith(b"HTTP/1.1 200 ")
    return len(rest), length


def test_an_answer_that_the_client_does_not_read_is_dropped(server: Running) -> None:
    """After --timeout: neither memory nor a connection waits for it, also where it is the connection's last.

    A client that reads slowly, but reads, gets all of it.
    """
    ask = large()
    with contextlib.ExitStack() as stack:
        reads, slow, late, last = (stack.enter_context(socket.socket()) for _ in range(4))
        for connection, more in ((reads, b""), (slow, b""), (late, b""), (last, b"Connection: close\r\n")):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            connection.connect(("127.0.0.1", server.port))
            connection.settimeout(20)
            connection.sendall(ask.replace(b"Host: x\r\n", b"Host: x\r\n" + more))
            if connection is reads:
                whole, length = taken(reads)
        assert whole == length > 5 << 20
        begun = b""
        for _ in range(10):
            time.sleep(0.5)
            begun += slow.recv(1 << 17)
        assert taken(slow, begun) == (length, length)
        for connection in (late, last):
            part, same = taken(connection)
            assert part < same == length
    assert server.infer([[0.5] * 8])[0] == 200


def test_connections_beyond_the_limit(server: Running) -> None:
    given = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}
    body = json.dumps({"inputs": [given]}).encode()
    ask = b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    open_ones = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    try:
        for connection in open_ones:
            connection.sendall(ask)
        statuses = {answered(connection)[9:12] for connection in open_ones}
        assert server.ask("GET", "/v2/health/live")[0] == 200  # it still lives
    finally:
        for connection in open_ones:
            connection.close()
    assert statuses == {b"200", b"503"}
    server.wait_until_ready()


def test_connections_are_shared_out_among_workers(server: Running) -> None:
    def sockets(pid: int) -> int:
        return sum("socket" in os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir())

    before: dict[int, int] = {}
    until = time.monotonic() + 10
    while before != (now := {pid: sockets(pid) for pid in server.workers()}) and time.monotonic() < until:
        before = now
        time.sleep(0.3)  # clients of the tests before this one have left, and workers may still have to notice
    open_ones = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
    for connection in open_ones:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert {answered(connection)[9:12] for connection in open_ones} == {b"200"}
    more = [sockets(pid) - before[pid] for pid in before]
    for connection in open_ones:
        connection.close()
    assert sum(more) == 40
    assert min(more) >= 8, more


def test_three_hundred_broken_requests_and_clients_that_leave(server: Running) -> None:
    rng = random.Random(0)
    given = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}
    good = json.dumps({"inputs": [given]}).encode()
    before = server.workers()
    for _ in range(300):
        changed = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        head = f"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(changed)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(head + changed)
            if rng.random() < 0.5:
                assert answered(connection)[9:12] in (b"200", b"400")
    assert server.workers() == before
    assert server.infer([[0.5] * 8])[0] == 200


def test_metrics_add_up_over_workers(server: Running) -> None:
    def total() -> float:
        text = server.ask("GET", "/metrics")[1]["text"].decode()
        return sum(float(line.split()[-1]) for line in re.findall(r"^armopt_batch_rows_sum.*$", text, re.MULTILINE))

    before = total()
    for _ in range(20):
        assert server.infer([[0.5] * 8] * 3)[0] == 200
    assert total() == before + 60


def test_workers_are_pinned_to_cores_of_their_own(server: Running) -> None:
    cores = [os.sched_getaffinity(pid) for pid in server.workers()]
    if len(os.sched_getaffinity(0)) >= 2:
        assert not cores[0] & cores[1]


def wrong_answers(server: Running, until: threading.Event, known: dict[str, float], x: list[float]) -> list[Any]:
    """What a client with one connection, which it opens again when it is told to, gets that is not an answer."""
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": x}]}).encode()
    wrong: list[Any] = []
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    while not until.is_set():
        try:
            connection.request("POST", "/v2/models/rows/infer", body)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:  # the latter where half of an answer came
            wrong.append(error)
            connection.close()
            continue
        answer = json.loads(content)
        first = next((each["data"][0] for each in answer.get("outputs", ()) if each["name"] == "log"), None)
        if response.status != 200 or abs(first - known[answer["model_version"]]) > 0.02:
            wrong.append((response.status, answer))
    connection.close()
    return wrong


def test_another_bundle_is_taken_without_a_lost_request(bundles: list[Path], tmp_path: Path) -> None:
    import armopt

    place = tmp_path / "rows"
    shutil.copytree(bundles[0], place)
    x = [0.5] * 8
    known = {}
    for bundle in bundles:
        result = armopt.load(bundle)(torch.tensor([x]))
        known[files.read_manifest(bundle).digest[:12]] = float(result["log"][0, 0])
    first, second = known
    assert abs(known[first] - known[second]) > 0.05
    with served(place, "--workers", "2", "--drain", "8") as server, ThreadPoolExecutor(8) as pool:
        done = threading.Event()
        clients = [pool.submit(wrong_answers, server, done, known, x) for _ in range(8)]
        try:
            assert server.infer([x])[1]["model_version"] == first
            shutil.copytree(bundles[1], tmp_path / "next")
            place.rename(tmp_path / "old")
            (tmp_path / "next").rename(place)
            before = server.workers()
            server.process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 40
            while time.monotonic() < until and set(server.workers()) & set(before):
                time.sleep(0.1)
            assert not set(server.workers()) & set(before)
            assert server.infer([x])[1]["model_version"] == second
            # one that is damaged is not taken
            (place / "weights.safetensors").write_bytes(b"x")
            server.process.send_signal(signal.SIGHUP)
            until = time.monotonic() + 40
            while time.monotonic() < until and not server.said("not reloaded, the old bundle stays"):
                time.sleep(0.1)
            time.sleep(0.5)
            assert server.infer([x])[1]["model_version"] == second
        finally:
            done.set()
        assert [wrong for client in clients for wrong in client.result()] == []
        assert server.said("not reloaded, the old bundle stays.*changed or damaged")


def test_a_worker_that_dies_under_load_is_started_again_and_costs_its_connections_alone(bundles: list[Path]) -> None:
    import armopt

    x = [0.5] * 8
    known = {
        files.read_manifest(bundles[0]).digest[:12]: float(armopt.load(bundles[0])(torch.tensor([x]))["log"][0, 0])
    }
    with served(bundles[0], "--workers", "2") as server, ThreadPoolExecutor(8) as pool:
        done = threading.Event()
        clients = [pool.submit(wrong_answers, server, done, known, x) for _ in range(8)]
        try:
            time.sleep(1)
            before = server.workers()
            os.kill(before[0], signal.SIGKILL)
            until = time.monotonic() + 20
            while time.monotonic() < until and len(set(server.workers()) - set(before)) < 1:
                time.sleep(0.05)
            time.sleep(1)
        finally:
            done.set()
        wrong = [each for client in clients for each in client.result()]
        assert len(server.workers()) == 2
    # no answer is wrong; each connection breaks once at most
    assert [each for each in wrong if not isinstance(each, Exception)] == []
    assert 1 <= len(wrong) <= 8, wrong


def test_workers_end_where_nobody_is_left_to_end_them(bundles: list[Path]) -> None:
    with served(bundles[0], "--workers", "2", "--drain", "2") as server:
        workers = server.workers()
        server.process.kill()
        until = time.monotonic() + 15
        while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in workers):
            time.sleep(0.1)
        left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []


def test_a_worker_that_is_just_starting_ends_too(bundles: list[Path]) -> None:
    with served(bundles[0], "--drain", "2") as server:
        (first,) = server.workers()
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 15
        while time.monotonic() < until and not (new := set(server.workers()) - {first}):
            time.sleep(0.001)
        (worker,) = new
        os.kill(worker, signal.SIGSTOP)  # before it could ask who forked it
        server.process.kill()
        server.process.wait()
        os.kill(worker, signal.SIGCONT)
        while time.monotonic() < until and Path(f"/proc/{worker}").exists():
            time.sleep(0.1)
        is_left = Path(f"/proc/{worker}").exists()
        if is_left:
            os.kill(worker, signal.SIGKILL)
    assert not is_left


def test_connections_that_the_system_has_taken_are_answered_before_the_end(bundles: list[Path]) -> None:
    """A worker that is stopped for a moment has not accepted them when SIGTERM comes."""
    ask = LINE + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    with served(bundles[0], "--drain", "5") as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        open_ones = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(100)]
        for connection in open_ones:
            connection.sendall(ask)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # so that it looks whether it should end as soon as it goes on
        os.kill(worker, signal.SIGCONT)
        statuses = [answered(connection)[9:12] for connection in open_ones]
        for connection in open_ones:
            connection.close()
    assert statuses == [b"200"] * 100


def test_sigterm_ends_it_while_clients_are_connected(bundles: list[Path]) -> None:
    with served(bundles[0], "--drain", "5") as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        idle[0].sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(idle[0]).startswith(b"HTTP/1.1 200 ")
        idle[1].sendall(b"POST /v2/models/rows/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        # whoever comes now on an open connection is still answered, and told that it is the last answer
        idle[0].sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        last = answered(idle[0])
        assert last.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in last
        assert server.process.wait(15) == 0
        assert time.monotonic() - start < 8
        for connection in idle:
            connection.close()


def reloaded(server: Running) -> int:
    """Bytes of the process that loads, after it has loaded once more."""
    before, loads = set(server.workers()), len(server.said("^loaded "))
    server.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + 40
    while time.monotonic() < until and (len(server.said("^loaded ")) == loads or set(server.workers()) & before):
        time.sleep(0.1)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.full
def test_workers_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = made(Rows(WIDTH), torch.rand(4, 8), tmp_path / "large", target="host")
    size = (bundle / "weights.safetensors").stat().st_size
    assert size > 16 << 20
    # two threads each: a pool of OpenMP threads in the process that forks would keep its children waiting for ever
    with served(bundle, "--workers", "2", "--threads", "2") as server:
        for _ in range(4):
            assert server.infer([[0.5] * 8])[0] == 200
        private = []
        for pid in server.workers():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            private.append(sum(1024 * int(kb) for kb in re.findall(r"Private_\w+:\s+(\d+) kB", text)))
        held = Path(f"/proc/{server.workers()[0]}/smaps").read_text()
        # what is exchanged goes
        sizes = [reloaded(server) for _ in range(3)]
        assert sizes[2] - sizes[0] < size, sizes
    # the largest mapping of weights is in both, and private to none
    regions = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", held)[1:]
    figures = [{name: int(kb) for name, kb in re.findall(r"(\w+):\s+(\d+) kB", region)} for region in regions]
    shared = max(each.get("Shared_Dirty", 0) + each.get("Shared_Clean", 0) for each in figures)
    assert shared * 1024 > 8 << 20, shared
    print(f"weights {size >> 20} MB, private {[each >> 20 for each in private]} MB")


@pytest.mark.full
def test_a_full_disk_for_the_log_stops_nothing(bundles: list[Path]) -> None:
    """Lines go to /dev/full, which takes none."""
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "armopt", "serve", str(bundles[0]), "--port", str(port)]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, stderr=full)
    server = Running(process, port, "rows")
    try:
        server.wait_until_ready()
        assert [server.infer([[0.5] * 8])[0] for _ in range(50)] == [200] * 50
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_every_line_of_the_log_is_json(server: Running) -> None:
    lines = len(server.lines)
    raw(server.port, b"x\r\n\r\n")
    until = time.monotonic() + 10
    while len(server.lines) == lines and time.monotonic() < until:
        time.sleep(0.05)
    assert server.said("^Invalid HTTP request")
    assert [line for line in server.lines if "time" not in line] == []


def test_a_log_that_nobody_reads_does_not_keep_it_from_ending(bundles: list[Path]) -> None:
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "armopt", "serve", str(bundles[0]), "--port", str(port), "--drain", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)  # of 64 KB, which nobody reads
    server = Running(process, port, "rows")  # type: ignore[arg-type]
    try:
        server.wait_until_ready()
        assert {server.ask("GET", "/")[0] for _ in range(600)} == {404}  # short lines leave no room for another
        time.sleep(0.5)
        process.terminate()
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.stderr.close()  # type: ignore[union-attr]


def test_what_can_not_be_served(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "armopt", "serve", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no such bundle" in done.stderr
