"""What PyTorch lets a process set around a model and a bundle is not subject to: autocast, default dtype and device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

#: The default dtype under which models are captured.
_CAPTURED = torch.float32
#: PyTorch's own, which a release may lack: then something may be set at any time, and every call is made as captured.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


class _DefaultDtype:
    """The process's default dtype, which no thread has for itself: as captured while any call needs it so."""

    def __init__(self) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._before = _CAPTURED

    @contextlib.contextmanager
    def as_captured(self) -> Iterator[None]:
        with self._lock:
            if self.users == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(_CAPTURED)
            self.users += 1
        try:
            yield
        finally:
            with self._lock:
                self.users -= 1
                if self.users == 0:
                    torch.set_default_dtype(self._before)


_default = _DefaultDtype()


def differ() -> bool:
    """Whether something is set that would change what a bundle's operations give."""
    return (
        torch.get_default_dtype() is not _CAPTURED
        or _default.users > 0
        or _modes() > 0
        # the quicker question first: to name a device takes as long as all others together
        or (_any_autocast() and torch.is_autocast_enabled("cpu"))
    )


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Runs as the model was captured: without autocast, in FP32 by default, on the CPU."""
    if not differ():
        yield
        return
    with _default.as_captured(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield
