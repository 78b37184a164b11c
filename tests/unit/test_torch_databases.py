"""A sample of torch's own databases; all of them: python -m benchmarks.torch_databases --write."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks import torch_databases as databases
from tests.sampling import sampled

#: Layers whose layout is not PyTorch's, and operations that look at it or pass it on, first; then every 150th entry,
#: by name: to ask for all takes seconds, and every process of the tests reads this file.
SAMPLE = (
    *("nn.Conv1d", "nn.Conv2d", "nn.ConvTranspose2d"),
    *("as_strided", "kron", "native_group_norm", "unsafe_chunk", "view_as_complex", "to_sparse", "rand_like"),
    *("nn.AdaptiveAvgPool1d", "broadcast_tensors", "nn.functional.conv1d", "svd_lowrank"),
    *("nn.functional.dropout3d", "special.laguerre_polynomial_l"),
)


@pytest.mark.parametrize("entry", sampled(SAMPLE, 2))
def test_an_entry_is_right_or_refused_as_the_page_says(entry: str) -> None:
    found = databases.run(entry, most=1)
    assert {outcome.way for outcome in found} >= set(databases.WAYS)
    assert [outcome for outcome in found if outcome.kind in ("wrong", "crashed")] == []
    listed = [
        line for line in databases.PAGE.read_text().splitlines() if re.search(rf"[ |]{re.escape(entry)}[, |]", line)
    ]
    for outcome in found:
        if outcome.kind == "refused":
            assert any(line.startswith(f"| {outcome.way} |") for line in listed), outcome


def test_the_page_says_that_nothing_is_wrong() -> None:
    rows = [line for line in databases.PAGE.read_text().splitlines() if re.match(r"\| (module|op)_db ", line)]
    assert len(rows) == 2 * len(databases.WAYS)
    assert all(row.endswith("| 0 | 0 |") for row in rows)


def test_an_entry_that_fails_whole_counts_in_every_way() -> None:
    found = [databases.Outcome("nn.Conv2d", 0, "all", "crashed", "the process ended with -11")]
    rows = [line for line in databases.page(found).splitlines() if line.startswith("| module_db ")]
    assert [row.endswith("| 0 | 1 |") for row in rows] == [True] * len(databases.WAYS)


@contextmanager
def _process(code: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_limit_is_of_work_not_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "LIMIT", 0.3)
    with _process("import time; time.sleep(1); print('done')") as process:
        assert databases.answer(process) == ("done\n", "")
    with _process("while True: pass") as process:
        assert databases.answer(process) == ("", "took more than 0.3 s of work")
    monkeypatch.setattr(databases, "WAITING", 0.5)
    with _process("import time; time.sleep(60)") as process:
        assert databases.answer(process) == ("", "took more than 0.5 s")


_ROWS = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((_ROWS.clone(),), ""),
        ((_ROWS * (1 + 1e-6),), ""),
        ((_ROWS + 0.1,), "output 0: other values"),
        ((_ROWS.double(),), "output 0: torch.float64 (2, 3) torch.strided, not torch.float32 (2, 3) torch.strided"),
        ((_ROWS.t().contiguous().t(),), "output 0: strides (1, 2), not (3, 1) of (2, 3)"),
        ((_ROWS, _ROWS), "2 values, not 1"),
        ((1.0,), "output 0 is a float, not a Tensor"),
    ],
)
def test_what_differs_is_noticed(found: Sequence[Tensor], said: str) -> None:
    assert databases.compare((_ROWS,), found) == said
