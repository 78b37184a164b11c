"""Model files, example inputs and images: their bytes, and what is in them with checksums made right."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from armopt.accuracy import images
from armopt.capture import files, inputs, sample_files
from tests.fuzz.mutations import NUMBERS, TEXTS, as_json, change_json, changed
from tests.fuzz.reader import Reader


class Small(nn.Module):
    """A convolution, a linear layer, a buffer, a constant and arithmetic on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.shift = torch.arange(2.0)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.conv(x)).relu_()
        with torch.no_grad():
            pooled = nn.functional.max_pool2d(x, 2)
        y = x.mean((2, 3)).view(x.shape[0] * 2, -1).reshape(-1, 4)
        return {"y": self.head(y) * self.scale + self.shift, "more": [pooled, torch.cat([y, y])]}


class Scripted(nn.Module):
    """A loop, a branch, a default, attributes of most kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout())
        self.sizes, self.name, self.table, self.pair = [1, 2], "a", {"a": 1}, (1, 2.5)
        self.register_buffer("shift", torch.ones(4))

    def step(self, x: torch.Tensor, times: int = 2, mode: str = "a") -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for i in range(times):
            x = self.first(x) + i
            found.append(x)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat(self.step(x), 0) + self.shift
        return torch.nn.functional.softmax(self.act(x), 1)


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).eval()


_STATE = files.Options(model=f"{__name__}:factory")
_X = (inputs.parse("2x4"),)


# --- seeds ---


def _pt2(folder: Path) -> list[Path]:
    x, auto = torch.zeros(2, 3, 9, 8), torch.export.Dim.AUTO
    dynamic = torch.export.export(Small().eval(), (x,), dynamic_shapes={"x": {0: auto, 2: auto}})
    fixed = torch.export.export(factory(), (torch.zeros(2, 4),))
    torch.export.save(dynamic, folder / "dynamic.pt2")
    torch.export.save(fixed, folder / "fixed.pt2")
    return [folder / "dynamic.pt2", folder / "fixed.pt2"]


def _torchscript(folder: Path) -> list[Path]:
    script: Any = torch.jit.script(Scripted().eval())
    script.save(str(folder / "script.pt"))
    torch.jit.trace(factory(), torch.zeros(2, 4)).save(str(folder / "trace.pt"))
    return [folder / "script.pt", folder / "trace.pt"]


def _state_dicts(folder: Path) -> list[Path]:
    state = factory().state_dict()
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "stream.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 1, "lr": [0.1], "state_dict": state}, folder / "checkpoint.pt")
    return [folder / "zip.pt", folder / "stream.pt", folder / "checkpoint.pt"]


def _safetensors(folder: Path) -> list[Path]:
    save_file(factory().state_dict(), folder / "state.safetensors", metadata={"format": "pt"})
    return [folder / "state.safetensors"]


def _samples(folder: Path) -> list[Path]:
    x = torch.arange(8.0).reshape(2, 4)
    np.savez(folder / "stored.npz", x=x.numpy(), ids=np.arange(3))
    np.savez_compressed(folder / "packed.npz", x=np.asfortranarray(x.numpy()))
    torch.save({"x": x}, folder / "x.pt")
    save_file({"x": x}, folder / "x.safetensors")
    return sorted(folder.iterdir())


def _images(folder: Path) -> list[Path]:
    pixels = np.arange(32 * 24 * 3, dtype=np.uint8).reshape(32, 24, 3)
    for suffix in images.SUFFIXES:
        Image.fromarray(pixels).save(folder / f"image{suffix}")
    Image.fromarray(pixels[:, :, 0]).convert("P").save(folder / "palette.png")
    return sorted(folder.iterdir())


# --- changes that leave an archive an archive ---


def _change_zip(rng: random.Random, path: Path) -> None:
    path.write_bytes(_changed_zip(rng, path.read_bytes()))


def _changed_zip(rng: random.Random, data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # since the change before
        return changed(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        kinds = set(map(_kind, members))
        kind = rng.choice(sorted(kinds))
        name = rng.choice([each for each in members if _kind(each) == kind])
        match rng.randrange(16):
            case 0:
                del members[name]
            case 1:
                members[rng.choice((*members, *TEXTS, f"{name}x", "data/x", "../x")) or "x"] = members.pop(name)
            case 2:
                members[name] = members[rng.choice(list(members))]
            case _:
                members[name] = _CHANGES.get(kind, changed)(rng, members[name])
        if not members:
            break
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("\0", "") or "x", content)
    return out.getvalue()


def _kind(name: str) -> str:
    return Path(name).suffix if Path(name).suffix in (".json", ".py", ".pkl", ".pt", ".npy") else "bytes"


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # since the change before
        return changed(rng, data)
    for _ in range(rng.choice((1, 1, 3))):
        with contextlib.suppress(RecursionError):  # of what nests deeply since the change before
            change_json(rng, content)
    return as_json(content)


_WORDS = (
    *("torch.save", "ops.aten.save", "torch.from_file", "self", "x", "None", "1", "-1", "1000000000000", "inf", '"a"'),
    *("torch.add", "torch.zeros", "torch.mul", "ops.prim.RaiseException", "range", "__setstate__", "forward", "pass"),
    *("Tensor", "int", "List[int]", "__torch__.torch.classes.x", "while True:", "return", "1.5", "[]", "{}", "()"),
)


def _changed_code(rng: random.Random, data: bytes) -> bytes:
    """Words for words, lines for lines."""
    if rng.random() < 0.4:
        lines = data.split(b"\n")
        here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[here] = rng.choice((b"", lines[there], lines[here] + b"\n" + lines[there]))
        return b"\n".join(lines)
    words = re.split(r"([\w.]+)", data.decode(errors="replace"))
    at = rng.randrange(1, len(words), 2) if len(words) > 2 else 0
    words[at] = rng.choice((*_WORDS, words[rng.randrange(1, len(words), 2)] if len(words) > 2 else ""))
    return "".join(words).encode()


def _changed_pickle(rng: random.Random, data: bytes) -> bytes:
    """Opcodes for opcodes, and their numbers and names."""
    try:
        found = list(pickletools.genops(data))
    except (ValueError, IndexError):  # since the change before
        return changed(rng, data)
    ends = [position for _, _, position in found[1:]] + [len(data)]
    parts = [data[position:end] for (_, _, position), end in zip(found, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        match rng.randrange(8):
            case 0:
                del parts[at]
            case 1 | 2:
                parts[at] = rng.choice(parts)
            case 3:
                parts.insert(at, rng.choice(parts))
            case 4:
                number = rng.choice(NUMBERS) % (1 << 63)
                parts[at] = b"\x8a\x08" + number.to_bytes(8, "little")
            case 5:
                parts[at] = b"c" + rng.choice(
                    (b"os\nsystem\n", b"torch\nload\n", b"__torch__\nX\n", b"torch\nfloat64\n")
                )
            case 6:
                text = rng.choice((*TEXTS, "0", "storage", "Dict[str, int]", "cuda")).encode(errors="surrogatepass")
                parts[at] = b"X" + struct.pack("<I", len(text)) + text
            case _:
                parts[at] = changed(rng, parts[at])
        if not parts:
            break
    return b"".join(parts)


_CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": _changed_json,
    ".py": _changed_code,
    ".pkl": _changed_pickle,
    ".pt": _changed_zip,
}


def _change_state(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if data[:2] == b"PK":
        _change_zip(rng, path)
        return
    end = max(0, data.rfind(b".", 0, len(data) - 64)) + 1
    head = rng.randrange(2)
    path.write_bytes(_changed_stream(rng, data) if head else changed(rng, data[:end]) + data[end:])


def _changed_stream(rng: random.Random, data: bytes) -> bytes:
    """One of the pickles of the form before zip files."""
    at, parts = 0, []
    for _ in range(5):
        end = max(position for _, _, position in pickletools.genops(data[at:])) + 1
        parts.append(data[at : at + end])
        at += end
    which = rng.choice((2, 3, 3, 3, 4))
    parts[which] = _changed_pickle(rng, parts[which])
    return b"".join(parts) + data[at:]


def _change_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = _changed_json(rng, data[8 : 8 + size])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def _change_sample(rng: random.Random, path: Path) -> None:
    if path.suffix == ".safetensors":
        _change_safetensors(rng, path)
    elif path.suffix == ".pt":
        _change_state(rng, path)
    else:
        _change_zip(rng, path)


# --- reading ---


def _capture(path: Path) -> object:
    given = () if path.suffix == ".pt2" else _X
    return files.open_model(path, files.Options(inputs=given))


def _module(path: Path) -> object:
    return files.build(path, _STATE)


READERS = {
    reader.name: reader
    for reader in (
        Reader("pt2", _pt2, _capture, _change_zip, share=1),
        Reader("torchscript", _torchscript, _capture, _change_zip, share=1),
        Reader("state_dict", _state_dicts, _module, _change_state),
        Reader("safetensors", _safetensors, _module, _change_safetensors),
        Reader("samples", _samples, sample_files.read, _change_sample),
        Reader("images", _images, images.open_image, None),
    )
}
