"""A sample of torch's own databases; all of them: python -m benchmarks.torch_databases --write."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import torch_databases as databases
from tests.sampling import sampled

#: Layers whose layout is not PyTorch's, and operations that look at it or pass it on, first; then every 150th entry.
CHOSEN = (
    *("nn.Conv1d", "nn.Conv2d", "nn.ConvTranspose2d"),
    *("as_strided", "kron", "native_group_norm", "unsafe_chunk", "view_as_complex", "to_sparse", "rand_like"),
)
SAMPLE = tuple(dict.fromkeys((*CHOSEN, *databases.entries()[::150])))


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
