"""The benchmark of coverage: its lists, a row for whatever happens, and the page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coverage import huggingface, page, timm

ROOT = Path(__file__).resolve().parents[2]
#: Run in a process of its own: it forks, which the threads of pytest's workers don't go with.
SCRIPT = """
import json, os, sys, time
from functools import partial
from pathlib import Path
import torch
from benchmarks.coverage import processes
from benchmarks.coverage.cases import Case, Sample

class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ways = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU()) for _ in "ab"])
    def forward(self, x):
        return self.ways[int(x.sum() > 0)](x)

def sample(model):
    torch.manual_seed(0)
    return Sample(model(), ((((torch.randn(256, 128),)), {}),))

builds = {
    "graph": partial(sample, lambda: torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Tanh())),
    "parts": partial(sample, Router),
    "raises": lambda: 1 / 0,
    "crashes": lambda: os._exit(3),
    "hangs": lambda: time.sleep(60),
}
log = Path(sys.argv[1])
for name, build in builds.items():
    limit = 1 if name == "hangs" else 60
    print(json.dumps(processes.apart(Case("section", "family", name, build), limit, log)))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("coverage") / "model.log"
    command = [sys.executable, "-c", SCRIPT, str(log)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["model"]: row for row in found}


def test_a_model_in_one_graph(rows: dict[str, Any]) -> None:
    row = rows["graph"]
    assert (row["form"], row["BF16"], row["share"], row["parameters"]) == ("graph", 1, 1.0, 128 * 129)
    assert 0.999 < row["cosine"] < 1
    assert row["megabytes"] > 100
    assert row["notes"] == []
    assert page.passed(row)


def test_a_model_that_decides_on_data_comes_in_parts_and_says_why(rows: dict[str, Any]) -> None:
    row = rows["parts"]
    assert (row["form"], row["BF16"]) == ("1 part", 1)
    assert row["notes"][0].startswith("no single graph: ")
    assert "value of a tensor" in row["notes"][0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", "ZeroDivisionError: division by zero"),
        ("crashes", "the process ended with code 3"),
        ("hangs", "not done within 1 s"),
    ],
)
def test_whatever_happens_is_a_row(rows: dict[str, Any], name: str, error: str) -> None:
    assert rows[name]["error"] == error
    assert not page.passed(rows[name])
    assert f"FAILS: {error}" in page.table([rows[name]])


def test_every_kind_of_hugging_faces_families_has_models() -> None:
    names = [case.name for case in huggingface.cases()]
    assert len(set(names)) == len(names)
    assert len(names) >= 40
    kinds = {"encoder", "decoder", "encoder-decoder", "vision", "audio", "multimodal", "state space"}
    assert kinds | {"mixture of experts"} <= set(huggingface.FAMILIES)
    assert sum(name.endswith(".generate") for name in names) >= 5


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed: pip install timm")
def test_every_architecture_of_timm_has_a_model() -> None:
    files = timm.files()
    assert set(timm.SMALLEST) == set(files)
    assert all(name in files[file] for file, name in timm.SMALLEST.items())
