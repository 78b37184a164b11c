"""Runs a program on tensors without data, before any kernel does: what a bundle says of its shapes has to come out."""

from __future__ import annotations

import ast
import contextlib
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from armopt.bundle.program import Program, Result
from armopt.bundle.shape_rules import META, RULES, UnfitError, pointwise, shown
from armopt.errors import BundleError, first_line
from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LayerCall, call_from
from armopt.ir.records import Bucket, Dim, Signature
from armopt.kernels import table

#: Who changes torch for a while.
_ONE_AT_A_TIME = threading.RLock()
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
#: Operations whose results have sizes, or are numbers, that depend on data.
_DEPENDS_ON_DATA = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


def check(program: Program, signature: Signature, sizes: Bucket, most: int, where: str) -> Mapping[str, Result]:
    """Refuses a program that does not run, does other than it says, or takes too much memory.

    Returns:
        What each node gives, where that is one tensor.

    Args:
        program: The program; nothing of it runs on data.
        signature: Of its part.
        sizes: The size of each dynamic dimension.
        most: Bytes that its inputs, weights and results may take at a time.
        where: What it was read from.

    Raises:
        BundleError: Naming the node.
    """
    known = {each.expression: sizes[each.name] for each in signature.symbols if each.name in sizes} | dict(sizes)
    # the meta device is ten times as quick, and fake tensors have symbols for what depends on data
    for on_meta in (True, False):
        run = _DryRun(program)
        try:
            with torch.no_grad(), _numbers() if on_meta else _fake(), _Bounded(most, on_meta=on_meta):
                inputs = [
                    torch.empty([_size(size, known) for size in spec.shape], dtype=getattr(torch, spec.dtype))
                    for spec in signature.specs
                ]
                run(inputs)
        except UnfitError as error:
            what = str(error)
            break
        except Exception as error:  # whatever an operation says to what it can't work on
            what = f"can't run: {first_line(error)}"
            if run.node is None or not _may_depend_on_data(run.node.target):
                break
        else:
            return run.results
    node = "" if run.node is None else f": node {g.shown_name(run.node)}"
    raise BundleError(what, where=f"{where}{node}", hint="Make the bundle again")


