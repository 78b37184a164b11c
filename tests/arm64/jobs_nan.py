"""What test_nan.py sends to the emulated side."""

import torch

from armopt.runtime.bind import Binder
from tests import nan_cases


def kernels(cases, target):
    """For each case the kernel that ran, why it is another one than asked for, and how many NaN it lost and made."""
    found = []
    with torch.no_grad():
        for case in cases:
            program, inputs, wanted = nan_cases.prepared(case, target)
            module, (bound,) = Binder(fast_math=True).bind(program)
            (result,) = module(*(x.clone() for x in inputs))
            found.append((bound.kernel, bound.reason, *nan_cases.apart(wanted, result)))
    return found


def bundles(calls):
    """What a bundle gives for some arguments, for each pair of them."""
    import armopt

    return [armopt.load(path)(*arguments) for path, arguments in calls]
