"""What attention a bound graph runs: for tests here and on the emulated core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def query_dtypes(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> tuple[Any, list[str]]:
    """The result of a call, and the dtype of each query of attention in it."""
    found: list[str] = []

    class Watching(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is torch._C._nn.scaled_dot_product_attention:
                found.append(str(args[0].dtype).removeprefix("torch."))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        return Watching(module).run(*inputs), found
