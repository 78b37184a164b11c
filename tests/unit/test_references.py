"""What `--model` names: torchvision's models and the user's own factories."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from armopt.errors import InputError
from armopt.models import references


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


class TestResolve:
    def test_torchvision_without_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a download")

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
        for name in ("mobilenet_v3_small", "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"):
            assert isinstance(references.resolve(f"torchvision:{name}")(), nn.Module)

    def test_each_call_builds_a_model(self) -> None:
        factory = references.resolve("torchvision:squeezenet1_1")
        assert factory() is not factory()

    @pytest.mark.filterwarnings("error")
    def test_googlenet_does_not_warn(self) -> None:
        assert isinstance(references.resolve("torchvision:googlenet")(), nn.Module)

    def test_package_function_class_instance_and_nested(self, folder: Path) -> None:
        (folder / "zoo_case_good.py").write_text(
            "from torch import nn\n"
            "def build(): return nn.Linear(2, 3)\n"
            "class Net(nn.Identity): pass\n"
            "ready = nn.Linear(4, 5)\n"
            "class Models:\n    build = staticmethod(build)\n"
        )
        assert references.resolve("zoo_case_good:build")().weight.shape == (3, 2)
        assert type(references.resolve("zoo_case_good:Net")()).__name__ == "Net"
        assert references.resolve("zoo_case_good:ready")().weight.shape == (5, 4)
        assert references.resolve("zoo_case_good:Models.build")().weight.shape == (3, 2)

    @pytest.mark.parametrize(
        ("reference", "parts"),
        [
            ("resnet50", ["not a reference", "torchvision:NAME"]),
            ("torchvision/resnet50", ["not a reference"]),
            ("module:", ["not a reference"]),
            (":factory", ["not a reference"]),
            ("torchvision:resnet55", ["no model 'resnet55'", "Did you mean", "resnet5"]),
            ("torchvision:zzzz", ["no model 'zzzz'", "list_models()"]),
            ("no_such_package_x:build", ["no module 'no_such_package_x'", "Install"]),
            ("torch.no_such_part:build", ["no module 'torch.no_such_part'"]),
            ("torch.nn:Linaer", ["no 'Linaer' in torch.nn", "Did you mean", "Linear"]),
            ("math:pi", ["a float is not a factory"]),
        ],
    )
    def test_names_nothing(self, reference: str, parts: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            references.resolve(reference)
        assert caught.value.hint
        for part in [reference, *parts]:
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("import not_installed_x", "needs the module 'not_installed_x'"),
            ("1 / 0", "raised ZeroDivisionError"),
            ("def build(:", "raised SyntaxError"),
        ],
    )
    def test_module_that_does_not_import(self, folder: Path, source: str, message: str) -> None:
        (folder / "zoo_case_broken.py").write_text(source)
        with pytest.raises(InputError, match=message):
            references.resolve("zoo_case_broken:build")

    def test_factory_that_fails_or_returns_something_else(self, folder: Path) -> None:
        (folder / "zoo_case_bad.py").write_text(
            "def needs(size): ...\ndef fails(): raise ValueError('no luck')\ndef other(): return {'w': 1}\n"
        )
        for name, message in (
            ("needs", "raised TypeError"),
            ("fails", "ValueError: no luck"),
            ("other", "returned a dict, not an nn.Module"),
        ):
            with pytest.raises(InputError, match=message) as caught:
                references.resolve(f"zoo_case_bad:{name}")()
            assert caught.value.where == f"zoo_case_bad:{name}"
