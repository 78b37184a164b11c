"""Layers as text: by kernel where they are many, and within the width of a terminal."""

from __future__ import annotations

import sys

import pytest

from armopt.cli import layers
from armopt.cli.output import text_table

LONG = "encoder_blocks_with_a_long_name_that_goes_on_{}_attention_output_dense"


def rows(count: int, name: str = "layer_{}") -> list[layers.Row]:
    reason = "17.8 M instructions; conv_fastmath 1.47x, but it would need casts at either side"
    made = [layers.Row(name.format(i), "conv", (1, 3, 8, 8), "conv_bf16", "bf16", reason) for i in range(count - 1)]
    return [*made, layers.Row("head", "linear", (1, 64), "blas_fp32", "fp32", "asked for")]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")


def test_many_layers_are_grouped_by_kernel() -> None:
    shown = layers.table(rows(200), every=False).splitlines()
    assert len(shown) == 5
    assert shown[2].split() == ["conv_bf16", "bf16", "conv", "199", "layer_0", "to", "layer_198"]
    assert shown[3].split() == ["blas_fp32", "fp32", "linear", "1", "head"]
    assert shown[4] == "200 layers; --layers shows each with its reason."


def test_each_is_shown_on_demand_and_where_they_are_few() -> None:
    shown = layers.table(rows(200), every=True)
    assert shown.endswith(layers.LEGEND)
    assert len(shown.splitlines()) == 202 + len(layers.LEGEND.splitlines())
    assert "1.47x" in layers.table(rows(4), every=False)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("every", [False, True])
def test_a_terminal_is_wide_enough_for_long_names(every: bool) -> None:
    shown = layers.table(rows(30, LONG), every=every)
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("conv_bf16", "blas_fp32", "linear"):
        assert word in shown
    assert not every or "but it would need casts" in " ".join(shown.split())


@pytest.mark.usefixtures("narrow")
def test_names_are_cut_in_the_middle() -> None:
    name = LONG.format(7)
    shown = text_table(("node", "kernel", "reason"), [(name, "conv1x1_bf16", "because " * 20)]).splitlines()
    begin, end = shown[2].split()[0].split("…")
    assert name.startswith(begin)
    assert name.endswith(end)
    assert "conv1x1_bf16" in shown[2]


def test_a_pipe_gets_whole_lines() -> None:
    assert LONG.format(7) in text_table(("node", "reason"), [(LONG.format(7), "because " * 40)])