def _may_depend_on_data(target: Any) -> bool:
    """Whether an operation's result may have sizes that depend on data.

    Composites have no tag that says so, and torchvision's operations (nms) have none at all.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "torchvision":
        return True
    with contextlib.suppress(
        RuntimeError
    ):  # some overloads are TorchScript's alone, and the dispatcher has none of them
        return target.has_kernel_for_dispatch_key(_COMPOSITE) or not _DEPENDS_ON_DATA.isdisjoint(target.tags)
    return False


@contextlib.contextmanager
def _numbers() -> Iterator[None]:
    """Sizes are numbers: what torch checks of them needs none of its symbols, which take a second to import."""
    checked = torch._check_with

    def check(error: type[Exception], condition: Any, message: Any) -> None:
        if condition is not True:
            checked(error, condition, message)

    with _ONE_AT_A_TIME, mock.patch.object(torch, "_check_with", check):
        yield


def _fake() -> Any:
    """Fake tensors; what they need takes a second to import."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_fallback_kernels=False, shape_env=ShapeEnv())


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bounds the memory that tensors would take if they had data.

    On the meta device what an operation gave is remembered: layers repeat, and working out some shapes takes long.
    """

    def __init__(self, most: int, *, on_meta: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most, self._taken, self._on_meta = most, 0, on_meta
        self._storages: dict[int, int] = {}
        self._given: dict[Hashable, list[tuple[Any, ...]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles these calls: without a wrapper that says so, which would import all of torch._dynamo."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of an operation, without data whatever device is asked for."""
        kwargs = kwargs or {}
        found = self._on_meta_device(func, args, kwargs) if self._on_meta else func(*args, **kwargs)
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor)
        return found

    def _on_meta_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        schema = func._schema
        if any(each.name == "device" for each in schema.arguments):
            kwargs = {**kwargs, "device": META}
        if func in RULES:
            return RULES[func](*args, **kwargs)
        if any(each.alias_info is not None for each in schema.returns):  # memory of another's
            return func(*args, **kwargs)
        if torch.Tag.pointwise in func.tags and (given := pointwise(func, args, kwargs)) is not None:
            return given
        return self._remembered(func, args, kwargs)

    def _remembered(self, func: Any, args: Any, kwargs: Any) -> Any:
        key, count = (func, _fingerprint(args), _fingerprint(list(kwargs.items()))), len(func._schema.returns)
        if key in self._given:
            made = [torch.empty_strided(*form, dtype=dtype, device=META) for *form, dtype in self._given[key]]
            return made[0] if count == 1 else tuple(made)
        found = func(*args, **kwargs)
        results = found if isinstance(found, tuple) else (found,)
        if len(results) == count and all(isinstance(each, torch.Tensor) for each in results):
            self._given[key] = [(each.shape, each.stride(), each.dtype) for each in results]
        return found

    def _take(self, tensor: torch.Tensor) -> None:
        """Counts the bytes of a result as long as it or a view of it lives."""
        storage = tensor.untyped_storage()
        size: Any = storage.nbytes()
        if not isinstance(size, int):  # it depends on data
            return
        place = storage._cdata
        if place not in self._storages:
            self._storages[place] = 0
            self._taken += size
            if self._taken > self._most:
                raise UnfitError(f"would take {self._taken} bytes of memory, this process may have {self._most}")
        self._storages[place] += 1
        weakref.finalize(tensor, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._storages[place] -= 1
        if not self._storages[place]:
            del self._storages[place]
            self._taken -= size


def _fingerprint(value: Any) -> Hashable:
    """All that a result's shape and dtype may depend on, of an argument."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(each) for each in value)
    return type(value), value


class _DryRun:
    """Runs a program node by node and compares its layers with what is recorded. `node` is the one it is at.

    `results` has each tensor that a node gives, where its size doesn't depend on data.
    """

    def __init__(self, program: Program) -> None:
        self.node: fx.Node | None = None
        self.results: dict[str, Result] = {}
        self._program = program
        self._weights: dict[str, torch.Tensor] = {}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> None:
        """Runs it; values go after their last use."""
        nodes, given = list(self._program.graph_module.graph.nodes), iter(inputs)
        last = {source: node for node in nodes for source in node.all_input_nodes}
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            self.node = node
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._weight(str(node.target))
            elif node.op == "call_function":
                args, kwargs = (fx.map_arg(each, values.__getitem__) for each in (node.args, node.kwargs))
                values[node] = self._call(node, args, kwargs)
            found = values.get(node)
            if isinstance(found, torch.Tensor) and all(isinstance(size, int) for size in found.shape):
                self.results[node.name] = Result(tuple(found.shape), found.dtype)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del values[source]
            if not node.users:
                values.pop(node, None)

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self._weights:
            stored: torch.Tensor = getattr(self._program.graph_module, name)
            self._weights[name] = torch.empty(stored.shape, dtype=stored.dtype)
        return self._weights[name]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a call gives; that of a layer is compared."""
        site = self._program.sites.get(node.name)
        if site is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        call = call_from(node.target, args)
        dtype = table.get(call.kernel).activations
        _compare("its input", call.x, site.shape, dtype)
        _check_operands(call)
        result = call.run()
        _compare("its output", result, self._program.shapes[node.name], dtype)
        if call.other is not None and not _spreads_to(call.other.shape, result.shape):
            raise UnfitError(f"adds {shown(call.other)} to {shown(result)}")
        return result


def _spreads_to(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(size in (1, other) for size, other in pairs)


def _compare(what: str, found: Any, shape: Sequence[int | None], dtype: torch.dtype) -> None:
    """Refuses a tensor that is not what is recorded; sizes that depend on data, or are dynamic, may be any."""
    known = isinstance(found, torch.Tensor) and found.dtype == dtype and found.dim() == len(shape)
    if not known or any(
        isinstance(size, int) and wanted is not None and size != wanted
        for size, wanted in zip(found.shape, shape, strict=True)
    ):
        said = "x".join("?" if size is None else str(size) for size in shape)
        raise UnfitError(f"{what} is {shown(found)}, and {said} {_name(dtype)} is recorded")


def _check_operands(call: LayerCall[torch.Tensor]) -> None:
    """Refuses a weight that its input does not fit, and a bias that does not fit the weight."""
    x, weight = call.x, call.weight
    count, taken, given = weight.shape[0], weight.shape[1], x.shape[-1]
    if isinstance(call, ConvCall):
        taken, given = call.groups * taken, x.shape[1]
        if call.transposed:
            taken, count = count, taken
    if taken != given or not weight.is_floating_point():
        raise UnfitError(f"its input is {shown(x)}, and its weight {shown(weight)}")
    if call.bias is not None and (call.bias.shape != (count,) or not call.bias.is_floating_point()):
        raise UnfitError(f"its bias is {shown(call.bias)}, and its weight {shown(weight)}")
    if call.block < 0:
        raise UnfitError(f"it rounds after {call.block} terms")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


#: What torch.export writes sizes with that depend on others.
_ARITHMETIC: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _size(size: Dim, sizes: Mapping[str, int]) -> int:
    """A dimension as a number: it is one, a symbol, or arithmetic on symbols such as ``2*s0``."""
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        raise UnfitError(f"there is no size for the dimension {size[:100]}")

    try:
        return value(ast.parse(size[:1000], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UnfitError(f"there is no size for the dimension {size[:100]}") from None
