"""What a bundle may call: the closed list of operations that the writer emits and the reader takes.

On it is what torch.export leaves of a model for inference and what makes the same of the same: no file, no process, no
random number, no state, no uninitialised memory, no decomposition that may not come to an end on some matrix. Whatever
else is asked for is refused by name, when a bundle is written as when one is read.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from armopt.bundle.graph_file import Device, DtypeName, Layout, MemoryFormat, Ref
from armopt.ir.aten import ATEN

#: Operations of other packages, and the one of ATen that writes: the new value of a buffer, where a model has a state.
OTHERS = frozenset(
    {
        "armopt.linear.default",
        "armopt.conv.default",
        "armopt.recurrence.default",
        "armopt.split_rows.default",
        "armopt.join_rows.default",
        "aten.copy_.default",
        *(f"torchvision.{name}.default" for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")),
        "torchvision.deform_conv2d.default",
    }
)
#: Arithmetic on sizes, with how many numbers each takes.
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], int]] = {
    **{f"operator.{name}": (getattr(operator, name), 1) for name in ("neg", "pos", "abs", "not_")},
    **{
        f"operator.{name}": (getattr(operator, name), 2)
        for name in (
            *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"),
        )
    },
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": (getattr(torch, name), 1) for name in ("sym_float", "sym_int", "sym_not", "_sym_sqrt")},
    **{f"torch.{name}": (getattr(torch, name), 2) for name in ("sym_max", "sym_min")},
    "torch.sym_ite": (torch.sym_ite, 3),
}
#: TorchScript has forms of many operations for numbers, lists and strings; of those these checks alone are taken.
_ON_NUMBERS = frozenset(
    {"aten._assert_scalar.default", "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default"}
)
_NAMES = {function: name for name, (function, _) in FUNCTIONS.items()}
_NAME = re.compile(r"(aten|armopt|torchvision)\.(\w+)\.(\w+)", re.ASCII)
#: What a bundle holds for arguments that are no numbers, though PyTorch takes some.
_RECORDS: Mapping[str, type] = {
    "ScalarType": DtypeName,
    "MemoryFormat": MemoryFormat,
    "Layout": Layout,
    "Device": Device,
}
_NUMBER_TYPES = ("int", "float", "bool", "number")
#: Bits that a number may take. Those of a size fit into 64, and no model multiplies many.
_MOST_BITS = 4096


class UnlistedError(Exception):
    """What a bundle may not call, and why."""


class LackingError(Exception):
    """An operation that this build of torch does not have."""


def name_of(target: Any) -> str:
    """The name of an operation that is on the list.

    Raises:
        UnlistedError: It is not.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check_listed(target)
        return str(target)
    if target in _NAMES:
        return _NAMES[target]
    raise UnlistedError(f"{getattr(target, '__name__', target)}, which is no operation on tensors")


