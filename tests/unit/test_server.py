"""The server in this process: the protocol, requests that are joined and split, limits, pages."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn

import armopt
from armopt.deploy.server import protocol
from armopt.deploy.server.app import Service
from armopt.deploy.server.engine import Engine
from armopt.deploy.server.observe import JsonLines
from armopt.deploy.server.protocol import HEADER_LENGTH, RefusedError
from armopt.deploy.server.served import Served, prepare
from armopt.deploy.server.settings import Settings
from armopt.environment.cores import cores_for_workers
from armopt.runtime import onednn_log
from tests.serving import Centred, Rows, Tokens, made

INFER = "/v2/models/rows/infer"


@pytest.fixture(scope="module")
def rows_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return made(Rows(), torch.rand(4, 8), tmp_path_factory.mktemp("bundles") / "rows")


@pytest.fixture(scope="module")
def rows(rows_bundle: Path) -> Served:
    return prepare(Settings(str(rows_bundle)))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=16)
    ids = torch.randint(0, 50, (4, 5))
    program = torch.export.export(Tokens().eval(), (ids,), dynamic_shapes=({0: batch, 1: length},))
    path = tmp_path_factory.mktemp("bundles") / "tokens"
    armopt.optimize(program, (ids,), output=path, checks=armopt.Checks(min_cosine=-1.0))
    return prepare(Settings(str(path)))


@pytest.fixture(scope="module")
def client(rows_bundle: Path, rows: Served) -> Iterator[TestClient]:
    settings = Settings(str(rows_bundle), max_bytes=100_000, max_json_bytes=20_000)
    with TestClient(Service(rows, settings).app, raise_server_exceptions=False) as client:
        yield client


# --- requests that are joined ---------------------------------------------------------------------


class Slow:
    """A served bundle whose runs take a while and are written down; a run of rows that hold 99 fails."""

    def __init__(self, served: Served, seconds: float = 0.05) -> None:
        self._served, self.seconds, self.runs = served, seconds, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served, name)

    def run(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.runs.append(len(tensors[0]))
        time.sleep(self.seconds)
        return self._served.run(tensors)


def together(
    slow: Any, inputs: list[torch.Tensor], wait: float = 0, seconds: float = 30, most: int = 1000
) -> list[Any]:
    """The results of requests that come at once, errors among them."""
    engine = Engine(slow, most_waiting=most, wait_seconds=wait)

    async def ask() -> list[Any]:
        asked = [engine.run([x], seconds) for x in inputs]
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        return asyncio.run(ask())
    finally:
        assert engine.stop(5)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    # other blocks of sums of BF16 products
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02, equal_nan=True)


def test_requests_that_wait_run_together_and_each_gets_its_own_rows(rows: Served) -> None:
    assert (rows.most_rows, rows.buckets) == (4, (1, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1 + i % 3, 8, generator=generator) for i in range(20)]
    slow = Slow(rows)
    for x, found in zip(inputs, together(slow, inputs), strict=True):
        # exact sums of the rows themselves: no other request's would do
        assert torch.equal(found["sum"], rows.run([x])["sum"])
        assert torch.equal(found["half"], x.bfloat16())
        assert torch.equal(found["positive"], x > 0)
        close(found["log"], rows.run([x])["log"])
    assert sum(slow.runs) == sum(len(x) for x in inputs)
    assert max(slow.runs) == 4
    assert len(slow.runs) < len(inputs) * 0.7


def test_a_request_of_more_rows_than_any_bucket_runs_alone(rows: Served) -> None:
    slow = Slow(rows)
    inputs = [torch.rand(n, 8) for n in (1, 9, 1, 1)]
    found = together(slow, inputs)
    assert [len(each["sum"]) for each in found] == [1, 9, 1, 1]
    assert 9 in slow.runs


def test_an_error_of_one_request_is_its_own(tokens: Served) -> None:
    assert tokens.most_rows == 4
    inputs = [torch.randint(0, 50, (1, 5)) for _ in range(8)]
    inputs[3] = torch.full((1, 5), 50)
    slow = Slow(tokens)
    found = together(slow, inputs)
    for i, (x, each) in enumerate(zip(inputs, found, strict=True)):
        if i == 3:
            assert isinstance(each, RefusedError)
            assert each.status == 400
            assert "can't run on these inputs" in str(each)
        else:
            close(each["output"], tokens.run([x])["output"])
    assert max(slow.runs) == 4


def test_a_fault_of_the_servers_own_is_no_fault_of_the_request(rows: Served) -> None:
    class Broken(Slow):
        def run(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            raise MemoryError

    (found,) = together(Broken(rows), [torch.rand(1, 8)])
    assert isinstance(found, MemoryError)


def test_rows_of_other_shapes_are_not_joined(tokens: Served) -> None:
    slow = Slow(tokens)
    inputs = [torch.randint(0, 50, (1, 2 + i % 2)) for i in range(12)]
    for x, found in zip(inputs, together(slow, inputs), strict=True):
        close(found["output"], tokens.run([x])["output"])
    assert max(slow.runs) == 4


def test_no_rows(rows: Served) -> None:
    found = together(Slow(rows), [torch.rand(1, 8), torch.rand(0, 8), torch.rand(2, 8)])
    assert [len(each["sum"]) for each in found] == [1, 0, 2]


def test_an_idle_model_lets_nobody_wait(rows: Served) -> None:
    start = time.monotonic()
    together(rows, [torch.rand(1, 8)], wait=10)
    assert time.monotonic() - start < 5


def test_a_busy_model_waits_for_more_but_not_for_ever(rows: Served) -> None:
    engine = Engine(slow := Slow(rows, 0.02), most_waiting=100, wait_seconds=0.3)  # type: ignore[arg-type]

    async def ask() -> float:
        first = asyncio.create_task(engine.run([torch.rand(1, 8)], 30))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(engine.run([torch.rand(2, 8)], 30))]
        await asyncio.sleep(0.1)
        others += [asyncio.create_task(engine.run([torch.rand(1, 8)], 30)) for _ in range(2)]
        await asyncio.gather(first, *others)
        start = time.monotonic()
        await engine.run([torch.rand(1, 8)], 30)
        return time.monotonic() - start

    last = asyncio.run(ask())
    assert engine.stop(5)
    assert slow.runs == [1, 4, 1]
    assert last < 2


class Where(Slow):
    """Works for a while, and writes down whether the thread that asked does it."""

    def run(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.runs.append(int(threading.current_thread() is threading.main_thread()))
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        return self._served.run(tensors)


@pytest.mark.parametrize(
    ("seconds", "threads", "at_once", "here"),
    [(0, 1, 1, 1), (0.02, 1, 1, 0), (0, 2, 1, 0), (0, 1, 4, 0)],
)
def test_the_event_loop_runs_what_is_short_and_comes_alone_to_a_model_of_one_thread(
    rows: Served, seconds: float, threads: int, at_once: int, here: int
) -> None:
    before = torch.get_num_threads()
    engine = Engine(where := Where(rows, seconds), most_waiting=9, wait_seconds=0, threads=threads)  # type: ignore[arg-type]
    inputs = [torch.rand(at_once, 8) for _ in range(8)]

    async def ask() -> None:
        for x in inputs:
            parts = await asyncio.gather(*(engine.run([row[None]], 30) for row in x))
            close(torch.cat([part["log"] for part in parts]), rows.run([x])["log"])

    try:
        asyncio.run(ask())
    finally:
        assert engine.stop(5)
        torch.set_num_threads(before)
    # how long a run takes is not known before the first, and the first ones take longer
    assert where.runs[0] == 0
    assert where.runs[-1] == here
    assert here or not any(where.runs)


def test_an_error_where_the_event_loop_runs_the_model_is_an_answer(tokens: Served) -> None:
    engine = Engine(tokens, most_waiting=9, wait_seconds=0, threads=1)

    async def ask() -> list[Any]:
        asked = [torch.full((1, 5), word) for word in (1, 50, 1)]
        return [(await asyncio.gather(engine.run([ids], 30), return_exceptions=True))[0] for ids in asked]

    good, bad, again = asyncio.run(ask())
    assert engine.stop(5)
    assert (bad.status, torch.equal(good["output"], again["output"])) == (400, True)


def test_time_that_is_up_and_a_queue_that_is_full(rows: Served) -> None:
    slow = Slow(rows, 0.3)
    late = together(slow, [torch.rand(4, 8) for _ in range(4)], seconds=0.15)
    assert {each.status for each in late} == {504}
    assert len(slow.runs) == 1  # what nobody waits for is not run
    full = together(Slow(rows, 0.2), [torch.rand(4, 8) for _ in range(6)], most=2)
    statuses = [each.status if isinstance(each, RefusedError) else 200 for each in full]
    assert set(statuses) == {200, 429}
    assert statuses[0] == 200


@pytest.mark.parametrize(
    ("model", "batch", "why"),
    [
        (Centred(), (1, 4), "depend on each other"),
        (nn.Linear(8, 4), (4,), "no dynamic first dimension"),
    ],
)
def test_models_whose_requests_stay_alone(model: nn.Module, batch: tuple[int, ...], why: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = prepare(Settings(str(made(model, torch.randn(4, 8), tmp_path / "b", batch))))
    assert found.most_rows == 1
    assert any(why in remark for remark in found.remarks)
    if batch == (1, 4):
        slow = Slow(found)
        inputs = [torch.randn(2, 8) for _ in range(4)]
        for x, each in zip(inputs, together(slow, inputs), strict=True):
            close(each["output"], found.run([x])["output"])
        assert slow.runs == [2] * 4


def test_a_batch_invariant_bundle_gives_the_same_to_the_bit_in_any_company(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checks = armopt.Checks(batch_invariant=True)
    armopt.optimize(Rows(64).eval(), (torch.rand(4, 8),), output=tmp_path / "b", batch=[1, 8], checks=checks)
    found = prepare(Settings(str(tmp_path / "b")))
    assert found.most_rows == 8
    inputs = [torch.rand(1 + i % 3, 8) for i in range(20)]
    slow = Slow(found)
    for x, each in zip(inputs, together(slow, inputs), strict=True):
        assert torch.equal(each["log"], found.run([x])["log"])
    assert max(slow.runs) > 4


def test_batching_can_be_switched_off(rows_bundle: Path) -> None:
    assert prepare(Settings(str(rows_bundle), batching=False)).most_rows == 1


# --- the protocol ---------------------------------------------------------------------------------


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def an_input(**changed: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8} | changed


@pytest.mark.parametrize("dtype", protocol.DATATYPES, ids=str)
def test_every_datatype_comes_and_goes_as_json_and_binary(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    if dtype.is_floating_point:
        values = values * 1.5
    data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    described = {"name": "x", "shape": [2, 3], "datatype": protocol.DATATYPES[dtype]}
    head = json.dumps({"inputs": [described | {"parameters": {"binary_data_size": len(data)}}]}).encode()
    asked = protocol.read(head + data, str(len(head)), 1000)
    assert torch.equal(asked.tensors["x"], values)
    for nested in (values.tolist(), values.flatten().tolist()):
        asked = protocol.read(json.dumps({"inputs": [described | {"data": nested}]}).encode(), None, 1000)
        assert torch.equal(asked.tensors["x"], values)
        assert asked.tensors["x"].dtype == dtype
    for binary in (True, False):
        request = protocol.Request("7", {}, ("y",), {}, binary)
        parts, headers = protocol.write(request, {"y": values, "z": values}, "m", "1")
        answer = json.loads(parts[0])
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "m", "1")
        (output,) = answer["outputs"]
        assert (output["datatype"], output["shape"]) == (protocol.DATATYPES[dtype], [2, 3])
        if binary:
            assert int(headers[HEADER_LENGTH]) == len(parts[0])
            assert parts[1] == data
        else:
            assert output["data"] == values.flatten().tolist()


def test_nan_and_infinity_are_null_in_json_and_themselves_in_binary() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.1])
    parts, _ = protocol.write(protocol.Request("", {}, (), {}, False), {"y": values}, "m", "1")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    answer = json.loads(parts[0], parse_constant=refuse)
    assert answer["outputs"][0]["data"] == [None, None, None, 0.1]
    parts, _ = protocol.write(protocol.Request("", {}, (), {}, True), {"y": values}, "m", "1")
    assert parts[1] == values.numpy().tobytes()


BAD = [
    (b"", "no inference request"),
    (b"{", "no inference request"),
    (b"\xff\xfe{}", "no inference request"),
    (b"[" * 100_000, "no inference request"),
    (b'{"inputs": 3}', "Expected `array`"),
    (b"{}", "missing required field `inputs`"),
    (body({"name": "x"}), "missing required field"),
    (body(an_input(shape=[-1, 8])), ">= 0"),
    (body(an_input(shape=[1.5, 8])), "Expected `int`"),
    (body(an_input(shape=[1] * 65)), "length <= 64"),
    (body(an_input(datatype="FP31")), "datatype 'FP31' is none of"),
    (body(an_input(datatype="BYTES", data=["a"])), "datatype 'BYTES' is none of"),
    (body(an_input(), an_input()), "given twice"),
    (body(an_input(data=[0.5] * 7)), "7 values, its shape takes 8"),
    (body(an_input(data=[[0.5] * 4] * 2)), r"data has shape \[2, 4\]"),
    (body(an_input(data=[[0.5] * 4, [0.5] * 3])), "input x: "),
    (body(an_input(data=[[[0.5] * 8]])), "nested 3 deep"),
    (body(an_input(data="abc")), "nested 0 deep"),
    (body(an_input(data=["1"] * 8)), "Expected `float`"),
    (body(an_input(data=[None] * 8)), "Expected `float`"),
    (body(an_input(data=[1e39] * 8)), "overflow"),
    (body(an_input(data=[1] * 8)).replace(b"1, 1]", b"1e999, 1]"), "out of range"),
    (body(an_input(data=[1] * 8)).replace(b"1, 1]", b"NaN, 1]"), "no inference request"),
    (body(an_input(datatype="INT64", data=[0.5] * 8)), "Expected `int`"),
    (body(an_input(datatype="UINT8", data=[256] * 8)), "out of bounds"),
    (body(an_input(datatype="BOOL", data=[1] * 8)), "Expected `bool`"),
    (body({"name": "x", "shape": [1], "datatype": "FP32"}), "neither data nor binary_data_size"),
    (body(an_input(shape=[0, 2**70], data=[])), "no tensor has shape"),
    (body(an_input(shape=[2**200], data=[])), "its shape"),
    (body(an_input(parameters={"binary_data_size": 32})), "both data and binary_data_size"),
    (body(an_input(parameters={"binary_data_size": 32}, data="?")).replace(b', "data": "?"', b""), "announced, 0 sent"),
    (body(an_input(parameters={"binary_data_size": -1})), "binary_data_size is -1"),
    (body(an_input(parameters={"binary_data_size": "x"})), "binary_data_size is 'x'"),
    (body(an_input(parameters={"binary_data_size": 8})), "take 32"),
    (body(an_input(), parameters={"binary_data_output": 1}), "binary_data_output is 1, not true or false"),
    (body(an_input(), outputs=[{"name": "sum", "parameters": {"binary_data": "no"}}]), "not true or false"),
    (body(an_input(), outputs=[{}]), "missing required field `name`"),
    (body(an_input(), outputs=[{"name": "sum"}] * 2), "asked for twice"),
    (body(an_input(), outputs=[{"name": "sum", "parameters": {"classification": 1}}]), "no classification"),
    (body(an_input(), outputs=[{"name": "sum", "parameters": {"shared_memory_region": "r"}}]), "no shared_memory"),
]


@pytest.mark.parametrize(("content", "text"), BAD, ids=[text for _, text in BAD])
def test_bodies_that_are_no_requests(content: bytes, text: str) -> None:
    with pytest.raises(RefusedError, match=text):
        protocol.read(content, None, 1 << 20)


def test_what_is_null_is_not_there() -> None:
    """As clients write it that put down every field they know of."""
    asked = protocol.read(body(an_input(parameters=None), id=None, parameters=None, outputs=None), None, 1000)
    assert (asked.id, asked.outputs, asked.all_binary) == ("", (), False)


def test_an_error_of_ten_thousand_names_is_short() -> None:
    assert len(str(RefusedError(", ".join(map(str, range(10_000)))))) == 1001


@pytest.mark.parametrize("header", ["x", "-1", "", "9" * 30, "²", "1000"])
def test_lengths_that_are_none(header: str) -> None:
    with pytest.raises(RefusedError, match="Inference-Header-Content-Length"):
        protocol.read(body(an_input()), header, 1 << 20)


def test_bytes_that_belong_to_nobody_and_a_bool_of_two() -> None:
    content = body(an_input())
    with pytest.raises(RefusedError, match="3 bytes behind the JSON belong to no input"):
        protocol.read(content + b"abc", str(len(content)), 1 << 20)
    head = body({"name": "x", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}})
    with pytest.raises(RefusedError, match="a BOOL is a byte of 0 or 1"):
        protocol.read(head + b"\x00\x02", str(len(head)), 1 << 20)


# --- the application ------------------------------------------------------------------------------


def test_a_prediction(client: TestClient, rows: Served) -> None:
    x = torch.rand(2, 8)
    answer = client.post(INFER, content=body(an_input(shape=[2, 8], data=x.tolist()), id="a b")).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("rows", rows.version, "a b")
    found = {each["name"]: each for each in answer["outputs"]}
    assert found.keys() == {"log", "sum", "positive", "half"}
    wanted = rows.run([x])
    assert found["sum"]["data"] == pytest.approx(wanted["sum"].tolist(), rel=1e-6)
    assert found["positive"]["data"] == (x > 0).flatten().tolist()
    assert [found[name]["datatype"] for name in ("log", "positive", "half")] == ["FP32", "BOOL", "BF16"]
    only = client.post(INFER, content=body(an_input(), outputs=[{"name": "sum"}])).json()
    assert [each["name"] for each in only["outputs"]] == ["sum"]


def test_nan_in_outputs_is_valid_json(client: TestClient) -> None:
    answer = client.post(INFER, content=body(an_input(data=[-50.0] * 8)))
    assert answer.status_code == 200
    data = next(each for each in answer.json()["outputs"] if each["name"] == "log")["data"]
    assert None in data
    assert b"NaN" not in answer.content


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (body(an_input(name="z")), 400, "missing inputs: x; unknown: z"),
        (body(), 400, "missing inputs: x"),
        (body(an_input(shape=[1, 4], data=[1, 2, 3, 4])), 400, "expected shape batchx8, found 1x4"),
        (body(an_input(datatype="FP64")), 400, "expected float32, found float64"),
        (body(an_input(), outputs=[{"name": "nix"}]), 400, "no output nix"),
        (body(an_input(name="\x1b[31m")), 400, r"unknown: \x1b[31m"),
        (body(an_input(data=[0.123456789] * 4000)), 413, "send binary tensors"),
        (b"x" * 100_001, 413, "more than 100000 bytes"),
    ],
)
def test_requests_that_are_refused(client: TestClient, content: bytes, status: int, text: str) -> None:
    answer = client.post(INFER, content=content)
    assert answer.status_code == status
    assert text in answer.json()["error"]


def test_bodies_that_are_compressed_or_announced_too_long(client: TestClient) -> None:
    assert client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415
    assert client.post(INFER, content=b"x", headers={"Transfer-Encoding": "gzip, chunked"}).status_code == 415
    assert client.post(INFER, content=body(an_input()), headers={"Content-Encoding": "Identity"}).status_code == 200

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 10_000

    assert client.post(INFER, content=chunks()).status_code == 413


def test_pages(client: TestClient, rows: Served) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/rows", f"/v2/models/rows/versions/{rows.version}"):
        described = client.get(path).json()
        assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}]
        assert {each["name"]: each["shape"] for each in described["outputs"]} == {
            "log": [-1, 16],
            "sum": [-1],
            "positive": [-1, 8],
            "half": [-1, 8],
        }
        assert client.get(f"{path}/ready").status_code == 200
    for path in ("/v2/models/other", "/v2/models/rows/versions/1", "/%1b", "/v2/"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "/docs lists what there is" in answer.json()["error"]
    assert client.get(INFER).status_code == 405
    page = client.get("/docs").text
    assert INFER in page
    assert "<script" not in page


def test_metrics(client: TestClient) -> None:
    client.post(INFER, content=body(an_input()))
    client.get("/nowhere")
    text = client.get("/metrics").text
    assert 'armopt_requests_total{code="200",route="/v2/models/rows/infer"}' in text
    assert 'armopt_requests_total{code="404",route="other"}' in text
    assert "armopt_batch_rows_bucket" in text


def test_a_server_is_not_ready_where_kernels_changed(
    rows: Served, rows_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(rows, changed="1 of 1 layers run another kernel than planned")
    for any_kernel, status in ((False, 503), (True, 200)):
        settings = Settings(str(rows_bundle), any_kernel=any_kernel)
        with TestClient(Service(changed, settings).app) as client:
            answer = client.get("/v2/health/ready")
            assert answer.status_code == status
            assert answer.json()["ready"] == (status == 200)
            assert client.get("/v2/health/live").status_code == 200
    path = tmp_path / "native"
    armopt.optimize(nn.Linear(8, 4).eval(), (torch.randn(4, 8),), output=path, target="host")
    native = prepare(Settings(str(path)))
    assert (native.changed, native.model.portable, native.probe()) == ("", False, "")
    slow = onednn_log.Execution("convolution", "ref:any")
    monkeypatch.setattr(onednn_log, "references", lambda executions: (slow,))
    with TestClient(Service(native, Settings(str(path))).app) as client:
        answer = client.get("/v2/health/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "oneDNN answers with ref:any")


def test_a_fault_is_answered_and_written_down(
    rows: Served, rows_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(Slow):
        def run(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            raise RuntimeError("broken\x1b[2J")

    service = Service(Broken(rows), Settings(str(rows_bundle)))  # type: ignore[arg-type]
    with TestClient(service.app, raise_server_exceptions=False) as client:
        answer = client.post(INFER, content=body(an_input()))
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (fault,) = [line for line in lines if line["event"] == "a request failed"]
    assert "broken\\x1b[2J" in fault["error"]
    assert lines[-1]["status"] == 500


def test_lines_of_log_hold_no_control_characters() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a\nb\x1b", None, None)
    record.fields = {"path": "/\x7f\u202e\x00\n", "status": 200}
    line = JsonLines().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["path"] == r"/\x7f\u202e\x00\n"


def test_a_log_that_nobody_reads_holds_up_neither_work_nor_end() -> None:
    code = (
        "import os\n"
        "from armopt.deploy.server.observe import log, logging_to_stderr\n"
        "with logging_to_stderr():\n"
        "    for i in range(5_000): log('request', path='x' * 100)\n"
        "os.write(1, b'ended')\n"
        "os._exit(0)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        try:
            assert process.wait(60) == 0
            assert process.stdout
            assert process.stdout.read() == b"ended"
        finally:
            process.kill()


@pytest.mark.slow
def test_the_application_keeps_its_own_description(rows: Served, rows_bundle: Path) -> None:
    """schemathesis makes requests from the OpenAPI page, and checks every answer against it."""
    import schemathesis
    from hypothesis import HealthCheck, given, seed, settings
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    names = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    names += ["response_schema_conformance", "allow_header_conformance", "unsupported_method"]
    checks = CHECKS.get_by_names(names)
    app = Service(rows, Settings(str(rows_bundle), max_bytes=100_000)).app
    with TestClient(app):
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        tried = set()
        for result in schema.get_all_operations():
            operation = result.ok()

            @seed(0)
            @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def ask(case: Any) -> None:
                case.call_and_validate(checks=checks)

            ask()
            tried.add(operation.label)
    assert f"POST {INFER}" in tried


# --- around it ------------------------------------------------------------------------------------


def test_a_server_imports_nothing_that_compiles() -> None:
    code = (
        "import sys, armopt.deploy.server.workers; "
        "print([m for m in sys.modules if m.startswith(('armopt.compiler', 'armopt.passes', 'armopt.capture', 'onnx', "
        "'armopt.plan', 'armopt.accuracy', 'torchvision'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def machine(root: Path, nodes: list[str], quota: str = "max 100000", siblings: dict[int, str] | None = None) -> Path:
    for i, cpus in enumerate(nodes):
        folder = root / f"sys/devices/system/node/node{i}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    (root / "sys/devices/system/node/online").write_text(f"0-{len(nodes) - 1}\n")
    for cpu, listed in (siblings or {}).items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(listed)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(quota)
    return root


@pytest.mark.parametrize(
    ("nodes", "workers", "quota", "wanted"),
    [
        (["0-7"], 2, "max 100000", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (["0-3", "4-7"], 4, "max 100000", [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (["0,2,4,6", "1,3,5,7"], 2, "max 100000", [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        (["0-3", "4-7"], 1, "max 100000", [{0, 1, 2, 3, 4, 5, 6, 7}]),
        (["0-7"], 3, "max 100000", [{0, 1}, {2, 3, 4}, {5, 6, 7}]),
        (["0-7"], 9, "max 100000", []),
        (["0-7"], 2, "400000 100000", []),  # the time of four CPUs on any of eight
        (["0-7"], 2, "800000 100000", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
    ],
)
def test_cores_are_divided_by_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str], workers: int, quota: str, wanted: list[set[int]]
) -> None:
    monkeypatch.setattr("armopt.environment.cores.affinity", lambda: frozenset(range(8)))
    found = cores_for_workers(workers, root=machine(tmp_path, nodes, quota))
    assert [set(each) for each in found] == wanted


def test_hyperthreads_of_one_core_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("armopt.environment.cores.affinity", lambda: frozenset(range(4)))
    root = machine(tmp_path, ["0-3"], siblings={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert [set(each) for each in cores_for_workers(2, root=root)] == [{0, 2}, {1, 3}]
    assert cores_for_workers(3, root=root) == ()
