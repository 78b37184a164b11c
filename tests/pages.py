"""Pages as armopt writes them, of models small enough to be made in a moment."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from armopt import accuracy
from armopt.accuracy import gates
from armopt.accuracy.checker import Evidence, Validation
from armopt.accuracy.gates import Figures
from armopt.accuracy.nodes import NodeError
from armopt.accuracy.report import page
from armopt.compiler import plan_page
from armopt.compiler.recipe import Planned
from tests.planning import plan


class Deep(nn.Module):
    """Layers with long names, residuals, and glue between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "an_expansion_to_four_times_the_width_of_the_block": nn.Linear(64, 192),
                    "back": nn.Linear(192, 64),
                }
            )
            for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            parts = stage["an_expansion_to_four_times_the_width_of_the_block"](x).reshape(-1, 3, 64).unbind(1)
            x = x + stage["back"](torch.cat([part.softmax(-1) for part in parts], -1))
        return x


@functools.cache
def _planned() -> Planned:
    torch.manual_seed(0)
    return plan(Deep().eval(), torch.randn(80, 64))[1]


def of_plan(*, source: str = "model.pt2") -> str:
    planned = _planned()
    captured = replace(planned.captured, source=source)
    return plan_page.render(replace(planned, part=replace(planned.part, captured=captured)))


def of_report(*, given: bool, source: str = "model.pt2") -> str:
    """Of a bundle that passed, on inputs of the user's or generated ones."""
    torch.manual_seed(0)
    outputs = {"logits": torch.randn(1, 10), "an_output_with_quite_a_long_name": torch.randn(4, 300)}
    found = {name: y.bfloat16().float() for name, y in outputs.items()}
    entries = tuple(accuracy.compare(name, y, found[name]) for name, y in outputs.items())
    figures = {"batch=1": Figures(entries, {}), "batch=8": Figures(entries, {})}
    said = "photos (20 images)" if given else "generated: seeded random numbers, normal, or integers below two"
    outcome = Validation(
        "the model", said, given, 1, "twins", figures, gates.judge(gates.standard(), figures, ""), "", "none was found"
    )
    errors = [
        NodeError(
            f"stages_{i}_a_layer_with_quite_a_long_name", "linear", "conv1x1_bf16", "bf16", (1, 2), *[1e-3 * i] * 4
        )
        for i in range(1, 40)
    ]
    about = page.About("bundle", "graviton3", source, "armopt")
    return page.render(about, outcome, errors, Evidence({"x": torch.rand(1, 3, 32, 48)}, outputs, found))
