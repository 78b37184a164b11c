"""A target, a policy, a task and formats from outside, as docs/extending.md has them: found wherever they are used."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from armopt import targets
from armopt.accuracy import gates, tasks
from armopt.accuracy.tasks import TASKS
from armopt.capture import files, inputs, sample_files
from armopt.capture.files import FORMATS
from armopt.capture.sample_files import SAMPLE_FILES
from armopt.errors import InputError
from armopt.ir.records import Site
from armopt.plan import costs, planner
from armopt.plan.policies import POLICIES, find_policy
from armopt.targets.emulated import core_named

ROOT = Path(__file__).parents[2]
README, VALIDATION = (ROOT / "README.md").read_text(), (ROOT / "docs" / "validation.md").read_text()
GUIDE = (ROOT / "docs" / "extending.md").read_text()
#: File name -> text, of each example.
EXAMPLES = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL))
TABLES = {
    "toy_target": (targets.table(), "toychip"),
    "toy_policy": (POLICIES, "blas"),
    "toy_task": (TASKS, "regression"),
    "toy_format": (FORMATS, "toy"),
    "toy_samples": (SAMPLE_FILES, ".npy"),
}


def factory() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1))


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The examples as files, imported; afterwards the tables are as they were."""
    before = [list(table) for table, _ in TABLES.values()]
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in TABLES:
        importlib.import_module(module)
    yield tmp_path
    for module, (table, name) in TABLES.items():
        table.unregister(name)
        del sys.modules[module]
    assert [list(table) for table, _ in TABLES.values()] == before


def test_a_target_is_loaded_detected_emulated_and_has_costs(examples: Path) -> None:
    toychip = targets.load("toychip")
    assert toychip.bf16
    assert "toychip" in targets.names()
    cpuinfo = "processor : 0\nFeatures : fp asimd\nCPU implementer : 0x7f\nCPU part : 0x001\n"
    host = targets.this_host(cpuinfo)
    assert (host.core, host.provenance["product"], host.bf16) == ("toy-1", "toychip", False)
    assert core_named("toychip").name == "neoverse-n2"
    found = costs.find(toychip, "2.10")
    assert found is not None
    assert found.core == "neoverse-n2"
    with pytest.raises(InputError, match="Did you mean toychip"):
        targets.load("toychips")


def test_a_policy_is_found_and_plans(examples: Path) -> None:
    target = targets.load("graviton3")
    policy = find_policy("blas=8", target)
    sites = [Site(f"fc{m}", "linear", m, 16, 4, (m, 16), (4, 16)) for m in (8, 9)]
    made = planner.make(sites, target, policy, {})
    assert made.policy == "blas=8"
    assert [(d.node, d.kernel) for d in made.decisions] == [("fc8", "blas_fp32"), ("fc9", "aten_linear")]
    assert [skip.reason for skip in made.refused] == ["9 rows, more than 8"]
    with pytest.raises(InputError, match=r"can't read policy 'blas=many'\. Write cost\[=TORCH\].* or blas\[=64\]"):
        find_policy("blas=many", target)
    with pytest.raises(InputError, match=r"unknown policy 'bla'\. Did you mean blas\? Known are cost.* or blas"):
        find_policy("bla", target)


def test_a_task_is_found_from_outputs_measured_and_gated(examples: Path) -> None:
    wanted = {"y": torch.tensor([[1.0], [2.0]])}
    found = {"y": torch.tensor([[1.001], [2.5]])}
    task, why = tasks.task_for("", {}, wanted)
    assert task is TASKS["regression"]
    assert why == "found from the outputs"
    measured = task()
    measured.update(tasks.Sample({}, wanted, found, lambda x: wanted, lambda x: found))
    (verdict,) = gates.judge(
        [gates.parse("within>=0.9")], {"": gates.Figures((), measured.results())}, task="regression"
    )
    assert (verdict.value, verdict.passed) == (0.5, False)
    with pytest.raises(InputError, match="It needs an output"):
        tasks.task_for("regression", {}, {"y": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="belongs to the task regression"):
        gates.judge([gates.parse("within>=0.9")], {"": gates.Figures((), {})}, task="language")


def test_a_format_is_recognised_captured_and_read_as_a_state_dict(examples: Path) -> None:
    path = examples / "model.bin"
    original = factory()
    torch.save(original.state_dict(), path)
    path.write_bytes(b"TOYMODEL" + path.read_bytes())
    options = files.Options(model=f"{__name__}:factory", inputs=(inputs.parse("2x4"),))
    assert files.find_kind(path) == "toy"
    captured = files.open_model(path, options)
    x = torch.randn(2, 4)
    assert torch.equal(captured.graph_module(x)[0], original(x))
    assert torch.equal(files.build(path, options)(x), original(x))
    path.write_bytes(b"TOYMODEL and then nothing")
    with pytest.raises(InputError, match="is damaged"):
        files.open_model(path, options)
    path.write_bytes(b"TOYMODE")
    with pytest.raises(InputError, match=r"Known are .* or toy files"):
        files.find_kind(path)


def test_a_format_of_inputs_is_read(examples: Path) -> None:
    np.save(examples / "x.npy", np.arange(3.0))
    assert torch.equal(sample_files.read(examples / "x.npy")[""], torch.arange(3.0, dtype=torch.float64))
    with pytest.raises(InputError, match=r"Give .*a .* or \.npy file"):
        sample_files.read(examples / "missing.npy")


@pytest.mark.slow
def test_help_lists_them(examples: Path) -> None:
    script = f"import {', '.join(TABLES)}\nfrom armopt.cli.app import app\n"
    script += "".join(f"app([{name!r}, '--help'], standalone_mode=False)\n" for name in ("optimize", "emulate"))
    done = subprocess.run([sys.executable, "-c", script], cwd=examples, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    for words in ("or toy files (a state dict)", "or blas[=64] (most rows)", "regression, classification", "or .npy"):
        assert words in said
    assert "yitian710, toychip" in said


def undocumented() -> list[str]:
    """What is in a table and not in the document that lists it."""
    readme = README.replace("`", "")
    rows = {
        cells[1].strip(): re.findall(r"`(\w+)`", cells[3])
        for cells in (line.split("|") for line in VALIDATION.splitlines())
        if len(cells) == 5
    }
    return [
        *(name for name, task in TASKS.items() if rows.get(name) != [metric.name for metric in task.metrics]),
        *(name for name in FORMATS if f"| {FORMATS.said(name)} |" not in readme),
        *(name for name in POLICIES if f"--policy {name}" not in readme),
        *([] if f"from a {SAMPLE_FILES.help()} file" in readme else SAMPLE_FILES),
        *([] if f"| a {SAMPLE_FILES.help()} file |" in VALIDATION else SAMPLE_FILES),
    ]


def test_documents_list_what_there_is() -> None:
    assert undocumented() == []


def test_documents_are_asked_for_what_is_added(examples: Path) -> None:
    assert {"regression", "toy", "blas", ".npy"} <= set(undocumented())


def test_without_them_they_are_unknown() -> None:
    for name, find in (
        ("toychip", targets.load),
        ("blas", lambda name: find_policy(name, targets.load("graviton3"))),
        ("regression", lambda name: tasks.task_for(name, {}, {})),
        ("within>=1", gates.parse),
    ):
        with pytest.raises(InputError, match="unknown"):
            find(name)
