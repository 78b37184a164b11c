"""Runs a program on tensors without data, before any kernel does: what a bundle says of its shapes has to come out."""

from __future__ import annotations

import ast
import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from armopt.bundle.program import Program
from armopt.errors import BundleError, first_line
from armopt.ir import graph as g
from armopt.ir.calls import ConvCall, LayerCall, call_from
from armopt.ir.records import Bucket, Dim, Signature
from armopt.kernels import table
from armopt.kernels.geometry import output_size

_META = torch.device("meta")
#: Operations whose results have sizes, or are numbers, that depend on data.
_DEPENDS_ON_DATA = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


def check(program: Program, signature: Signature, sizes: Bucket, most: int, where: str) -> None:
    """Refuses a program that does not run, does other than it says, or takes too much memory.

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
    depends = any(
        isinstance(node.target, torch._ops.OpOverload) and not _DEPENDS_ON_DATA.isdisjoint(node.target.tags)
        for node in program.graph_module.graph.nodes
    )
    # the meta device is ten times as quick, and fake tensors have symbols for what depends on data
    for on_meta in (True, False)[: 1 + depends]:
        run = _DryRun(program)
        try:
            with torch.no_grad(), contextlib.nullcontext() if on_meta else _fake(), _Bounded(most, on_meta=on_meta):
                inputs = [
                    torch.empty([_size(size, known) for size in spec.shape], dtype=getattr(torch, spec.dtype))
                    for spec in signature.specs
                ]
                run(inputs)
        except _UnfitError as error:
            what = str(error)
            break
        except Exception as error:  # whatever an operation says to what it can't work on
            what = f"can't run: {first_line(error)}"
        else:
            return
    node = "" if run.node is None else f": node {g.shown_name(run.node)}"
    raise BundleError(what, where=f"{where}{node}", hint="Make the bundle again")


def _fake() -> Any:
    """Fake tensors; what they need takes a second to import."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_fallback_kernels=False, shape_env=ShapeEnv())


