"""Model files made to run code, or to take more than they have: what is refused by name without being trusted."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from armopt.capture import files, inputs
from armopt.capture.files import expressions
from armopt.cli import app
from armopt.errors import InputError

CODE = "__import__('os').system('touch pwned')"
X = (inputs.parse("2x4"),)


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an attack leaves where it succeeds."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch pwned",))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.shift = torch.arange(2.0)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        x = self.conv(x).relu_()
        with torch.no_grad():
            pooled = nn.functional.max_pool2d(x, 2)
        y = x.mean((2, 3)).view(x.shape[0] * 2, -1).reshape(-1, 4)
        return {"y": self.head(y) * scale + self.shift, "more": [pooled, torch.cat([y, y])]}


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())


@pytest.fixture(scope="module")
def pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dynamic sizes, keywords, a graph within the graph, a constant."""
    path, auto = tmp_path_factory.mktemp("models") / "m.pt2", torch.export.Dim.AUTO
    args, kwargs = (torch.randn(2, 3, 9, 8),), {"scale": torch.ones(2)}
    shapes = {"x": {0: auto, 2: auto, 3: auto}, "scale": None}
    torch.export.save(torch.export.export(Small().eval(), args, kwargs, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.pt"
    torch.jit.script(Scripted().eval()).save(str(path))
    return path


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout())
        self.sizes, self.table = [1, 2], {"a": 1}

    def step(self, x: torch.Tensor, times: int = 2) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for i in range(times):
            x = self.first(x) + i
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2:
            raise ValueError(f"{x.dim()} dimensions")
        return torch.nn.functional.softmax(self.act(torch.cat(self.step(x), 0)), 1)


def rewrite(source: Path, target: Path, changes: dict[str, Callable[[bytes], bytes] | bytes | None]) -> Path:
    """A zip file with other members, its checksums right; None takes one out."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as out:
        root = archive.namelist()[0].split("/")[0]
        left = dict(changes)
        for name in archive.namelist():
            inner = name.removeprefix(f"{root}/")
            change = left.pop(inner, lambda data: data)
            data = change(archive.read(name)) if callable(change) else change
            if data is not None:
                out.writestr(name, data)
        for name, data in left.items():
            assert isinstance(data, bytes)
            out.writestr(f"{root}/{name}", data)
    return target


def in_json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return apply


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def graph(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return {"models/model.json": in_json(lambda program: change(program["graph_module"]["graph"]))}


def whole(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return {"models/model.json": in_json(change)}


def call(target: str, arguments: list[dict[str, Any]] | None = None) -> Callable[[dict[str, Any]], None]:
    """A call at the end of a graph, whose result nobody reads."""

    def change(described: dict[str, Any]) -> None:
        named = [{"name": f"a{i}", "arg": arg, "kind": 1} for i, arg in enumerate(arguments or [])]
        outputs = [{"as_tensor": {"name": "more_"}}]
        described["tensor_values"]["more_"] = described["tensor_values"]["x"]
        described["nodes"].append({"target": target, "inputs": named, "outputs": outputs, "metadata": {}})

    return change


def rename(described: dict[str, Any], old: str, new: str) -> None:
    text = json.dumps(described).replace(json.dumps(old), json.dumps(new))
    described.clear()
    described.update(json.loads(text))


def weights(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    return {"data/weights/model_weights_config.json": in_json(lambda content: change(content["config"]["head.bias"]))}


def tree(change: Callable[[Any], Any], which: str = "out_spec") -> dict[str, Any]:
    def apply(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        content = json.loads(signature[which])
        change(content[1])
        signature[which] = json.dumps(content)

    return whole(apply)


SYMBOL = "Symbol('s0', positive=True, integer=True)"


def expression(text: str) -> dict[str, Any]:
    def change(described: dict[str, Any]) -> None:
        described["tensor_values"]["x"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return graph(change)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a pickle for example inputs": (
        {"data/sample_inputs/model.pt": saved(((Evil(),), {}))},
        "a pickle of posix.system in its example inputs",
    ),
    "a pickle for a weight": (
        {
            **weights(lambda meta: meta.update(use_pickle=True, path_name="weight_9")),
            "data/weights/weight_9": saved(Evil()),
        },
        "a pickle of posix.system in weights: head.bias",
    ),
    "pickled weights of old": (
        {"data/weights/model.pt": saved({"head.bias": Evil()})},
        "a pickle of posix.system in its weights",
    ),
    "pickled constants of old": ({"data/constants/model.pt": saved({"shift": Evil()})}, "in its constants"),
    "an opaque object": (
        {
            "data/constants/model_constants_config.json": in_json(
                lambda content: content["config"]["shift"].update(path_name="opaque_obj_0", use_pickle=True)
            ),
            "data/constants/opaque_obj_0": pickle.dumps(Evil()),
        },
        "the object opaque_obj_0 among its constants",
    ),
    "Python for a size": (expression(CODE), "the symbolic expression"),
    "Python within arithmetic": (expression(f"Add({SYMBOL}, {CODE})"), "the symbolic expression"),
    "Python by attributes": (expression("().__class__.__base__.__subclasses__()"), "the symbolic expression"),
    "Python in a number": (expression(f'Float("{CODE}")'), "a Float of something else"),
    "Python in a symbol": (expression(f'Symbol("{CODE}")'), "a Symbol of something else"),
    "Python in an Integer": (expression(f'Integer("{CODE}")'), "an Integer of something else"),
    "a power without end": (expression("9**9**9**9"), "a power of"),
    "a product without end": (expression("*".join(["(s0+s1+s2)"] * 40)), "of more than 500 terms"),
    "a nest without end": (expression("(" * 5000 + "s0" + ")" * 5000), "the symbolic expression"),
    "a name that is code": (graph(lambda g: rename(g, "x", f"x={CODE}")), "models/model.json"),
    "a node's name that is code": (graph(lambda g: rename(g, "conv2d", f"a\n{CODE}\nb")), "models/model.json"),
    "a keyword that is code": (
        graph(lambda g: g["nodes"][-1]["inputs"][0].update(name=f"**{{}} if {CODE} else {{}}")),
        "models/model.json",
    ),
    "text that ends text": (
        graph(lambda g: call("torch.ops.aten.gelu.default", [{"as_string": f"'+{CODE}+'"}])(g)),
        "models/",
    ),
    "a buffer's name that ends text": (
        whole(lambda p: rename(p, "head.bias", f'head.bias"), {CODE}, ("')),
        "models/model.json",
    ),
    "the name of an argument": (
        whole(
            lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(
                forward_arg_names=[f"x={CODE}", "scale"]
            )
        ),
        "models/model.json",
    ),
    "a keyword of inputs": (
        tree(lambda t: t["children_spec"][1].update(context=json.dumps([f"scale={CODE}"])), "in_spec"),
        "an input by what is no name",
    ),
    "an enum to import": (
        tree(lambda t: t.update(context=json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "a"}))),
        "the form of a builtins.dict",
    ),
    "a factory to import": (
        tree(
            lambda t: t.update(
                type="collections.defaultdict",
                context={
                    "default_factory_module": "antigravity",
                    "default_factory_name": "X",
                    "dict_context": ["y", "more"],
                },
            )
        ),
        "inputs or outputs in a collections.defaultdict",
    ),
    "a file to write": (graph(call("torch.ops.aten.save.default")), "a call of torch.ops.aten.save.default"),
    "a file to read": (graph(call("torch.ops.aten.from_file.default")), "a call of torch.ops.aten.from_file.default"),
    "a function of torch's": (graph(call("torch.hub.load", [{"as_string": "a"}])), "a call of torch.hub.load"),
    "a module in torch": (graph(call("torch.os.system", [{"as_string": "touch pwned"}])), "a call of torch.os.system"),
    "an operator that calls": (graph(call("_operator.call")), "a call of _operator.call"),
    "a compiled library": (
        graph(call("torch.ops.higher_order.aoti_call_delegate")),
        "a call of torch.ops.higher_order",
    ),
    "a seed": (graph(call("torch.manual_seed", [{"as_int": 1}])), "a call of torch.manual_seed"),
    "another package": (graph(call("torch.ops.quantized.linear.default")), "a call of torch.ops.quantized.linear"),
    "numbers without end": (
        graph(
            lambda g: g["nodes"].extend(
                {
                    "target": "_operator.mul",
                    "inputs": [{"name": "a", "arg": {"as_sym_int": {"as_name": name}}, "kind": 1}] * 2,
                    "outputs": [{"as_sym_int": {"as_name": f"p{i}"}}],
                    "metadata": {},
                }
                for i, name in enumerate(["sym_size_int", *(f"p{i}" for i in range(30))])
            )
        ),
        "arithmetic on numbers that may take",
    ),
    "an unbacked symbol's number": (
        whole(lambda p: p["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 9})),
        "models/model.json",
    ),
    "the same, written otherwise": (
        whole(lambda p: p["range_constraints"].update({"u +9_999_999_999": {"min_val": 0, "max_val": 9}})),
        "models/model.json",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pt2_runs_nothing_unless_trusted(pt2: Path, tmp_path: Path, name: str) -> None:
    changes, said = REFUSED[name]
    path = rewrite(pt2, tmp_path / "m.pt2", changes)
    with pytest.raises(InputError) as found:
        files.open_model(path, files.Options())
    assert said in str(found.value)
    assert "--trust-pickle" in found.value.hint
    assert found.value.where == str(path)


DAMAGED: dict[str, dict[str, Any]] = {
    "no model": {"models/model.json": None},
    "no JSON": {"models/model.json": b"{"},
    "no weights": {"data/weights/model_weights_config.json": None},
    "a weight less": {"data/weights/weight_0": None},
    "a weight too short": {"data/weights/weight_0": b"1234"},
    "a weight from elsewhere": weights(lambda meta: meta.update(path_name="../../../etc/passwd")),
    "a weight beyond its memory": weights(lambda meta: meta["tensor_meta"]["sizes"].append({"as_int": 1 << 40})),
    "a weight of great strides": weights(lambda meta: meta["tensor_meta"].update(strides=[{"as_int": 1 << 40}])),
    "a weight before its memory": weights(lambda meta: meta["tensor_meta"].update(storage_offset={"as_int": -1})),
    "a weight repeated": weights(
        lambda meta: meta["tensor_meta"].update(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}])
    ),
    "an unknown dtype": weights(lambda meta: meta["tensor_meta"].update(dtype=60)),
    "no signature": whole(lambda p: p["graph_module"]["module_call_graph"][0].update(signature=None)),
    "another schema": whole(lambda p: p["schema_version"].update(major=99)),
    "an unknown operation": graph(call("torch.ops.aten.add.Nonsense")),
    "example inputs that are no call": {"data/sample_inputs/model.pt": saved([1])},
    "JSON without end": {"models/model.json": b"[" * 100_000},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pt2_is_one_error(pt2: Path, tmp_path: Path, name: str) -> None:
    path = rewrite(pt2, tmp_path / "m.pt2", DAMAGED[name])
    with pytest.raises(InputError) as found:
        files.open_model(path, files.Options())
    assert found.value.where == str(path)
    assert "\n" not in str(found.value)


def test_a_pt2_that_is_zipped_again_is_read(pt2: Path, tmp_path: Path) -> None:
    captured = files.open_model(rewrite(pt2, tmp_path / "m.pt2", {}), files.Options())
    assert [symbol.name for symbol in captured.symbols] == ["batch", *(s.name for s in captured.symbols[1:])]
    program = torch.export.load(pt2)
    args, kwargs = program.example_inputs  # type: ignore[misc]
    expected = program.module()(*args, **kwargs)
    found = captured.graph_module(*captured.example)
    assert torch.allclose(found[0], expected["y"], atol=1e-6)


def test_a_library_in_a_pt2_is_not_opened(pt2: Path, tmp_path: Path) -> None:
    path = rewrite(pt2, tmp_path / "m.pt2", {"data/aotinductor/model/x.so": b"\x7fELF", "extra/x": b"\xff"})
    assert files.open_model(path, files.Options()).graph_module


def test_a_trusted_pt2_is_torchs_affair(pt2: Path, tmp_path: Path) -> None:
    """The flag takes what can't be shown to be harmless, here guards and an expression in another form."""
    path = rewrite(pt2, tmp_path / "m.pt2", expression("Add(Symbol('s77', positive=True, integer=True), sympify('0'))"))
    with pytest.raises(InputError, match="--trust-pickle"):
        files.open_model(path, files.Options())
    with pytest.raises(InputError, match="torch"):  # it got there
        files.open_model(path, files.Options(trust_pickle=True, inputs=X))


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "8*s0",
        "Max(1, s0)",
        "s0//2 - 1",
        "(s0 + 3) % 4",
        "Mul(Integer(3), Symbol('s0', positive=True, integer=True), Symbol('s53', positive=True, integer=True))",
        "Add(Mod(Add(FloorDiv(Symbol('s0', integer=True), Integer(2)), Integer(-1)), Integer(7)), Integer(8))",
        "Pow(Symbol('s0', positive=True, integer=True), Integer(2))",
        "StrictLessThan(Symbol('u0', integer=True), Integer(4))",
        "Max(Integer(1), Symbol('s0', positive=True, integer=True))",
    ],
)
def test_expressions_of_sizes_stay_as_they_are(text: str) -> None:
    assert expressions.checked(text).replace(" ", "") == text.replace(" ", "")


