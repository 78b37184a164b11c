"""All inputs are checked in one call of C; what that does not know is looked at one by one, and may be taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import armopt
from armopt.errors import InputError
from armopt.runtime import guards

pytestmark = pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")


class Named(torch.Tensor):
    """A tensor of somebody's own class."""


def test_plain_tensors_pass_however_they_lie() -> None:
    check = guards.of([("x", (2, "n"), torch.float32), ("y", (), torch.int64)])
    assert check is not None
    number = torch.tensor(1)
    assert check(torch.zeros(2, 3), number)
    assert check(torch.zeros(3, 2).mT, number)
    assert check(torch.zeros(2, 0), number)
    for x, n in (
        (torch.zeros(3, 2), number),
        (torch.zeros(2, 3, dtype=torch.float64), number),
        (torch.zeros(2, 3, device="meta"), number),
        (torch.zeros(2, 3).to_sparse(), number),
        (torch.zeros(2), number),
        (torch.zeros(2, 3), 1),
    ):
        assert not check(x, n)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + y

    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    path = tmp_path_factory.mktemp("guards") / "bundle"
    armopt.optimize(Net().eval(), inputs, output=path, target="host")
    return path


@pytest.fixture(scope="module")
def model(bundle: Path) -> armopt.Model:
    return armopt.load(bundle)


def test_other_tensors_run_too(model: armopt.Model) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    wanted = torch.relu(x) + y
    with torch.inference_mode():
        born_in_inference = x.clone()
    for other in (
        x.as_subclass(Named),
        nn.Parameter(x),
        born_in_inference,
        torch._neg_view(-x),
        x.mT.contiguous().mT,
    ):
        assert torch.equal(model(other, y), wanted)
        assert torch.equal(model(y=y, x=other), wanted)


def test_what_is_wrong_is_still_named(model: armopt.Model) -> None:
    with pytest.raises(InputError, match="input y: expected shape 2x3, found 3x2"):
        model(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(InputError, match="y is missing"):
        model(torch.zeros(2, 3))


def test_a_pytorch_without_its_private_functions_runs_a_bundle_too(bundle: Path) -> None:
    """In a process where they are gone before armopt is imported; the results are the same, whatever is set around."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).parent / "without_private_functions.py", bundle],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "4 calls, none looked at in one call of C\n"), done.stderr
