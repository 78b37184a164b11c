"""What attention a bound graph runs: for tests here and on the emulated core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def query_dtypes(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result of a call, and the dtype of each query of attention in it."""
    found: list[str] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.nn.functional.scaled_dot_product_attention:
                found.append(str(args[0].dtype).removeprefix("torch."))
            return function(*args, **kwargs or {})

    with torch.no_grad(), Watching():
        return call(*args, **kwargs), found
