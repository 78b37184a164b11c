"""Gives every Linear its planned kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from armopt.ir.operations import LINEAR
from armopt.ir.records import Decision, PassResult
from armopt.passes import _pack


@dataclass(frozen=True)
class PackLinear:
    """armopt.linear(x, W, kernel=aten) -> cast(armopt.linear(cast(x), W', kernel=planned)).

    W' is W in the dtype that the kernel packs; nodes that share W share W'. Refuses what the plan refuses, with its
    reason.
    """

    decisions: Mapping[str, Decision]
    #: BF16 weights by the FP32 weight's name; one dictionary for all plans of a model, so that they share.
    rounded: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass."""
        return _pack.pack(graph_module, LINEAR, self.decisions, self.rounded)
