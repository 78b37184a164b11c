"""Runs `armopt` commands for the tests: imports and warms up once, then forks a process for each command.

Each command has its own process, folder, stdout, stderr and exit code, as from a shell, but not the two seconds that
importing torch takes, nor the second of what each first capture, check and export sets up. One JSON request on a line
of stdin, one JSON answer on a line of stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile


def main() -> None:
    from armopt.cli import app
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    warm_up(app.app)
    gc.collect()
    gc.freeze()  # so that no child writes to the pages that it shares

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(app.main, request)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def warm_up(app: object) -> None:
    """Runs the commands that work with graphs, on a small model. With OMP_NUM_THREADS=1 nothing starts a thread."""
    import torch
    from typer.testing import CliRunner

    layers = (torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten())
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model = torch.nn.Sequential(*layers, torch.nn.Linear(288, 8)).eval()
        dimensions = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(model, (torch.ones(2, 3, 8, 8),), dynamic_shapes=dimensions)
        torch.export.save(program, f"{folder}/model.pt2")
        for arguments in (
            ("optimize", "model.pt2", "--batch", "1,2", "--onnx", "--report", "report.html", "-o", "bundle"),
            ("validate", "bundle"),
            ("inspect", "bundle"),
            ("plan", "model.pt2"),
        ):
            with contextlib.chdir(folder):
                done = CliRunner().invoke(app, arguments)  # type: ignore[arg-type]
            assert done.exit_code == 0, done.output


def run(command: object, request: dict[str, object]) -> None:
    """The child: becomes `armopt ARGS` and never returns."""
    code = 1
    try:
        os.chdir(str(request["cwd"]))
        for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(str(name), flags), number)
        sys.argv = ["armopt", *request["args"]]  # type: ignore[misc]
        command()  # type: ignore[operator]
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