class _UnfitError(Exception):
    """What does not come out."""


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
            kwargs = {**kwargs, "device": _META}
        if any(each.alias_info is not None for each in schema.returns):  # memory of another's
            return func(*args, **kwargs)
        if func in _RULES:
            return _RULES[func](*args, **kwargs)
        if torch.Tag.pointwise in func.tags and (given := _pointwise(func, args, kwargs)) is not None:
            return given
        return self._remembered(func, args, kwargs)

    def _remembered(self, func: Any, args: Any, kwargs: Any) -> Any:
        key, count = (func, _fingerprint(args), _fingerprint(list(kwargs.items()))), len(func._schema.returns)
        if key in self._given:
            made = [torch.empty_strided(*form, dtype=dtype, device=_META) for *form, dtype in self._given[key]]
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
                raise _UnfitError(f"would take {self._taken} bytes of memory, this process may have {self._most}")
        self._storages[place] += 1
        weakref.finalize(tensor, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._storages[place] -= 1
        if not self._storages[place]:
            del self._storages[place]
            self._taken -= size


def _pointwise(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What such an operation gives: its shape by broadcasting, its dtype by calling it on one value."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    if not tensors or "device" in kwargs or any(each.name == "memory_format" for each in func._schema.arguments):
        return None
    shape = torch.broadcast_tensors(*tensors)[0].shape  # type: ignore[no-untyped-call]  # broadcast_shapes imports sympy
    found = func(*map(_one, args), **{name: _one(value) for name, value in kwargs.items()})
    if not isinstance(found, torch.Tensor):
        return None
    like = next((each for each in tensors if each.shape == shape), None)
    if like is None:
        return torch.empty(shape, dtype=found.dtype, device=_META)
    return _like(like, found.dtype)


def _like(x: torch.Tensor, dtype: torch.dtype, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Dense, its dimensions in the order of `x`: empty_like, which imports sympy for the meta device."""
    order = sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim))
    sizes = x.shape if shape is None else shape
    dense = torch.empty([sizes[dim] for dim in order], dtype=dtype, device=_META)
    return dense.permute([order.index(dim) for dim in range(x.dim())])


def _one(value: Any) -> Any:
    """A tensor of as many dimensions and one value."""
    return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    first, *others = [each for each in tensors if each.shape != (0,)] or list(tensors)
    place, shape = range(first.dim())[dim], list(first.shape)
    for other in others:
        if [*other.shape[:place], *other.shape[place + 1 :]] != [*shape[:place], *shape[place + 1 :]]:
            raise _UnfitError(f"puts {_shown(first)} and {_shown(other)} together")
        shape[place] += other.shape[place]
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in tensors))
    return torch.empty(shape, dtype=dtype, device=_META)


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return _cat([each.unsqueeze(dim) for each in tensors], dim)


def _layer_norm(
    x: torch.Tensor, size: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for each in (weight, bias):
        if each is not None and list(each.shape) != list(size):
            raise _UnfitError(f"its weight or bias is {_shown(each)}")
    if not size or list(x.shape[-len(size) :]) != list(size) or not x.is_floating_point():
        raise _UnfitError(f"norms {_shown(x)} over the sizes {list(size)}")
    statistics = torch.empty((*x.shape[: -len(size)], *(1 for _ in size)), dtype=x.dtype, device=_META)
    return _like(x, x.dtype), statistics, statistics.clone()


def _mean(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    dtype = x.dtype if dtype is None else dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise _UnfitError(f"takes the mean of {_shown(x)}")
    gone = {range(max(1, x.dim()))[each] for each in dim or range(x.dim())}
    kept = [1 if i in gone else size for i, size in enumerate(x.shape) if keepdim or i not in gone]
    return torch.empty(kept, dtype=dtype, device=_META)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    range(max(1, x.dim()))[dim]  # IndexError where there is no such dimension
    return _like(x, x.dtype if dtype is None else dtype)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dim() != 3 or b.dim() != 3 or a.dtype != b.dtype or (a.shape[0], a.shape[2]) != b.shape[:2]:
        raise _UnfitError(f"multiplies {_shown(a)} and {_shown(b)}")
    return torch.empty((*a.shape[:2], b.shape[2]), dtype=a.dtype, device=_META)


def _max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    stride = stride or kernel
    known = x.dim() == 4 and all(len(each) == 2 for each in (kernel, stride, padding, dilation)) and not ceil_mode
    fits = (
        known
        and min(*kernel, *stride, *dilation) > 0
        and all(0 <= 2 * p <= k for p, k in zip(padding, kernel, strict=True))
    )
    sizes = output_size(x.shape[2:], kernel, stride, padding, dilation, False, (0, 0)) if fits else [0]
    if min(sizes) < 1:  # torch says what is wrong, and rounds up
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten.max_pool2d_with_indices.default(
            x, kernel, stride, padding, dilation, ceil_mode
        )
        return found
    shape = (*x.shape[:2], *sizes)
    return _like(x, x.dtype, shape), _like(x, torch.int64, shape)


#: Shapes that torch works out in Python, of what most models call: for that it imports torch._dynamo, which takes
#: longer than loading a bundle.
_RULES: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.cat.default: _cat,
    torch.ops.aten.stack.default: _stack,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten._safe_softmax.default: _softmax,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.max_pool2d_with_indices.default: _max_pool2d,
}


def _fingerprint(value: Any) -> Hashable:
    """All that a result's shape and dtype may depend on, of an argument."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(_fingerprint(each) for each in value)
    return type(value), value


class _DryRun:
    """Runs a program node by node and compares its layers with what is recorded. `node` is the one it is at."""

    def __init__(self, program: Program) -> None:
        self.node: fx.Node | None = None
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
            raise _UnfitError(f"adds {_shown(call.other)} to {_shown(result)}")
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
        raise _UnfitError(f"{what} is {_shown(found)}, and {said} {_name(dtype)} is recorded")


def _check_operands(call: LayerCall[torch.Tensor]) -> None:
    """Refuses a weight that its input does not fit, and a bias that does not fit the weight."""
    x, weight = call.x, call.weight
    count, taken, given = weight.shape[0], weight.shape[1], x.shape[-1]
    if isinstance(call, ConvCall):
        taken, given = call.groups * taken, x.shape[1]
        if call.transposed:
            taken, count = count, taken
    if taken != given or not weight.is_floating_point():
        raise _UnfitError(f"its input is {_shown(x)}, and its weight {_shown(weight)}")
    if call.bias is not None and (call.bias.shape != (count,) or not call.bias.is_floating_point()):
        raise _UnfitError(f"its bias is {_shown(call.bias)}, and its weight {_shown(weight)}")
    if call.block < 0:
        raise _UnfitError(f"it rounds after {call.block} terms")


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{'x'.join(map(str, value.shape)) or 'scalar'} {_name(value.dtype)}"


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
        raise _UnfitError(f"there is no size for the dimension {size[:100]}")

    try:
        return value(ast.parse(size[:1000], mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _UnfitError(f"there is no size for the dimension {size[:100]}") from None
