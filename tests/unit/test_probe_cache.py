"""What probes found is remembered, and nothing that can happen to the file matters."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import armopt
from armopt import environment
from armopt.ir.records import Site
from armopt.kernels.base import Kernel
from armopt.runtime import host_check, numbers, probe, probe_cache

SITE = Site("fc", "linear", 8, 64, 32, (8, 64), (32, 64), weight_key="fc_weight", source="x")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    found = {
        probe_cache.key("conv1x1_bf16", SITE, SITE.shape): None,
        probe_cache.key("conv_bf16", SITE, (1, 2)): "ref:any",
    }
    probe_cache.write(path, found)
    assert probe_cache.read(path) == found


def test_later_verdicts_are_added(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    probe_cache.write(path, {"a": None})
    probe_cache.write(path, {"b": "why"})
    assert probe_cache.read(path) == {"a": None, "b": "why"}


def test_a_verdict_depends_on_shapes_and_not_on_names() -> None:
    same = replace(SITE, node="other", weight_key="w", source="y", escapes=False)
    assert probe_cache.key("k", SITE, (8, 64)) == probe_cache.key("k", same, (8, 64))
    assert probe_cache.key("k", SITE, (8, 64)) != probe_cache.key("k", SITE, (16, 64))
    assert probe_cache.key("k", SITE, (8, 64)) != probe_cache.key("k", replace(SITE, post_op="relu"), (8, 64))
    assert probe_cache.key("k", SITE, (8, 64)) != probe_cache.key("j", SITE, (8, 64))


DAMAGED = ["", "{", "[]", '{"schema": 99, "verdicts": {}}', '{"schema": 1}', "null", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:12])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert probe_cache.read(path) == {}
    probe_cache.write(path, {"a": None})
    assert probe_cache.read(path) == {"a": None}


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    probe_cache.write(blocked / "inside" / "file.json", {"a": None})
    assert blocked.read_text() == ""


def test_it_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    probe_cache.write(path, {str(i): None for i in range(20_002)})
    assert list(probe_cache.read(path)) == [str(i) for i in range(2, 20_002)]


def _write_many(path: Path, name: str) -> None:
    for i in range(30):
        probe_cache.write(path, {f"{name}{i}": None})


def test_several_processes_never_leave_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    context = multiprocessing.get_context("fork")  # at once: another process would import torch first
    workers = [context.Process(target=_write_many, args=(path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if path.exists():
            assert json.loads(path.read_text())["schema"] == 1
    assert all(worker.exitcode == 0 for worker in workers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_each_build_has_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))
    one, other = probe_cache.path_for({"torch": "2.10.0"}), probe_cache.path_for({"torch": "2.13.0"})
    assert one != other
    assert one.parent == tmp_path / "probe"


def test_a_pipe_counts_as_empty_and_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    os.mkfifo(path)
    assert probe_cache.read(path) == {}
    probe_cache.write(path, {"a": None})
    assert probe_cache.read(path) == {"a": None}


def test_a_file_without_end_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "file.json").symlink_to("/dev/zero")
    assert probe_cache.read(tmp_path / "file.json") == {}
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    assert probe_cache.read(tmp_path / "large.json") == {}


def test_what_can_not_be_read_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert probe_cache.read(tmp_path / "folder") == {}
    assert probe_cache.read(tmp_path / "missing") == {}


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, host_bundle: Path) -> None:
    """Neither HOME nor an entry in passwd, as in an image whose user is a number."""

    def no_home(*args: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ARMOPT_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert probe_cache.path_for({}) is None
    assert armopt.load(host_bundle).kernels


def test_each_version_of_armopt_and_each_build_of_torch_has_its_own_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))

    def remembered() -> int:
        """How many verdicts this process knows at its start; it adds one."""
        known: dict[str, str | None] = {}
        with host_check.remembering(known) as keys:
            before = len(keys)
            known[f"verdict {before}"] = None
        return before

    assert [remembered(), remembered()] == [0, 1]
    assert environment.library_identity()
    monkeypatch.setattr(environment, "library_identity", lambda: "1-2")
    assert [remembered(), remembered()] == [0, 1]
    monkeypatch.setattr(host_check, "__version__", "another")
    assert remembered() == 0
    assert len(list((tmp_path / "probe").iterdir())) == 3


@pytest.fixture
def conv_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three convolutions for this machine: oneDNN answers, so probes have something to say."""
    model = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, size, padding=size // 2) for size in (3, 5, 7)]).eval()
    path = tmp_path_factory.mktemp("bundles") / "conv"
    armopt.optimize(model, (torch.zeros(1, 8, 8, 8),), output=path, target="host", policy="threshold=1")
    return path


@pytest.mark.usefixtures("pytorchs_calls")
@pytest.mark.filterwarnings("error:.*another kernel than planned:armopt.errors.ArmoptWarning")
@pytest.mark.parametrize("lie", ["refused", "proven", None])
def test_one_probe_tells_whether_the_rest_can_be_trusted(
    conv_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str | None
) -> None:
    """A file that says "refused" of all moves no layer."""
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))
    expected = armopt.load(conv_bundle).kernels
    (file,) = (tmp_path / "probe").iterdir()
    true = probe_cache.read(file)
    assert true
    assert set(true.values()) == {None}
    probes: list[str] = []
    refusal = probe.refusal

    def counted(kernel: Kernel, site: Site, run: Callable[[], object]) -> str | None:
        probes.append(kernel.name)
        return "ref:any" if lie == "proven" and kernel.is_onednns else refusal(kernel, site, run)

    monkeypatch.setattr(probe, "refusal", counted)
    if lie == "refused":
        probe_cache.write(file, dict.fromkeys(true, "ref:any"), forget=True)
    if lie == "proven":  # the file is of another host, on which these kernels were good
        with pytest.warns(armopt.ArmoptWarning, match="layers run another kernel than planned"):
            assert armopt.load(conv_bundle).kernels != expected
        assert set(probe_cache.read(file).values()) != {None}
        return
    assert armopt.load(conv_bundle).kernels == expected
    assert len(probes) == (1 if lie is None else len(true))
    assert probe_cache.read(file) == true


@pytest.mark.parametrize("lie", ["refused", None])
def test_of_own_primitives_one_is_compared_again(
    conv_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str | None
) -> None:
    monkeypatch.setenv("ARMOPT_CACHE", str(tmp_path))
    expected = armopt.load(conv_bundle).kernels
    assert all(entry.implementation for entries in expected for entry in entries)
    (file,) = (tmp_path / "probe").iterdir()
    true = probe_cache.read(file)
    compared: list[str] = []
    refusal = numbers.refusal
    monkeypatch.setattr(numbers, "refusal", lambda *a, **k: compared.append(a[1].node) or refusal(*a, **k))
    if lie:
        probe_cache.write(file, dict.fromkeys(true, "gives wrong numbers"), forget=True)
    assert armopt.load(conv_bundle).kernels == expected
    assert len(compared) == (len(true) if lie else 1)
    assert probe_cache.read(file) == true
