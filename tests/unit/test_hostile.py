"""Bundles made to do harm, with all hashes right: whoever can change a bundle can hash it again."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import armopt
from armopt.bundle import files, manifest, reader
from armopt.cli import app
from armopt.errors import BundleError
from armopt.files import put
from tests.unit.test_manifest import hashed

pytestmark = pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")
Graph = dict[str, Any]


@pytest.fixture
def bundle(mlp_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mlp_bundle, tmp_path / "bundle"))


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an attack leaves where it succeeds."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pwned"


CODE = "__import__('os').system('touch pwned')"


def rewrite(bundle: Path, change: Callable[[Graph], Any] | None = None) -> None:
    """Changes graph.json and makes the hashes right."""
    if change is not None:
        graph = json.loads((bundle / "graph.json").read_text())
        change(graph)
        (bundle / "graph.json").write_text(json.dumps(graph))
    content = json.loads((bundle / "manifest.json").read_text())
    for name in content["files"]:
        content["files"][name] = files.hash_file(bundle / name)
    (bundle / "manifest.json").write_bytes(hashed(content))


def check_refused(bundle: Path, change: Callable[[Graph], Any], said: str) -> None:
    """A changed graph.json is refused, with these words and its place."""
    rewrite(bundle, change)
    with pytest.raises(BundleError) as found:
        reader.read(bundle)
    assert said in str(found.value)
    assert found.value.where.startswith(str(bundle / "graph.json"))


def programs(graph: Graph) -> list[Graph]:
    return [program for part in graph["parts"] for program in part["programs"]]


def rename(graph: Graph, old: str, new: str) -> None:
    """Another name for a node, wherever it stands."""
    for program in programs(graph):
        for node in program["nodes"]:
            node["name"] = new if node["name"] == old else node["name"]
            for arg in node.get("args", ()):
                if isinstance(arg, dict) and arg["name"] == old:
                    arg["name"] = new
        for value in program["output"]:
            value["name"] = new if value["name"] == old else value["name"]


def insert(call: str, args: list[Any], **more: Any) -> Callable[[Graph], None]:
    """A call at the end of every program; ``"x"`` is the input."""
    args = [{"kind": "node", "name": "x"} if arg == "x" else arg for arg in args]

    def change(graph: Graph) -> None:
        for program in programs(graph):
            program["nodes"].append({"name": "more", "op": "call", "target": call, "args": args, **more})

    return change


def test_rows_of_which_there_is_no_program_are_refused(bundle: Path) -> None:
    def change(graph: Graph) -> None:
        graph["parts"][0]["signature"]["rows"] = 3

    check_refused(bundle, change, "runs 3 rows at a time, for which it has no program")


@pytest.mark.parametrize(
    "name", [f"q={CODE}", f"q={CODE}, *", "self", "def", "n0", "w0", "output", "a b", f'"+{CODE}+"', "#", "None", ""]
)
@pytest.mark.parametrize("old", ["x", "first"])
def test_a_nodes_name_is_a_name_alone(
    bundle: Path, marker: Path, mlp_inputs: tuple[torch.Tensor, ...], name: str, old: str
) -> None:
    expected = armopt.load(bundle)(*mlp_inputs)
    rewrite(bundle, lambda graph: rename(graph, old, name))
    found = armopt.load(bundle)(*mlp_inputs)
    assert torch.equal(found["logits"], expected["logits"])
    assert not marker.exists()
    sources = [program.graph_module.code for program in reader.read(bundle).programs]
    assert all("__import__" not in source for source in sources)


@pytest.mark.parametrize("name", [f'w"), {CODE}, ("', f"{CODE}", "forward", "graph", "a.b", "_modules", "training"])
def test_a_weights_name_is_a_name_alone(
    bundle: Path, marker: Path, mlp_inputs: tuple[torch.Tensor, ...], name: str
) -> None:
    expected = armopt.load(bundle)(*mlp_inputs)
    weights = load_file(bundle / "weights.safetensors")
    old = next(iter(weights))
    weights[name] = weights.pop(old)
    save_file(weights, bundle / "weights.safetensors", metadata={"format": "pt"})

    def change(graph: Graph) -> None:
        for program in programs(graph):
            for node in program["nodes"]:
                if node["op"] == "weight" and node["target"] == old:
                    node["target"] = name

    rewrite(bundle, change)
    found = armopt.load(bundle)(*mlp_inputs)
    assert torch.equal(found["logits"], expected["logits"])
    assert not marker.exists()


SPLAT = f"**{{}} if {CODE} else {{}}, **{{}}) or dict(a"
REFUSED: dict[str, tuple[Callable[[Graph], None], str]] = {
    "code for the name of an argument": (
        insert("aten.relu.default", ["x"], kwargs={SPLAT: 1}),
        "node more: the graph calls aten.relu.default with an argument",
    ),
    "an argument too many": (insert("aten.relu.default", ["x", 1]), "aten.relu.default with 2 arguments; it takes 1"),
    "an argument twice": (insert("aten.relu.default", ["x"], kwargs={"self": 1}), "with an argument 'self'"),
    "an argument too few": (insert("aten.mul.Tensor", ["x"]), "without its argument 'other'"),
    "a string that ends a string": (
        insert("aten.gelu.default", ["x"], kwargs={"approximate": f"'+{CODE}+'"}),
        "kwargs[...]: expected str matching regex",
    ),
    "a line break in a source line": (
        insert("aten.relu.default", ["x"], source=f"a\n{CODE}"),
        "source: expected one line without control characters",
    ),
    "another device": (
        insert("aten.zeros.default", [[1]], kwargs={"device": {"kind": "device", "name": "cuda"}}),
        "kwargs[...].name: invalid enum value 'cuda'",
    ),
    "unsafe sparse tensors": (
        insert("aten._sparse_csr_tensor_unsafe.default", ["x", "x", "x", [1, 1]]),
        "aten._sparse_csr_tensor_unsafe.default, which is not on the list",
    ),
    "a backward of sparse tensors": (
        insert("aten._sparse_softmax_backward_data.default", ["x", "x", 0, "x"]),
        "_sparse_softmax_backward_data.default, which is not on the list",
    ),
    "quantile divides by zero": (insert("aten.quantile.scalar", ["x", 0.5, 1 << 62]), "aten.quantile.scalar, which"),
    "a rank that is never found": (insert("aten.linalg_matrix_rank.default", ["x"]), "aten.linalg_matrix_rank"),
    "a power that never ends": (insert("operator.pow", [9, 9**9]), "operator.pow with an exponent of 387420489"),
    "a power of a tensor's": (insert("operator.pow", [2, "x"]), "arithmetic on something other than numbers"),
    "a negative power": (insert("operator.pow", [0, -1]), "operator.pow with an exponent of -1"),
    "a file": (insert("aten.from_file.default", ["/etc/passwd"]), "aten.from_file.default, which is not on the list"),
    "a seed": (insert("torch.manual_seed", [0]), "'torch.manual_seed', which is no operation on tensors"),
    "a mode of all of torch": (insert("torch._C._set_grad_enabled", [True]), "which is no operation on tensors"),
    "random numbers": (insert("aten.rand_like.default", ["x"]), "aten.rand_like.default, which is not on the list"),
    "uninitialised memory": (insert("aten.empty_like.default", ["x"]), "aten.empty_like.default, which is not on"),
    "dropout in attention": (
        insert("aten.scaled_dot_product_attention.default", ["x", "x", "x", None, 0.5]),
        "with dropout_p, which makes it random",
    ),
    "a number for a memory format": (
        insert("aten.clone.default", ["x"], kwargs={"memory_format": 1000}),
        "aten.clone.default with 1000 for its argument 'memory_format'",
    ),
    "a number for a dtype": (
        insert("aten.zeros.default", [[1]], kwargs={"dtype": 1 << 20}),
        "aten.zeros.default with 1048576 for its argument 'dtype'",
    ),
    "a number for a layout": (
        insert("aten.zeros_like.default", ["x"], kwargs={"layout": 77}),
        "aten.zeros_like.default with 77 for its argument 'layout'",
    ),
    "no tensors to stack": (insert("aten._stack.default", [[]]), "aten._stack.default with [] for its argument"),
    "no tensors to join": (insert("aten.cat.default", [[]]), "aten.cat.default with [] for its argument 'tensors'"),
    "a list a million times": (insert("aten.mul.left_t", [[1], 10**9]), "aten.mul.left_t, which is not on the list"),
    "a string for a number": (insert("aten.add.str", ["a", "b"]), "aten.add.str, which is not on the list"),
    "it writes to an input": (insert("aten.add_.Tensor", ["x", 1]), "aten.add_.Tensor, which writes to its arguments"),
    "it writes to an output": (
        insert("aten.add.out", ["x", 1], kwargs={"out": {"kind": "node", "name": "x"}}),
        "aten.add.out, which writes to its arguments",
    ),
    "a copy into an input": (insert("aten.copy_.default", ["x", "x"]), "aten.copy_.default on something other than a"),
    "an item of something": (insert("operator.getitem", [[1, 2], 0]), "operator.getitem of something other than"),
    "a sequence by a slice": (insert("operator.getitem", ["x", 0.5]), "operator.getitem of something other than"),
    "a tensor times a list": (insert("operator.mul", ["x", 10**9]), "arithmetic on something other than numbers"),
    "another package's": (
        insert("quantized.linear.default", ["x"]),
        "'quantized.linear.default', which is no operation",
    ),
    "a layer without a shape": (
        insert("armopt.linear.default", ["x", "x", None, None, "none", "blas_fp32", 0]),
        "a layer has a shape and an output, and nothing else has",
    ),
    "a layer whose weight is an input": (
        insert(
            "armopt.linear.default", ["x", "x", None, None, "none", "blas_fp32", 0], shape=[1, 16], output=[None, 16]
        ),
        "the weight or bias of a layer is no weight of the bundle",
    ),
    "a shape that is none": (insert("aten.relu.default", ["x"], shape=[1], output=[1]), "and nothing else has"),
    "a number beyond 64 bits": (insert("aten.mul.Tensor", ["x", 1 << 70]), "args[1]"),
    "a node twice": (
        lambda graph: [program["nodes"].append({"name": "x", "op": "input"}) for program in programs(graph)] and None,
        "node x: its name is there twice",
    ),
    "no parts": (lambda graph: graph.update(parts=[]), "parts: expected array of length >= 1"),
    "another bucket": (lambda graph: programs(graph)[0].update(bucket={"batch": 3}), "other graphs than the manifest"),
    "an input less": (
        lambda graph: programs(graph)[0].update(
            nodes=[{"name": "y", "op": "weight", "target": "second_bias"}],
            output=[{"kind": "node", "name": "y"}, {"kind": "node", "name": "y"}],
        ),
        "takes or returns another number of tensors",
    ),
    "an output less": (lambda graph: programs(graph)[0]["output"].pop(), "takes or returns another number of tensors"),
    "an input of another dtype": (
        lambda graph: graph["parts"][0]["signature"]["specs"][0].update(dtype="int64"),
        "takes other inputs than the manifest says",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_do_harm_is_refused_by_name(bundle: Path, marker: Path, name: str) -> None:
    check_refused(bundle, *REFUSED[name])
    assert not marker.exists()


def test_numbers_that_grow_without_bound_are_refused(bundle: Path) -> None:
    """x*x, then its square, and so on: thirty calls make a number of 10^9 digits."""

    def change(graph: Graph) -> None:
        nodes = programs(graph)[0]["nodes"]
        x = {"kind": "node", "name": "x"}
        nodes.append({"name": "size", "op": "call", "target": "aten.sym_size.int", "args": [x, 0]})
        for i in range(30):
            before = {"kind": "node", "name": f"p{i - 1}" if i else "size"}
            nodes.append({"name": f"p{i}", "op": "call", "target": "operator.mul", "args": [before, before]})

    rewrite(bundle, change)
    with pytest.raises(BundleError, match=r"node p6: the graph calls operator\.mul of numbers that may take 8192 bits"):
        reader.read(bundle)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"parts": [{}]}', b"null"], ids=repr)
def test_anything_for_a_graph_is_an_error_of_ours(bundle: Path, data: bytes) -> None:
    (bundle / "graph.json").write_bytes(data)
    rewrite(bundle)
    with pytest.raises(BundleError):
        reader.read(bundle)


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("validate",), ("doctor",), ("tune", "-o", "t.json"), ("export-onnx", "-o", "m.onnx"), ("package",)],
    ids=lambda command: command[0],
)
def test_every_command_that_reads_a_graph(bundle: Path, marker: Path, command: tuple[str, ...]) -> None:
    rewrite(bundle, REFUSED["code for the name of an argument"][0])
    rest = ("-o", "image", "--no-hashes") if command[0] == "package" else command[1:]
    done = CliRunner().invoke(app.app, [command[0], str(bundle), *rest])
    assert isinstance(done.exception, BundleError)
    assert not marker.exists()


def test_hashing_again_is_no_attack(bundle: Path) -> None:
    """What the attacks above are made with leaves a good bundle good."""
    rewrite(bundle, lambda graph: None)
    assert reader.read(bundle).manifest.schema_version == manifest.SCHEMA_VERSION


def describe(bundle: Path, change: Callable[[Graph], Any]) -> None:
    """Changes manifest.json and makes its hash right."""
    content = json.loads((bundle / "manifest.json").read_text())
    change(content)
    (bundle / "manifest.json").write_bytes(hashed(content))


VARIABLES = {
    "a library in the bundle": ("LD_PRELOAD", "bundle/evil.so", "why not"),
    "a folder with a sitecustomize": ("PYTHONPATH", "bundle", "why not"),
    "another PATH": ("PATH", "bundle:/usr/bin", "why not"),
    "a command as a value": ("LRU_CACHE_CAPACITY", "$(touch pwned)", "why not"),
    "a line more": ("OMP_NUM_THREADS", "1\nLD_PRELOAD=evil.so", "why not"),
    "a line more in the reason": ("OMP_NUM_THREADS", "1", "so\ntouch pwned"),
}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("command", [("run",), ("env",), ("env", "--format", "docker"), ("env", "--format", "systemd")])
def test_a_variable_that_armopt_never_sets_is_refused(
    bundle: Path, marker: Path, name: str, command: tuple[str, ...]
) -> None:
    variable, value, why = VARIABLES[name]
    describe(bundle, lambda content: content["environment"].update({variable: {"value": value, "why": why}}))
    words = [command[0], str(bundle), *command[1:], *(["--", "true"] if command[0] == "run" else [])]
    done = CliRunner().invoke(app.app, words)
    assert isinstance(done.exception, BundleError), done.output
    assert variable in str(done.exception)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.10.0\n--index-url=https://evil", "versions[...]: expected one line without control characters"),
        ("2.10.0 --pre", "which is no version"),
        ("evil @ https://evil", "which is no version"),
        ("newest", "which is no version"),
    ],
)
def test_a_version_that_is_none_reaches_no_requirements(bundle: Path, tmp_path: Path, version: str, said: str) -> None:
    def change(content: Graph) -> None:
        content["versions"] |= {"torch": version, "torch_build": "cpu", "machine": "aarch64"}

    describe(bundle, change)
    done = CliRunner().invoke(app.app, ["package", str(bundle), "-o", str(tmp_path / "image"), "--no-hashes"])
    assert isinstance(done.exception, BundleError), done.output
    assert said in str(done.exception)
    assert not (tmp_path / "image").exists()


def test_everyone_may_read_what_the_umask_allows(mlp_bundle: Path) -> None:
    """An image's server runs as another user than who made the bundle."""
    assert {oct(file.stat().st_mode & 0o777) for file in mlp_bundle.iterdir()} == {"0o644"}
    assert oct(mlp_bundle.stat().st_mode & 0o777) == "0o755"


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder"])
def test_what_is_no_file_is_not_opened(bundle: Path, name: str, kind: str) -> None:
    kept = bundle.with_name("kept")
    (bundle / name).rename(kept)
    if kind == "pipe":
        os.mkfifo(bundle / name)
    elif kind == "link":
        (bundle / name).symlink_to(kept)
    elif kind == "device":
        (bundle / name).symlink_to("/dev/zero")
    else:
        (bundle / name).mkdir()
    with pytest.raises(BundleError, match="is no regular file"):
        reader.read(bundle)


