"""How many threads the Compute Library works with: as many as there were at its first call in the process."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings

from armopt.errors import ArmoptWarning
from armopt.kernels.onednn import symbols

_LIBRARY = "libarm_compute.so"
_SCHEDULER = "_ZN11arm_compute9Scheduler3getEv"
_THREADS = "_ZNK11arm_compute12OMPScheduler11num_threadsEv"


def threads() -> int | None:
    """Those of this process; None where its PyTorch has no Compute Library, or one that doesn't say."""
    library = symbols.loaded(_LIBRARY)
    if library is None:
        return None
    functions = ctypes.CDLL(library.path, os.RTLD_NOLOAD | os.RTLD_LAZY)
    try:
        scheduler, count = functions[_SCHEDULER], functions[_THREADS]
    except AttributeError:
        return None
    scheduler.restype, count.restype, count.argtypes = ctypes.c_void_p, ctypes.c_uint, [ctypes.c_void_p]
    return int(count(scheduler()))


@functools.cache
def warn_of_other_threads(wanted: int) -> None:
    """Says once that the Compute Library works with another number of threads than PyTorch does.

    oneDNN tells the library a number at its first call and never again. Primitives of other numbers have no room for
    more threads, so it is left as it is.

    Args:
        wanted: PyTorch's number, after a first call.
    """
    found = threads()
    if found not in (None, wanted):
        warnings.warn(
            f"the Compute Library works with {found} thread{'s' * (found != 1)}, PyTorch with {wanted}: it keeps the "
            "number of its first call in the process. Set OMP_NUM_THREADS, or call torch.set_num_threads before any "
            "model runs",
            ArmoptWarning,
            stacklevel=2,
        )
