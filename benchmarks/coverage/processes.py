"""A process for each model, forked from one that has imported everything: one that crashes fails its own row."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.coverage.cases import Case


def warm_up() -> None:
    """Imports what the models need and optimizes a small one, so that no model's own time has that in it."""
    import torch

    import armopt
    from armopt.models import torchvision_ops

    torchvision_ops.ensure_torchvision()
    layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 8))
    with tempfile.TemporaryDirectory() as folder:
        model = torch.nn.Sequential(*layers).eval()
        armopt.optimize(model, (torch.ones(1, 3, 8, 8),), output=Path(folder) / "b", target="graviton3")
    gc.collect()
    gc.freeze()  # so that no child writes to the pages that it shares


def apart(case: Case, limit: float, log: Path) -> dict[str, Any]:
    """The row of a model, measured in a child of this process; a failure becomes a row."""
    said = {"section": case.section, "family": case.family, "model": case.name}
    sys.stdout.flush()
    sys.stderr.flush()
    answer = log.with_suffix(".part")
    child = os.fork()
    if child == 0:
        _become(case, answer, log)
    if not _ended(child, limit):
        return said | {"error": f"not done within {limit:.0f} s"}
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if not answer.is_file():
        return said | {"error": f"the process ended with code {code}"}
    found = json.loads(answer.read_text())
    answer.unlink()
    return said | found


def _ended(child: int, limit: float) -> bool:
    """Waits for a child to end, which stays to be collected; kills it after the limit."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _become(case: Case, answer: Path, log: Path) -> None:
    """The child: measures, writes its answer and never returns."""
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        from benchmarks.coverage.measure import measure

        answer.write_text(json.dumps(measure(case)))
        code = 0
    except BaseException as error:
        traceback.print_exc()
        answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