def test_a_bundle_that_is_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "b")
    with pytest.raises(BundleError, match="neither a bundle folder nor a bundle zip"):
        reader.read(tmp_path / "b")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_zip_is_about_as_large_as_it_looks(bundle: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w") as entry:
            for _ in range(257):
                entry.write(bytes(1 << 20))
        for file in bundle.iterdir():
            if file.name != name:
                archive.write(file, file.name)
    assert path.stat().st_size < 1 << 22
    with pytest.raises(BundleError, match=f"{name} in it would have 269484032 bytes"):
        reader.read(path)


def test_entries_of_a_zip_may_not_share_what_they_are_unpacked_from(bundle: Path, tmp_path: Path) -> None:
    """A thousand names for one compressed file: each is small enough, all of them take hours."""
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))
        for file in bundle.iterdir():
            archive.write(file, file.name)
        (entry,) = (each for each in archive.infolist() if each.filename == "zeros")
        for i in range(1000):
            again = copy.copy(entry)
            again.filename = again.orig_filename = f"zeros{i}"
            archive.filelist.append(again)
    with pytest.raises(BundleError, match=r"the files in it would have \d+ bytes, and it has"):
        reader.read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_may_take_any_memory_is_refused(bundle: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in bundle.iterdir():
            archive.write(file, file.name)
    with pytest.raises(BundleError, match=f"is compressed by method {method}"):
        reader.read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["manifest.json", "graph.json", "weights.safetensors"])
