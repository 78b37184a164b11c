"""Chooses who does a primitive's arithmetic, among the implementations that oneDNN offers for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from armopt.ir.onednn_names import is_reference
from armopt.kernels.onednn.primitives import Api, Handle


def choose(
    api: Api,
    describe: Callable[[], Handle],
    preferred: Sequence[str] = (),
    takes: Callable[[Handle], bool] | None = None,
) -> tuple[Handle, str] | None:
    """A descriptor at the first implementation that is preferred, else at the first that oneDNN offers.

    Args:
        api: oneDNN.
        describe: Makes a descriptor, at its first implementation.
        preferred: Parts of names (``acl``, ``brgconv_1x1``), the best first.
        takes: Whether an implementation will do, by the descriptor at it.

    Returns:
        The descriptor and the implementation's name; None where none will do. Never a reference.
    """
    offered = []
    description = describe()
    while True:
        name = api.implementation(description)
        if not is_reference(name) and (takes is None or takes(description)):
            if not preferred:
                return description, name
            offered.append((name, api.clone(description)))
        if not api.advance(description):
            break
    ranked = [each for part in preferred for each in offered if part in each[0]] + offered
    return (ranked[0][1], ranked[0][0]) if ranked else None
