"""Models captured and planned by hand, as `optimize` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from armopt.bundle.program import Program
from armopt.compiler.captured_model import capture_model
from armopt.compiler.recipe import Planned, Recipe
from armopt.ir.records import Captured
from armopt.plan.planner import Policy
from armopt.plan.threshold_policy import ThresholdPolicy


def captured_from(model: torch.nn.Module, *inputs: Any) -> Captured:
    """The graph of a model."""
    return capture_model(model, inputs).parts[0].captured


def plan(
    model: torch.nn.Module, *inputs: Any, target: str = "graviton3", policy: Policy | None = None
) -> tuple[Recipe, Planned]:
    """A model planned at the sizes of its inputs, by the tutorial's rule unless told otherwise."""
    recipe = Recipe.of(target, policy or ThresholdPolicy())
    return recipe, recipe.plan_part(capture_model(model, inputs).parts[0])


def programs(
    model: torch.nn.Module, *inputs: Any, target: str = "graviton3", policy: Policy | None = None
) -> Sequence[Program]:
    """A model planned and lowered."""
    recipe, planned = plan(model, *inputs, target=target, policy=policy)
    return recipe.lower_part(planned)
