"""NaN in, NaN out, of either sign: the portable twins, and all that works on the bits of BF16 values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from armopt.compiler.recipe import Recipe
from tests import nan_cases
from tests.arm64.kernel_cases import Case


@pytest.mark.parametrize("case", nan_cases.CASES, ids=str)
def test_twins_lose_no_nan(case: Case) -> None:
    program, inputs, wanted = nan_cases.prepared(case, "graviton3")
    (found,) = program.graph_module(*inputs)
    assert nan_cases.apart(wanted, found) == (0, 0)
