"""What both sides run on: files, folders, images, generated numbers; and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import armopt
from armopt.accuracy import images, samples
from armopt.capture import inputs
from armopt.errors import InputError
from armopt.ir.records import ExampleSpec, InputSpec, Statistics

SPECS = [InputSpec("x", ("batch", 16), "float32"), InputSpec("scale", (8,), "float32")]
IMAGE = [InputSpec("x", (2, 3, 28, 56), "float32")]
TENSORS = {"x": torch.rand(3, 16), "scale": torch.rand(8)}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_a_file_of_tensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"inputs{suffix}"
    _save(path, TENSORS)
    found = samples.read(path, SPECS, "")
    (only,) = found
    assert found.given
    assert found.said == str(path)
    assert all(torch.equal(only[name], tensor) for name, tensor in TENSORS.items())


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, path)


def test_a_folder_of_files_is_read_one_by_one(tmp_path: Path) -> None:
    for i in range(3):
        _save(tmp_path / f"{i}.npz", TENSORS | {"x": torch.full((2, 16), float(i))})
    found = samples.read(tmp_path, SPECS, "")
    assert [float(each["x"][0, 0]) for each in found] == [0.0, 1.0, 2.0]
    assert found.said == f"{tmp_path} (3 files)"
    (tmp_path / "1.npz").write_bytes(b"broken")
    loaded = iter(found)
    next(loaded)
    with pytest.raises(InputError, match=r"1\.npz"):
        next(loaded)


def test_more_rows_than_a_fixed_batch_are_several_samples() -> None:
    specs = [InputSpec("x", (2, 4), "float32")]
    x = torch.arange(24.0).reshape(6, 4)
    found = samples.read({"x": x}, specs, "")
    assert len(found) == 3
    assert torch.equal(torch.cat([each["x"] for each in found]), x)
    assert found.said == "given as tensors (3 samples)"
    with pytest.raises(InputError, match="input x is 5x4 float32, the model takes 2x4 float32"):
        samples.read({"x": x[:5]}, specs, "")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": TENSORS["x"]}, "lacks scale.*takes x, scale"),
        (TENSORS | {"y": TENSORS["x"]}, "takes no input 'y'.*x, scale"),
        (TENSORS | {"x": torch.zeros(3, 15)}, "input x is 3x15 float32, the model takes batchx16 float32"),
        (TENSORS | {"x": torch.zeros(16)}, "input x is 16 float32"),
        (TENSORS | {"x": torch.zeros(3, 16, dtype=torch.int64)}, "input x is 3x16 int64"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        samples.read(tensors, SPECS, "")


def _photo(path: Path, size: tuple[int, int] = (90, 60), colour: tuple[int, int, int] = (255, 0, 0)) -> None:
    Image.new("RGB", size, colour).save(path)


def test_a_folder_of_images(tmp_path: Path) -> None:
    for i, suffix in enumerate((".jpg", ".png", ".JPEG", ".webp")):
        _photo(tmp_path / f"{i}{suffix}", colour=(255, 0, 0) if i < 2 else (0, 0, 255))
    found = samples.read(tmp_path, IMAGE, "")
    assert len(found) == 2
    assert "(4 images; prepared as for ImageNet: shorter side to 32, cut to 28x56" in found.said
    first, second = found
    assert first["x"].shape == (2, 3, 28, 56)
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(first["x"].mean((0, 2, 3)), red, atol=0.05)  # JPEG's colours are near
    assert second["x"][0, 2].mean() > second["x"][0, 0].mean()
    assert [path.name for path in found.pictures] == ["0.jpg", "2.JPEG"]
    _photo(tmp_path / "5.png")
    assert "(4 images of 5, as the model takes 2 at a time; " in samples.read(tmp_path, IMAGE, "").said


def test_images_are_prepared_as_torchvisions_weights_want(tmp_path: Path) -> None:
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    from torchvision.models import ResNet50_Weights

    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    specs = [InputSpec("x", (1, 3, 224, 224), "float32")]
    found = samples.read(tmp_path, specs, "torchvision:resnet50")
    assert "prepared as torchvision's weights of resnet50 are" in found.said
    expected = ResNet50_Weights.IMAGENET1K_V1.transforms()(Image.open(tmp_path / "a.png"))
    (only,) = found
    assert torch.equal(only["x"][0], expected)
    # another size than those weights': ImageNet's way at the model's size
    other = samples.read(tmp_path, [InputSpec("x", (1, 3, 64, 64), "float32")], "torchvision:resnet50")
    assert "cut to 64x64" in other.said


def test_imagenets_way_is_torchvisions(tmp_path: Path) -> None:
    """Own code, so that no torchvision is needed where a model has none: within a step of eight bits of it."""
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    from torchvision.transforms import v2

    gradient = np.linspace(0, 255, 300 * 400 * 3).reshape(300, 400, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "a.png")
    spec = InputSpec("x", (1, 3, 224, 224), "float32")
    found = images.preparation(spec, "").read(tmp_path / "a.png")
    way = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    expected = way(Image.open(tmp_path / "a.png"))
    assert (images.unprepare(found) - expected).abs().mean() < 1 / 255


def test_phones_turn_their_pictures(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert images.open_image(tmp_path / "a.jpg").size == (20, 40)


def test_folders_that_can_not_be_used(tmp_path: Path, mlp_bundle: Path) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    with pytest.raises(InputError, match=rf"{folder}: holds no images and no tensors.*\.jpg"):
        samples.read(folder, IMAGE, "")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no images and no tensors"):
        samples.read(folder, IMAGE, "")
    _photo(folder / "a.jpg")
    with pytest.raises(InputError, match="holds 1 images, the model takes 2 at a time"):
        samples.read(folder, IMAGE, "")
    with pytest.raises(InputError, match=r"images don't fit the model's inputs \(x, scale\)"):
        armopt.validate(mlp_bundle, inputs=folder)
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    with pytest.raises(InputError, match=r"b\.jpg: is no image that can be read"):
        list(samples.read(folder, IMAGE, ""))
    _save(folder / "c.npz", TENSORS)
    with pytest.raises(InputError, match="holds images and tensors both"):
        samples.read(folder, IMAGE, "")
    with pytest.raises(InputError, match="no such file"):
        samples.read(tmp_path / "none", IMAGE, "")


def test_generated_inputs_have_the_examples_statistics() -> None:
    generator = torch.Generator().manual_seed(1)
    examples = {
        "pixels": torch.rand(64, 64, generator=generator) * 255,
        "ids": torch.randint(3, 30522, (64, 64), generator=generator),
        "mask": torch.ones(64, 64, dtype=torch.int64),
        "keep": torch.ones(64, 64, dtype=torch.bool),
        "bias": torch.tensor([0.0, -torch.inf]).repeat(64, 32),
    }
    specs = [
        ExampleSpec(name, ("batch", 64), str(tensor.dtype).removeprefix("torch."), inputs.statistics(tensor))
        for name, tensor in examples.items()
    ]
    found = samples.generated(specs, {"batch": 128})
    (only,) = found
    assert "mean, spread and range of the example inputs" in found.said
    assert not found.given
    assert {name: (tuple(t.shape), t.dtype) for name, t in only.items()} == {
        name: ((128, 64), tensor.dtype) for name, tensor in examples.items()
    }
    assert abs(float(only["pixels"].mean() - examples["pixels"].mean())) < 5
    assert 0 <= float(only["pixels"].min()) <= float(only["pixels"].max()) <= 255
    assert 3 <= int(only["ids"].min()) < 100
    assert 30000 < int(only["ids"].max()) < 30522
    assert (only["mask"] == 1).all()
    assert only["keep"].all()
    assert (only["bias"] == 0).all()
    again = samples.generated(specs, {"batch": 128})
    assert all(torch.equal(a, b) for a, b in zip(only.values(), next(iter(again)).values(), strict=True))
    plain = samples.generated(SPECS, {"batch": 4})
    assert plain.said == "generated: seeded random numbers, normal, or integers below two"


def test_a_range_beyond_integers_ends_where_they_do() -> None:
    spec = ExampleSpec("ids", (4,), "int64", Statistics(mean=0.0, std=1.0, min=-1e30, max=1e30))
    assert inputs.like(spec, {}, torch.Generator()).shape == (4,)
    spec = ExampleSpec("ids", (4,), "int64", Statistics(mean=1e30, std=1.0, min=1e30, max=1e30))
    assert inputs.like(spec, {}, torch.Generator()).shape == (4,)


def test_an_error_names_the_file_and_no_option(tmp_path: Path) -> None:
    """Which of optimize's --check-inputs and validate's --inputs gave it is not known here."""
    path = tmp_path / "bad.safetensors"
    _save(path, {"x": TENSORS["x"]})
    with pytest.raises(InputError, match=rf"^{path}: lacks scale\. The model takes x, scale$"):
        list(samples.read(path, SPECS, ""))
