"""Models in BF16 or FP16 as the same models in FP32: each of their values is one of FP32 too, so nothing is rounded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from armopt.capture.calls import Args, Kwargs, eval_mode, held_tensors, unchanged
from armopt.errors import ArmoptWarning, InputError, first_line
from armopt.models.huggingface import without_cache

#: Dtypes that FP32 holds exactly.
HALF = (torch.bfloat16, torch.float16)


def is_half(model: torch.nn.Module) -> bool:
    """Whether some parameter is in BF16 or FP16, and none is in what FP32 does not hold."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return not dtypes.isdisjoint(HALF) and dtypes <= {torch.float32, torch.complex64, *HALF}


def widened(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> torch.nn.Module:
    """A copy that works in FP32, takes what the model takes, and gives its dtypes.

    Args:
        model: With parameters in BF16 or FP16.
        args: Example positional inputs, as the model takes them.
        kwargs: Example keyword inputs.
        source: What to call the model in messages.

    Raises:
        InputError: The model fails on the inputs, or can't be copied.
    """
    dtypes = _dtypes(model, args, kwargs, source)
    try:
        wide: torch.nn.Module = copy.deepcopy(model, _computed(model)).float()
    except Exception as error:
        what = f"is in half precision and can't be copied to widen it: {first_line(error)}"
        raise InputError(what, where=source, hint="Convert it with model.float()") from error

    def take(_: torch.nn.Module, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return tree_map(_wide, given), tree_map(_wide, named)

    def give(_: torch.nn.Module, given: Any, named: Any, result: Any) -> Any:
        leaves, tree = torch.utils._pytree.tree_flatten(result)
        return tree_unflatten([_narrow(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)], tree)

    wide.register_forward_pre_hook(take, with_kwargs=True)
    wide.register_forward_hook(give, with_kwargs=True)
    names = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.dtype in HALF})
    warnings.warn(
        f"{source} is in {' and '.join(names)}: widened to float32, which changes no value. Results are compared with "
        "the model in float32, and have the model's own dtypes",
        ArmoptWarning,
        stacklevel=2,
    )
    return wide


def _computed(model: torch.nn.Module) -> dict[int, Any]:
    """Copies of tensors that a module keeps beside its parameters and computed from them, which refuse to be copied."""
    return {id(each): each.detach().clone() for each in held_tensors(model) if not each.is_leaf}


def _dtypes(model: torch.nn.Module, args: Args, kwargs: Kwargs, source: str) -> Sequence[torch.dtype | None]:
    """Those of the model's own results; None where one is no tensor. Inputs in FP32 may be meant for half precision."""
    narrow = next(parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF)
    results: list[Any] = []
    for attempt in ((args, kwargs), tree_map(lambda leaf: _to_half(leaf, narrow), (args, dict(kwargs)))):
        try:
            with (
                torch.no_grad(),
                eval_mode(model),
                without_cache(model),
                unchanged(model),
                torch.random.fork_rng(devices=[]),
            ):
                results = tree_leaves(model(*attempt[0], **attempt[1]))
            break
        except Exception as error:
            failed = error
    else:
        raise InputError(
            f"the model fails on the example inputs: {type(failed).__name__}: {first_line(failed)}",
            where=source,
            hint="Give inputs of the dtypes that the model takes, or convert it with model.float()",
        ) from failed
    return [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in results]


def _to_half(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 else leaf


def _wide(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype in HALF else leaf


def _narrow(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if dtype in HALF and isinstance(leaf, torch.Tensor) else leaf