def test_a_damaged_entry_of_a_zip_is_an_error_of_ours(bundle: Path, tmp_path: Path, method: int, name: str) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in bundle.iterdir():
            archive.write(file, file.name)
        entry = archive.getinfo(name)
    begin = entry.header_offset + 30 + len(name)
    data = bytearray(path.read_bytes())
    for at in range(begin, begin + entry.compress_size, max(1, entry.compress_size // 9)):
        changed = data.copy()
        changed[at : at + 3] = b"\xff\x00\xff"
        path.write_bytes(changed)
        with pytest.raises(BundleError):
            reader.read(path)
        assert files.looks_like_bundle(path)
    path.write_bytes(data[: len(data) // 2])
    assert not files.looks_like_bundle(path)


def test_a_bundle_that_was_zipped_again_is_read(bundle: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "again"), "zip", bundle)
    assert reader.read(tmp_path / "again.zip").manifest == reader.read(bundle).manifest


def test_a_file_of_json_is_bounded(bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(files.MOST_JSON + 1)
    with pytest.raises(BundleError, match="has more than"):
        reader.read(bundle)


@pytest.mark.slow
def test_whoever_reads_while_a_bundle_is_replaced_sees_one_of_them(bundle: Path, tmp_path: Path) -> None:
    """Twice a second copy takes the first one's place, and back, while four threads read."""
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    rewrite(other, insert("aten.relu.default", ["x"]))
    known = {reader.read(path).manifest.digest for path in (bundle, other)}
    stop, found, failed = threading.Event(), set[str](), list[Exception]()

    def look() -> None:
        while not stop.is_set():
            try:
                found.add(reader.read(bundle).manifest.digest)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        put(other, bundle)  # what was there is at `other` now
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert found <= known
