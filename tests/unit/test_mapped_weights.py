"""Tensors over a mapped file: the same as safetensors' own; and copies of them, which no change of the file reaches."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import armopt
from armopt.bundle import codec
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


def test_a_copy_is_made_once_as_long_as_it_lives(file: Path) -> None:
    mapped = MappedTensors(file)
    stored = mapped.tensors["torch.float32"]
    copy = mapped.copy(stored)
    assert torch.equal(copy, stored)
    assert copy.data_ptr() != stored.data_ptr()
    assert mapped.copy(stored).data_ptr() == copy.data_ptr()
    view = copy.view(-1)  # what keeps the memory, and not the tensor, counts
    del copy
    assert mapped.copy(stored).data_ptr() == view.data_ptr()
    assert mapped.copy(view) is view
    for name, tensor in mapped.tensors.items():
        assert torch.equal(mapped.copy(tensor).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )


def test_a_file_that_was_cut_short_is_an_error_and_no_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"large": torch.ones(1 << 16)}, path)
    mapped = MappedTensors(path)
    os.truncate(path, 4096)
    with pytest.raises(BundleError, match="was changed while it was read"):
        mapped.copy(mapped.tensors["large"])
    with pytest.raises(BundleError, match="was changed while it was read"):
        mapped.check_unchanged()


@pytest.mark.parametrize("kind", ["mlp_bundle", "host_bundle"])
@pytest.mark.parametrize("how", ["cut short", "written to"])
@pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")
def test_no_change_of_the_file_reaches_a_loaded_model(
    kind: str, how: str, tmp_path: Path, mlp_inputs: tuple[torch.Tensor, ...], request: pytest.FixtureRequest
) -> None:
    """On the target and where twins run."""
    path = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "bundle")) / "weights.safetensors"
    loaded = armopt.load(path.parent)
    expected = loaded(*mlp_inputs)
    with path.open("r+b") as file:
        if how == "written to":
            file.write(b"\xff" * path.stat().st_size)
        else:
            file.truncate(0)
    assert torch.equal(loaded(*mlp_inputs)["logits"], expected["logits"])


@pytest.mark.filterwarnings("ignore::armopt.errors.ArmoptWarning")
@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors"])
def test_a_change_while_it_is_read_is_an_error(
    name: str, mlp_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(mlp_bundle, tmp_path / "bundle"))
    os.utime(bundle / name, (1, 1))
    decode = codec.decode

    def written_to_meanwhile(*args: Any) -> Any:
        (bundle / name).open("ab").write(b"x")
        return decode(*args)

    monkeypatch.setattr(codec, "decode", written_to_meanwhile)
    with pytest.raises(BundleError, match="was changed while it was read") as caught:
        armopt.load(bundle)
    assert caught.value.where == str(bundle / name)


@linux_only
def test_loading_reads_no_weight_through_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And holds few copies at a time, of layers and of what is kept as it is stored (embeddings), for every bucket."""
    layers, width = 8, 512
    parts = [torch.nn.Embedding(4 * width, width), *[torch.nn.Linear(width, width) for _ in range(layers)]]
    path = tmp_path / "bundle" / "weights.safetensors"
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    armopt.optimize(torch.nn.Sequential(*parts).eval(), (tokens,), output=path.parent, target="host", batch=(1, 16))
    read, modules = [], []
    for place, name in ((bind.Binder, "bind"), (runtime, "Model")):
        whole = getattr(place, name)

        def watched(*args: Any, whole: Any = whole, **options: Any) -> Any:
            read.append(in_memory(path))
            result = whole(*args, **options)
            read.append(in_memory(path))
            modules.extend(result[:1] if isinstance(result, tuple) else ())
            return result

        monkeypatch.setattr(place, name, watched)
    loaded = armopt.load(path.parent)
    assert max(read) <= 1 << 16  # the pages that the system reads with one of the header
    assert str(path) not in Path("/proc/self/maps").read_text()
    storages = {tensor.untyped_storage().data_ptr() for module in modules for tensor in _tensors_of(module)}
    assert 0 < len(storages) <= 1 + 3 * layers  # the embedding, biases and one packed weight of each layer, shared
    assert len(modules) == len(loaded.kernels) == 2


def _tensors_of(module: torch.fx.GraphModule) -> list[torch.Tensor]:
    values = vars(module).values()
    return [value for value in values if isinstance(value, torch.Tensor) and value.layout is torch.strided]


def test_weights_of_what_stays_python_are_copies(file: Path) -> None:
    """Of a bundle of kind "module"."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    copied: list[torch.Tensor] = []
    rest = {f"1.{name}": tensor + 1 for name, tensor in model[1].state_dict().items()}
    bundle: Any = SimpleNamespace(path="here", rest=rest, copy=lambda tensor: copied.append(tensor) or tensor)
    made = module.assemble(bundle, lambda: model, {"0": lambda x: x})
    assert [id(tensor) for tensor in copied] == [id(tensor) for tensor in rest.values()]
    assert made(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([-1, 3], abs=1e-4)