def find(name: str) -> Callable[..., Any]:
    """The operation of that name.

    Raises:
        UnlistedError: It is not on the list.
        LackingError: This build of torch does not have it.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    match = _NAME.fullmatch(name)
    if match is None:
        raise UnlistedError(f"{name!r}, which is no operation on tensors")
    namespace, packet, overload = match.groups()
    if namespace == "torchvision":
        from armopt.models import torchvision_ops

        torchvision_ops.ensure_torchvision()
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise LackingError(name)
    _check_listed(found)
    return found


def _check_listed(found: torch._ops.OpOverload) -> None:
    if str(found) in OTHERS:
        return
    if found.namespace != "aten":
        raise UnlistedError(f"{found}, an operation of another package")
    if found._schema.is_mutable:
        raise UnlistedError(f"{found}, which writes to its arguments")
    types = [str(each.type) for each in (*found._schema.arguments, *found._schema.returns)]
    on_tensors = any("Tensor" in each for each in types) or str(found) in _ON_NUMBERS
    if found._schema.name.removeprefix("aten::") not in ATEN or not on_tensors:
        raise UnlistedError(f"{found}, which is not on the list of what a bundle may call")


def check_arguments(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments by position and by name where an operation does not take them so, and what makes it random.

    Raises:
        UnlistedError: Naming the argument.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check_schema(target, args, kwargs)
    elif len(args) != FUNCTIONS[_NAMES[target]][1] or kwargs:
        raise UnlistedError(f"{_NAMES[target]} with other than {FUNCTIONS[_NAMES[target]][1]} arguments")


def _check_schema(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    known = {each.name: each for each in target._schema.arguments}
    by_position = [name for name, each in known.items() if not each.kwarg_only]
    if len(args) > len(by_position):
        raise UnlistedError(f"{target} with {len(args)} arguments; it takes {len(by_position)}")
    given = dict(zip(by_position, args, strict=False))
    if surplus := [name for name in kwargs if name in given or name not in known]:
        raise UnlistedError(f"{target} with an argument {surplus[0]!r}")
    given |= kwargs
    if missing := [name for name, each in known.items() if name not in given and not each.has_default_value()]:
        raise UnlistedError(f"{target} without its argument {missing[0]!r}")
    _check_values(target, given)
    if torch.Tag.nondeterministic_seeded in target.tags:
        _check_certain(target, known, given)


def _check_values(target: torch._ops.OpOverload, given: Mapping[str, Any]) -> None:
    for name, fits in _checked_values(target).items():
        if name in given and not fits(given[name]):
            raise UnlistedError(f"{target} with {given[name]!r:.60} for its argument {name!r}")


@functools.cache
def _checked_values(target: torch._ops.OpOverload) -> Mapping[str, Callable[[Any], bool]]:
    """By argument, whether a value is one that the operation may get, where PyTorch doesn't check that itself.

    PyTorch accepts any number as a dtype, a layout or a memory format, and an empty list of tensors, and may crash.
    """
    found: dict[str, Callable[[Any], bool]] = {}
    for argument in target._schema.arguments:
        kind = str(argument.real_type)
        record = next((record for name, record in _RECORDS.items() if name in kind), None)
        if kind.startswith("List[") and "Tensor]" in kind:
            found[argument.name] = _is_not_empty
        elif record is not None:
            found[argument.name] = functools.partial(_is_none_or, record)
    return found


def _is_not_empty(value: Any) -> bool:
    return bool(value != [])


def _is_none_or(record: type, value: Any) -> bool:
    return value is None or isinstance(value, record)


def _check_certain(target: torch._ops.OpOverload, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses the dropout in attention and recurrent layers."""
    name = "train" if "train" in known else "dropout_p"
    if given.get(name, known[name].default_value):
        raise UnlistedError(f"{target} with {name}, which makes it random")


class Numbers:
    """Which nodes of a graph are numbers, and how many bits each may take: so that arithmetic comes to an end."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._lists: set[str] = set()

    def note(self, name: str, target: Callable[..., Any], args: Sequence[Any]) -> None:
        """Takes in the next node, and refuses arithmetic on what is no number or may grow too far.

        Args:
            name: Of the node.
            target: What it calls.
            args: By position, as a bundle holds them.

        Raises:
            UnlistedError: Such arithmetic.
        """
        if isinstance(target, torch._ops.OpOverload):
            returned = [str(each.type) for each in target._schema.returns]
            if len(returned) == 1 and returned[0] in _NUMBER_TYPES:
                self._bits[name] = 64
            elif returned == ["List[int]"]:
                self._lists.add(name)
        elif target is operator.getitem:
            source, index = args
            if not isinstance(source, Ref) or source.name in self._bits or type(index) is not int:
                raise UnlistedError(
                    "operator.getitem of something other than a result, or by something other than a number"
                )
            if source.name in self._lists:
                self._bits[name] = 64
        else:
            self._bits[name] = self._grown(target, args)

    def _grown(self, target: Callable[..., Any], args: Sequence[Any]) -> int:
        sizes = [self._size(arg) for arg in args]
        if target is operator.mul:
            bits = sum(sizes)
        elif target is operator.pow:
            power = args[1]
            if type(power) not in (int, float) or not 0 <= power <= _MOST_BITS:
                raise UnlistedError(f"operator.pow with an exponent of {power}")
            bits = sizes[0] * max(1, math.ceil(power))
        else:
            bits = max(sizes) + 1
        if bits > _MOST_BITS:
            raise UnlistedError(f"{_NAMES[target]} of numbers that may take {bits} bits")
        return bits

    def _size(self, arg: Any) -> int:
        if isinstance(arg, Ref) and arg.name in self._bits:
            return self._bits[arg.name]
        if isinstance(arg, (int, float)):
            return int(arg).bit_length() if isinstance(arg, int) else 64
        raise UnlistedError("arithmetic on something other than numbers")
