"""Tensors over a mapped file: the same as safetensors' own, gone from memory when released, back when read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import armopt
from armopt.bundle.mapped_weights import MappedTensors
from armopt.errors import BundleError
from armopt.runtime import bind, module
from armopt.runtime import load as runtime

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def in_memory(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    mapping = re.search(rf"{re.escape(str(path))}\n.*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.DOTALL)
    return 1024 * int(mapping[1]) if mapping else 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {str(dtype): torch.arange(1, 7).view(3, 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "file", metadata={"made": "here"})
    return tmp_path / "file"


def test_they_are_what_safetensors_reads(file: Path) -> None:
    expected, found = load_file(file), MappedTensors(file).tensors
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff",
        b"[]",
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"w": {"shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_a_wrong_header_is_an_error(tmp_path: Path, header: Any) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
    with pytest.raises(BundleError) as caught:
        MappedTensors(tmp_path / "file")
    assert caught.value.where == str(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"\1", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(BundleError):
        MappedTensors(tmp_path / "file")


@linux_only
def test_a_released_tensor_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"large": torch.full((1 << 20,), 3.0), "small": torch.full((3,), 4.0)}, path)
    mapped = MappedTensors(path)
    large, small = mapped.tensors["large"], mapped.tensors["small"]
    assert large.sum() == 3 << 20
    assert in_memory(path) >= large.nbytes
    mapped.release(large)
    assert in_memory(path) <= 1 << 16  # the pages that the system reads with one of the header
    path.unlink()
    path.write_bytes(b"another file")
    assert large.sum() == 3 << 20
    assert small.tolist() == [4.0] * 3


def test_what_is_not_of_the_file_can_be_released(file: Path) -> None:
    other = torch.ones(1 << 16)
    MappedTensors(file).release(other)
    assert other.sum() == 1 << 16


@linux_only
def test_loading_holds_few_stored_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and what is kept as it is stored (embeddings) leave memory while others are packed, for every bucket."""
    layers, width = 8, 512
    parts = [torch.nn.Embedding(4 * width, width), *[torch.nn.Linear(width, width) for _ in range(layers)]]
    path = tmp_path / "bundle" / "weights.safetensors"
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    armopt.optimize(torch.nn.Sequential(*parts).eval(), (tokens,), output=path.parent, target="host", batch=(1, 16))
    most = 0
    for place, name in ((bind, "_replace"), (runtime, "_leave_file")):
        whole = getattr(place, name)

        def watched(*args: Any, whole: Any = whole) -> Any:
            nonlocal most
            result = whole(*args)
            most = max(most, in_memory(path))
            return result

        monkeypatch.setattr(place, name, watched)
    armopt.load(path.parent)
    assert 0 < most < path.stat().st_size / 4


def test_weights_of_what_stays_python_are_released_too() -> None:
    """Of a bundle of kind "module": the model has copied them."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    released: list[torch.Tensor] = []
    rest = {f"1.{name}": tensor + 1 for name, tensor in model[1].state_dict().items()}
    bundle: Any = SimpleNamespace(path="here", rest=rest, release=released.append)
    made = module.assemble(bundle, lambda: model, {"0": lambda x: x})
    assert [id(tensor) for tensor in released] == [id(tensor) for tensor in rest.values()]
    assert made(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([-1, 3], abs=1e-4)
