"""Runs `armopt` commands for the tests: imports torch once, then forks a process for each command.

Each command has its own process, folder, stdout, stderr and exit code, as from a shell, but not the two seconds that
importing torch takes. One JSON request on a line of stdin, one JSON answer on a line of stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys


def main() -> None:
    import torch

    from armopt import capture
    from armopt.cli import app
    from armopt.models import torchvision_ops

    # What commands import on the way, imported here once. With OMP_NUM_THREADS=1 nothing starts a thread.
    torchvision_ops.ensure_torchvision()
    capture.module(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU()), (torch.ones(1, 1, 2, 2),))

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(app.main, request)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


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
