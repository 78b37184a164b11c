"""After `pip install`, torch.compile knows the backend by name and nobody imports armopt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
assert "armopt" in torch._dynamo.list_backends()
assert "armopt" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
x = torch.randn(3, 64)
with torch.no_grad():
    found = torch.compile(model, backend="armopt", options={"target": "graviton3"})(x)
    expected = model(x)
assert torch.allclose(found, expected, atol=0.02) and not torch.equal(found, expected)
print(sys.modules["armopt"].__file__)
"""


def run_script(folder: Path, **variables: str) -> str:
    words, env = [sys.executable, "-c", SCRIPT], {**os.environ, **variables}
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_backend_is_known_by_name(tmp_path: Path) -> None:
    """In the environment that tests run in: armopt is installed there, in place."""
    assert run_script(tmp_path).endswith("armopt/__init__.py")


@pytest.mark.full
def test_the_backend_is_known_by_name_after_an_install(tmp_path: Path) -> None:
    site = tmp_path / "site"
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    copied = tmp_path / "source"  # a build leaves folders behind
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if name.startswith(("armopt", "passes", "pyproject", "README")):
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (copied / name).symlink_to(os.readlink(ROOT / name))
            else:
                (copied / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(copied)], check=True)
    assert run_script(tmp_path, PYTHONPATH=str(site)).startswith(str(site))
