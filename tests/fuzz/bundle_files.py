"""Bundles, with their hashes made right again after each change: whoever can change a bundle can do that too."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt.accuracy import samples
from armopt.bundle import files, operations, reader
from armopt.cli import app
from armopt.errors import InputError
from armopt.runtime.load import load
from armopt.runtime.model import Model
from tests.fuzz.mutations import NUMBERS, as_json, change_bytes, change_json, changed
from tests.fuzz.reader import Reader
from tests.unit.test_manifest import hashed


class Small(nn.Module):
    """Something of most kinds: an embedding, attention, a convolution, a pool, an index that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(10, 16), nn.LayerNorm(16)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.words(ids))
        x = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), x)
        seen = torch.max_pool2d(self.conv(image).relu(), 2).mean((2, 3))
        x = x[:, :2].reshape(x.shape[0], 2, 16).sum(1) + seen
        return {"logits": self.head(x), "two": torch.split(x, 8, 1), "fixed": 3}


def _small() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 10, (2, 3), generator=generator)
    return Small().eval(), (ids, torch.randn(2, 3, 4, 4, generator=generator))


class Divided(nn.Module):
    """Python between two parts, which torch.export can't take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 4), nn.Tanh())
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        return self.second(x) if float(x.sum()) > -1e9 else x


def _seeds(folder: Path) -> list[Path]:
    checks = armopt.Checks(min_cosine=-1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = _small()
        mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        kept = armopt.Output(folder / "kept", keep_reference=True)
        armopt.optimize(mlp, (torch.randn(2, 8),), output=kept, batch=(1, 4), checks=checks)
        armopt.optimize(model, inputs, output=folder / "small", checks=checks)
        armopt.optimize(
            Divided().eval(), [(torch.randn(3, 8),)], output=folder / "divided", kind="module", checks=checks
        )
    return [folder / name for name in ("kept", "small", "divided")]


def _zips(folder: Path) -> list[Path]:
    found = []
    for seed in _seeds(folder)[:2]:
        found.append(folder / f"{seed.name}.zip")
        zip_again(seed, found[-1], zipfile.ZIP_STORED)
    return found


def zip_again(folder: Path, path: Path, method: int) -> None:
    """Puts the files of a folder into a zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)


# --- reading ---


def _run(path: Path) -> object:
    read = reader.read(path, reference=True)
    loaded = load(path, model=Divided if read.manifest.is_module else None)
    if not isinstance(loaded, Model):
        try:
            return loaded(torch.zeros(3, 8))
        except (RuntimeError, TypeError) as error:  # of the model's own Python, on what a part gives
            raise InputError(str(error)) from error
    part, results = read.whole, []
    for program in part.programs:
        (named,) = samples.generated(part.signature.specs, program.bucket)
        tensors = [named[spec.name] for spec in part.signature.specs]
        loaded.check_inputs(tensors)
        results.append(loaded.run_flat(tensors))
    return results


#: Commands that read a bundle; which one follows from the input's bytes.
_COMMANDS: tuple[Callable[[str, str], list[str]], ...] = (
    lambda bundle, out: ["inspect", bundle],
    lambda bundle, out: ["inspect", bundle, "--json"],
    lambda bundle, out: ["env", bundle],
    lambda bundle, out: ["env", bundle, "--format", "docker"],
    lambda bundle, out: ["env", bundle, "--format", "systemd"],
    lambda bundle, out: ["env", bundle, "--format", "k8s"],
    lambda bundle, out: ["doctor", bundle],
    lambda bundle, out: ["package", bundle, "-o", out, "--no-hashes"],
    lambda bundle, out: ["validate", bundle],
    lambda bundle, out: ["validate", bundle, "--report", f"{out}.html"],
)


