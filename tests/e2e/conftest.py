"""`armopt` as a user runs it, and model files of every kind to run it on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from e2e_helpers import HERE, SOURCE, Cli, Models, Result, environment


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Cli]:
    """cli("inspect", path, cwd=…): the command in a process that has torch imported already (see warm.py)."""
    out, err = (tmp_path_factory.mktemp("cli") / name for name in ("stdout", "stderr"))
    server = subprocess.Popen(
        [sys.executable, str(HERE / "warm.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Where the user's package is importable; a shell has the current folder instead, see `armopt` above.
        env=environment(PYTHONPATH=str(package)),
    )

    def run(*args: object, cwd: Path) -> Result:
        assert server.stdin is not None
        assert server.stdout is not None
        request = {"args": [str(arg) for arg in args], "cwd": str(cwd), "stdout": str(out), "stderr": str(err)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        return Result(answer["code"], out.read_text(), err.read_text())

    yield run
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the user's package `mynets`."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "mynets").mkdir()
    (folder / "mynets" / "__init__.py").write_text("")
    (folder / "mynets" / "nets.py").write_text(SOURCE.lstrip())
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Models:
    """Files of every kind that hold `Net` or `TwoInputs`."""
    from mynets import nets
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    net, two = nets.net(), nets.two_inputs()
    generator = torch.Generator().manual_seed(1)
    x, tokens, context = (torch.randn(shape, generator=generator) for shape in ((4, 3, 16, 16), (4, 16), (4, 16)))

    one = (x[:1],)
    torch.export.save(torch.export.export(net, one), folder / "static.pt2")
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=({0: batch},)), folder / "dynamic.pt2")
    torch.export.save(torch.export.export(two, (), {"tokens": tokens, "context": context}), folder / "two.pt2")
    torch.jit.save(torch.jit.trace(net, one), folder / "script.pt")
    torch.save(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "state.pt")
    torch.save(net.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, folder / "nested.pt")
    torch.save(two.state_dict(), folder / "two.pt")
    save_file(net.state_dict(), folder / "state.safetensors")
    return Models(folder, net, two, x, tokens, context)


@pytest.fixture(scope="session")
def bundle(cli: Cli, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `Net`; not to be changed."""
    folder = tmp_path_factory.mktemp("bundle")
    done = cli("optimize", models["static.pt2"], "-o", "net.armopt", cwd=folder)
    assert done.code == 0, done.err
    return folder / "net.armopt"