# --- TorchScript ---

SOURCE = f"code/__torch__/{__name__.replace('.', '/')}.py"
THIS = f"__torch__.{__name__}"
SELF = f"self: {THIS}.Scripted"


def code(change: Callable[[str], str]) -> dict[str, Any]:
    return {SOURCE: lambda data: change(data.decode()).encode()}


def method(text: str) -> dict[str, Any]:
    """One more method for the model's class."""
    lines = "".join(f"  {line}\n" for line in text.splitlines())
    return code(lambda source: source.replace("  def forward(", f"{lines}  def forward(", 1))


def within(text: str) -> dict[str, Any]:
    """A line more at the beginning of forward."""

    def change(source: str) -> str:
        head, _, rest = source.partition("-> Tensor:\n")
        return f"{head}-> Tensor:\n    {text}\n{rest}"

    return code(change)


SCRIPTS: dict[str, tuple[dict[str, Any], str]] = {
    "a method that restores": (
        method(f'def __setstate__({SELF}, state: int) -> NoneType:\n  torch.save(state, "pwned")\n  return None'),
        "'__setstate__' in code/__torch__",
    ),
    "a default that is evaluated": (
        method(f'def more({SELF}, x: NoneType=torch.save(1, "pwned")) -> NoneType:\n  return None'),
        "the default",
    ),
    "a constant that is evaluated": (
        code(lambda s: s.replace("  training : bool\n", '  training : bool\n  c : Final[int] = torch.len("a")\n', 1)),
        "in code/__torch__",
    ),
    "a file to write": (within('_9 = torch.save(x, "pwned")'), "a call of torch.save"),
    "a file to write, as another package": (within('_9 = ops.aten.save(x, "pwned")'), "a call of ops.aten.save"),
    "a file to write, as a method": (within('_9 = (x).save("pwned", )'), "a call of save"),
    "a file to write, by another name": (within('f = torch.save\n    _9 = f(x, "pwned")'), "a call of torch.save"),
    "a file to map": (within('_9 = torch.from_file("pwned", True, 100)'), "a call of torch.from_file"),
    "a seed": (within("_9 = torch.manual_seed(1)"), "a call of torch.manual_seed"),
    "gradients": (within("_9 = torch.backward(x)"), "a call of torch.backward"),
    "a class of C++": (
        code(lambda s: s.replace("training : bool", "training : bool\n  c : __torch__.torch.classes.quantized.X", 1)),
        "'torch.classes' in code/__torch__",
    ),
    "a class of C++, written wide": (
        code(lambda s: s.replace("training : bool", "training : bool\n  c : __torch__.torch \\\n . classes.a.X", 1)),
        "in code/__torch__",
    ),
    "text without end": (
        within("\n    ".join(['t = "aaaaaaaaaaaaaaaa"', *["t = torch.add(t, t)"] * 20])),
        "text of",
    ),
    "calls without end": (
        code(
            lambda source: (
                source
                + "\n".join(
                    f"def f{i}(x: int) -> int:\n  return torch.add({THIS}.f{i + 1}(x), {THIS}.f{i + 1}(x))"
                    for i in range(40)
                )
                + "\ndef f40(x: int) -> int:\n  return x\n"
            )
        ),
        "calls within f",
    ),
    "calls of methods without end": (
        method(
            "\n".join(
                f"def f{i}({SELF}) -> int:\n  return torch.add((self).f{i + 1}(), (self).f{i + 1}())" for i in range(40)
            )
            + f"\ndef f40({SELF}) -> int:\n  return 1"
        ),
        "calls within f",
    ),
    "a function that calls itself": (
        method(f"def f({SELF}) -> int:\n  return (self).f()"),
        "a call of f within itself",
    ),
    "text so wide": (within('t = torch.ljust("a", 1000000000000, " ")'), "a call of torch.ljust"),
    "a statement outside of functions": (code(lambda s: f'x = torch.save(1, "pwned")\n{s}'), "in code/__torch__"),
    "a pickle of the system": (
        {"data.pkl": b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R."},
        "a pickle of os.system in data.pkl",
    ),
    "a pickle of C++": (
        {"data.pkl": b"\x80\x02c__torch__.torch.classes.quantized\nX\n)\x81."},
        "a pickle of __torch__.torch.classes.quantized.X",
    ),
    "a loop without end": (
        within("_9 = 0\n    while True:\n      _9 = torch.add(_9, 1)"),
        "turns",
    ),
    "a loop of many turns": (
        within("for i in range(1000000000):\n      x = torch.add(x, 1)"),
        "a loop of 1000000000 turns",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_torchscript_runs_nothing_unless_trusted(script: Path, tmp_path: Path, name: str) -> None:
    changes, said = SCRIPTS[name]
    path = rewrite(script, tmp_path / "m.pt", changes)
    with pytest.raises(InputError) as found:
        files.open_model(path, files.Options(inputs=X))
    assert said in str(found.value)
    assert "--trust-pickle" in found.value.hint


def storage(count: int, size: int = 4, stride: int = 1, key: str = "0") -> bytes:
    """A pickle of one tensor, whatever it says of itself."""
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)  # noqa: E731
    name = b"X" + struct.pack("<I", len(key)) + key.encode()
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + name + b"X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    tensor = pid + b"K\x00(" + number(size) + b"t(" + number(stride) + b"t\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"R."


BEYOND = {
    "more than is stored": storage(1 << 36, 1 << 36),
    "a size beyond its memory": storage(4, 1 << 36),
    "a stride beyond its memory": storage(4, 4, 1 << 36),
    "memory that isn't there": storage(4, key="7"),
    "negative": storage(-4),
    "a memo of four billion": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "a stack that is empty": b"\x80\x02t.",
    "nothing": b"",
    "a device of many": b"\x80\x02ctorch\ndevice\n]" + b"\x85R.",
    "parts that stand twice": b"\x80\x02]q\x00" + b"".join(b"(h%ch%clq%c" % (i, i, i + 1) for i in range(60)) + b".",
    "a part of itself": b"\x80\x02]q\x00h\x00a.",
    "a nest without end": b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".",
}


@pytest.mark.parametrize("name", [name for name in BEYOND if "memo" not in name])
@pytest.mark.parametrize("part", ["data.pkl", "constants.pkl"])
def test_tensors_of_torchscript_fit_their_memory(script: Path, tmp_path: Path, part: str, name: str) -> None:
    path = rewrite(script, tmp_path / "m.pt", {part: BEYOND[name], "constants/0": bytes(16), "data/0": bytes(16)})
    with pytest.raises(InputError, match="TorchScript can't load it"):
        files.open_model(path, files.Options(inputs=X))


@pytest.mark.parametrize("name", BEYOND)
def test_tensors_of_a_state_dict_fit_their_memory(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", BEYOND[name])
        archive.writestr("m/data/0", bytes(16))
    with pytest.raises(InputError):
        files.build(tmp_path / "m.pt", files.Options(model=f"{__name__}:factory"))


def test_a_real_script_is_read(script: Path) -> None:
    captured = files.open_model(script, files.Options(inputs=X))
    x = torch.randn(2, 4)
    expected = torch.jit.load(script)(x)
    assert torch.allclose(captured.graph_module(x)[0], expected, atol=1e-6)


# --- all of them ---


@pytest.mark.parametrize("kind", ["pt2", "script", "state"])
def test_a_byte_that_flips_is_noticed(pt2: Path, script: Path, tmp_path: Path, kind: str) -> None:
    if kind == "state":
        torch.save(factory().state_dict(), tmp_path / "state.pt")
    source = {"pt2": pt2, "script": script, "state": tmp_path / "state.pt"}[kind]
    data = source.read_bytes()
    options = files.Options(inputs=() if kind == "pt2" else X, model=f"{__name__}:factory" if kind == "state" else "")
    with zipfile.ZipFile(source) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        name = {"pt2": "models/model.json", "script": "data.pkl", "state": "data/0"}[kind]
        start = data.index(archive.read(members[name]), members[name].header_offset)
    path = tmp_path / "flipped.pt"
    path.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(InputError, match="CRC"):
        files.open_model(path, options)


@pytest.mark.parametrize("command", ["optimize", "plan"])
def test_the_command_line_says_so_too(pt2: Path, tmp_path: Path, command: str) -> None:
    path = rewrite(pt2, tmp_path / "m.pt2", expression(CODE))
    rest = ["-o", str(tmp_path / "out")] if command == "optimize" else []
    done = CliRunner().invoke(app.app, [command, str(path), *rest])
    assert isinstance(done.exception, InputError)
    assert done.exception.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".safetensors", ".npz"])
def test_pipes_and_devices_are_not_opened(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"m{suffix}")
    for path in (tmp_path / f"m{suffix}", Path("/dev/zero")):
        with pytest.raises(InputError, match="is no regular file"):
            files.open_model(path, files.Options())


def test_a_zip_is_about_as_large_as_it_looks(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("m/data.pkl", "w") as file,
    ):
        for _ in range(257):
            file.write(bytes(1 << 20))
    with pytest.raises(InputError, match="says that it holds 269484032"):
        files.find_kind(path)


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"a")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("m/data.pkl", b"b")
    with pytest.raises(InputError, match="is in it twice"):
        files.find_kind(path)


def test_the_form_before_zip_files_declares_no_more_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    grown = data.replace(b"K\x04N", b"\x8a\x05" + (1 << 36).to_bytes(5, "little") + b"N")
    assert grown != data
    path.write_bytes(grown)
    with pytest.raises(InputError, match="says that it holds"):
        files.build(path, files.Options(model=f"{__name__}:factory"))


def test_a_safetensors_header_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(factory().state_dict(), path)
    path.write_bytes(path.read_bytes().replace(b"[3,4]", b"[9,9]"))
    with pytest.raises(InputError, match="damaged"):
        files.build(path, files.Options(model=f"{__name__}:factory"))
