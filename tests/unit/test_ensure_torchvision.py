"""torchvision beside a build of torch that its compiled operators don't fit: each in a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from armopt.models import torchvision_ops

torchvision_ops.ensure_torchvision()

import torchvision  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, cwd: Path = ROOT, path: str = str(ROOT)) -> str:
    start = f"import sys; sys.path[:0] = {path.split(':')!r}\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestEnsureTorchvision:
    @pytest.mark.full  # this file does it too, in the process of its tests
    def test_before_torchvision(self) -> None:
        code = """
from armopt.models.torchvision_ops import ensure_torchvision
ensure_torchvision(); ensure_torchvision()
import torch, torchvision
print(torchvision.ops.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), .5).tolist())
"""
        assert run_python(code) == "[0]"

    def test_after_a_failed_import_and_for_transformers(self) -> None:
        code = """
import contextlib
with contextlib.suppress(Exception):
    import torchvision
with contextlib.suppress(Exception):
    from transformers import ViTModel
from armopt.models.torchvision_ops import ensure_torchvision
ensure_torchvision()
import torchvision
from torchvision.ops import nms
from transformers import ViTModel
import transformers.image_utils
print(ViTModel.__name__, torchvision.models.resnet18.__name__)
"""
        assert run_python(code) == "ViTModel resnet18"

    @pytest.mark.full
    def test_from_many_threads(self) -> None:
        code = """
import threading
from armopt.models.torchvision_ops import ensure_torchvision
failed = []
def call():
    try:
        ensure_torchvision()
        import torchvision
        torchvision.models.resnet18
    except Exception as error:
        failed.append(error)
threads = [threading.Thread(target=call) for _ in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(failed)
"""
        assert run_python(code) == "[]"

    @pytest.mark.full
    def test_leaves_working_operators_alone(self, tmp_path: Path) -> None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("from . import extension\n")
        (package / "extension.py").write_text("def _has_ops(): return True\n")
        code = """
from armopt.models import torchvision_ops
torchvision_ops.ensure_torchvision()
import torch
print(torchvision_ops._OPERATORS.library, hasattr(torch.ops.torchvision, "nms"))
"""
        assert run_python(code, path=f"{tmp_path}:{ROOT}") == "None False"

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            ("raise ValueError('torn page')", "torn page"),
            pytest.param("import not_there", "not_there", marks=pytest.mark.full),
        ],
    )
    def test_another_failure_is_told(self, tmp_path: Path, broken: str, message: str) -> None:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(broken + "\n")
        code = """
from armopt.models.torchvision_ops import ensure_torchvision
from armopt.errors import InputError
try:
    ensure_torchvision()
except InputError as error:
    print(error)
"""
        told = run_python(code, path=f"{tmp_path}:{ROOT}")
        assert message in told
        assert "Reinstall" in told

    def test_not_installed(self) -> None:
        code = """
import sys
sys.modules["torchvision"] = None
from armopt.models.references import resolve
from armopt.errors import InputError
try:
    resolve("torchvision:resnet18")
except InputError as error:
    print(error)
"""
        assert "torchvision is not installed" in run_python(code)

    def test_rare_operators_keep_torchvisions_error(self) -> None:
        if torchvision.extension._has_ops():
            pytest.skip("the compiled operators work here")
        with pytest.raises(RuntimeError, match="custom C\\+\\+ ops"):
            torchvision.ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)


def test_what_one_thread_made_ready_is_ready_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_ops.ensure_torchvision()
    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imported.append)
    thread = threading.Thread(target=torchvision_ops.ensure_torchvision)
    thread.start()
    thread.join()
    assert imported == []
