"""What probes found is remembered, and nothing that can happen to the file matters."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from armopt.ir.records import Site
from armopt.runtime import probe_cache

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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99, "verdicts": {}}', '{"schema": 1}', "null"])
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


def test_it_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_cache, "_MOST", 3)
    path = tmp_path / "file.json"
    probe_cache.write(path, {str(i): None for i in range(5)})
    assert list(probe_cache.read(path)) == ["2", "3", "4"]


def _write_many(path: Path, name: str) -> None:
    for i in range(30):
        probe_cache.write(path, {f"{name}{i}": None})


def test_several_processes_never_leave_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    context = multiprocessing.get_context("spawn")
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