def _command(path: Path) -> object:
    content = (path / "graph.json").read_bytes() if (path / "graph.json").is_file() else b""
    manifest = (path / "manifest.json").read_bytes() if (path / "manifest.json").is_file() else b""
    words = _COMMANDS[sum(content[-64:] + manifest[:256]) % len(_COMMANDS)](str(path), str(path.parent / "out"))
    done = CliRunner().invoke(app.app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if any(ord(c) < 32 and c != "\n" for c in done.output):
        raise AssertionError(f"a control character on the terminal: {done.output!r:.500}")
    return done.output


# --- changing ---


def rehash(bundle: Path) -> None:
    """Makes all hashes right, where the manifest can be read at all."""
    try:
        content = json.loads((bundle / "manifest.json").read_bytes())
        present = {file.name: files.hash_file(file) for file in bundle.iterdir() if file.is_file()}
        if isinstance(content.get("files"), dict):
            content["files"] = {name: present.get(name, digest) for name, digest in content["files"].items()}
        (bundle / "manifest.json").write_bytes(hashed(content))
    except (ValueError, AttributeError, RecursionError, OSError):
        pass


def change_bundle(rng: random.Random, bundle: Path) -> None:
    """One to three changes of what a bundle says."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(10):
            case 0 | 1 | 2:
                _change_file(rng, bundle / "manifest.json")
            case 3:
                name = rng.choice(sorted(file.name for file in bundle.iterdir() if file.name != "manifest.json"))
                change_bytes(rng, bundle / name)
            case 4:
                change_weights(rng, bundle / "weights.safetensors")
            case 5 | 6:
                _change_file(rng, bundle / rng.choice(["graph.json", "reference.json", "report.json"]))
            case _:
                _change_graph(rng, bundle / "graph.json")
    rehash(bundle)


def change_zip(rng: random.Random, path: Path) -> None:
    """The same inside of a zip; or the zip itself."""
    if rng.random() < 0.3:
        path.write_bytes(changed(rng, path.read_bytes()))
        return
    folder = path.with_suffix("")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    change_bundle(rng, folder)
    zip_again(folder, path, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    if rng.random() < 0.3:
        path.write_bytes(changed(rng, path.read_bytes()))
    elif rng.random() < 0.2:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(rng.choice(("../up", "/abs", "a/b", "graph.json", "x" * 300)), b"more")
    shutil.rmtree(folder)


def change_weights(rng: random.Random, path: Path) -> None:
    """Changes the header of a file of tensors, and mends its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        header = {}
    change_json(rng, header)
    encoded = as_json(header)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def _change_file(rng: random.Random, path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
        change_json(rng, content)
        path.write_bytes(as_json(content))
    except (OSError, ValueError, RecursionError):
        pass


def _change_graph(rng: random.Random, path: Path) -> None:
    """A change that leaves a graph well-formed: another operation, a call more, another source, another order."""
    try:
        content = json.loads(path.read_bytes())
        program = rng.choice(rng.choice(content["parts"])["programs"])
        nodes = program["nodes"]
        calls = [node for node in nodes if node["op"] == "call"]
        match rng.randrange(6):
            case 0 | 1 | 2:
                at = rng.randrange(1, len(nodes) + 1)
                nodes.insert(at, _call(rng, f"more{rng.randrange(1000)}", [node["name"] for node in nodes[:at]]))
                if rng.random() < 0.7:
                    program["output"][rng.randrange(len(program["output"]))] = _ref(nodes[at]["name"])
            case 3:  # another source
                call = rng.choice(calls)
                refs = [i for i, arg in enumerate(call["args"]) if isinstance(arg, dict) and arg.get("kind") == "node"]
                call["args"][rng.choice(refs)] = _ref(rng.choice(nodes)["name"])
            case 4:  # another argument
                call = rng.choice([call for call in calls if call["args"]])
                change_json(rng, call["args"])
            case _:
                a, b = rng.choice(calls), rng.choice(calls)
                key = rng.choice(("target", "args", "shape", "output"))
                a[key], b[key] = b.get(key), a.get(key)
        path.write_bytes(as_json(content))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass


def _ref(name: str) -> dict[str, str]:
    return {"kind": "node", "name": name}


def _listed() -> list[torch._ops.OpOverload]:
    packets = [getattr(torch.ops.aten, name) for name in sorted(operations.ATEN) if hasattr(torch.ops.aten, name)]
    found = []
    for packet in packets:
        for overload in packet.overloads():
            try:
                operations.name_of(getattr(packet, overload))
            except operations.UnlistedError:
                continue
            found.append(getattr(packet, overload))
    return found


LISTED = _listed()
_DTYPES = ("float32", "bfloat16", "int64", "bool", "uint8", "int32", "float64", "complex64", "float16", "int8")
_MODES = ("none", "tanh", "reflect", "constant", "mean", "sum", "floor", "trunc", "same", "bi,bj->ij", "ij,jk", "")


def _call(rng: random.Random, name: str, known: list[str]) -> dict[str, Any]:
    """A call of a listed operation with arguments of its schema."""
    operation = rng.choice(LISTED)
    args, kwargs = [], {}
    for each in operation._schema.arguments:
        if each.has_default_value() and rng.random() < 0.6:
            if not each.kwarg_only:
                break
            continue
        value = _argument(rng, str(each.type), known)
        if each.kwarg_only:
            kwargs[each.name] = value
        else:
            args.append(value)
    return {"name": name, "op": "call", "target": str(operation), "args": args, "kwargs": kwargs}


def _argument(rng: random.Random, kind: str, known: list[str]) -> Any:
    if kind.startswith("Optional"):
        return None if rng.random() < 0.5 else _argument(rng, kind[9:-1], known)
    if kind.startswith("List"):
        return [_argument(rng, kind[5:-1], known) for _ in range(rng.choice((0, 1, 2, 2, 3, 4)))]
    match kind:
        case "Tensor":
            return _ref(rng.choice(known))
        case "bool":
            return rng.random() < 0.5
        case "float" | "number" | "Scalar":
            return rng.choice((0.0, 1.0, 0.5, -1.0, 2, 1e30, {"kind": "float", "name": rng.choice(("inf", "nan"))}))
        case "str":
            return rng.choice(_MODES)
        case "Device":
            return {"kind": "device", "name": "cpu"}
        case "int" | "SymInt":
            small = (0, 1, 1, 2, 2, 3, 4, 8, 16, -1, -2)
            return rng.choice(small) if rng.random() < 0.85 else rng.choice(NUMBERS)
    return rng.choice((0, 1, 6, None, {"kind": "dtype", "name": rng.choice(_DTYPES)}))


READERS = {
    each.name: each
    for each in (
        Reader("bundle", _seeds, _run, change_bundle),
        Reader("bundle in a zip", _zips, _run, change_zip, share=2),
        Reader("commands on a bundle", _seeds, _command, change_bundle, share=1),
    )
}
