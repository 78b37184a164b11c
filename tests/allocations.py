"""What a call allocates."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """What is allocated: results of operations that show no memory of others."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if all(each.alias_info is None for each in func._schema.returns):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))
