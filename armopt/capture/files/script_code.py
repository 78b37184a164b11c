"""The code of a TorchScript archive: that it only declares as it is loaded, and calls nothing but what is allowed."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from armopt.ir import aten

_SCALARS = """
Bool Complex ComplexImplicit Delete Float FloatImplicit Int IntImplicit ScalarImplicit Size __contains__
__derive_index __getitem__ __is__ __isnot__ __not__ __range_length __round_to_zero_floordiv _infer_size _set_item
_shape_as_tensor _size_if_not_equal _tensor_to_list _upsample_lanczos2d_aa _list_to_tensor _unwrap_optional append
as_tensor broadcast_shapes can_cast clear cpu dict dim divmod element_size endswith extend fabs floordiv format get
hash index insert is_autocast_enabled is_autocast_cpu_enabled is_contiguous is_grad_enabled is_same_size is_scripting
is_signed items keys len list mathremainder nbytes numel ord pop promote_types remove requires_grad_ result_type
reverse setdefault sorted startswith storage_offset str stride tensor update values warn cross_entropy_loss nll_loss
nll_loss_nd mse_loss l1_loss smooth_l1_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits __interpolate
__upsample __upsample_bilinear __upsample_nearest _batch_norm_impl_index _pack_padded_sequence _pad_packed_sequence
grid_sampler degrees radians is_neg is_conj is_inference output_nr is_leaf data device dtype layout
"""
#: Operations of TorchScript on numbers and lists, which capture evaluates or refuses.
_ATEN = frozenset(_SCALARS.split())
_PRIM_NAMES = """
BroadcastSizes CallFunction CallMethod Constant ConstantChunk CreateObject DictConstruct EnumName EnumValue Enter Exit
GetAttr If ListConstruct ListUnpack Loop ModuleContainerIndex NumToTensor RaiseException SetAttr TupleConstruct
TupleIndex TupleSlice TupleUnpack TypeCheck Uninitialized abs data device dtype id index is_cpu is_cuda is_meta
is_mkldnn is_mps is_mtia is_nested is_quantized is_sparse is_sparse_csr is_xla is_xpu is_vulkan is_ipu is_maia
isinstance itemsize layout max min name nbytes ndim rangelist requires_grad shape tolist type unchecked_cast
unchecked_unwrap_optional Print StringIndex grad
"""
_PRIM = frozenset(_PRIM_NAMES.split())
_TORCHVISION = frozenset(("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"))
_PROFILER = frozenset(("_record_function_enter", "_record_function_enter_new", "_record_function_exit"))
#: What looks like a call in the text and is a form of the language.
_FORMS = frozenset(
    ("annotate", "unchecked_cast", "uninitialized", "getattr", "range", "isinstance", "int", "float", "bool", "str")
)
#: Characters that text may grow to where it is put together: for messages of errors.
_MOST_TEXT = 1 << 16
#: Times that a loop may run: each becomes calls of its own.
MOST_TURNS = 10_000
_FORBIDDEN = re.compile(rb"__(?:set|get)state__|torch[\s\\]*\.[\s\\]*classes|[^\x20-\x7e\n]")


class UnshownError(Exception):
    """What a file holds that can't be shown to be harmless."""


def check_source(data: bytes, name: str) -> ast.Module:
    """Refuses code that runs as it is loaded, and calls of anything but operations on tensors, numbers and lists."""
    if found := _FORBIDDEN.search(data):
        raise UnshownError(f"{found[0].decode(errors='replace')!r} in {name}")
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} is no code: {error}") from None
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            _check_class(statement, name)
        elif isinstance(statement, ast.FunctionDef):
            _check_function(statement, name)
        else:
            raise UnshownError(f"{_shown(statement)} in {name}")
    return tree


def _check_class(described: ast.ClassDef, name: str) -> None:
    if described.decorator_list or described.keywords:
        raise UnshownError(f"a decorated class in {name}")
    for statement in described.body:
        match statement:
            case ast.FunctionDef():
                _check_function(statement, name)
            case ast.Pass():
                pass
            case ast.AnnAssign(value=value) if value is None or _is_literal(value):
                pass
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id="__annotations__"))], value=value) if _is_type(
                value
            ):
                pass
            case ast.Assign(targets=[ast.Name()], value=value) if _is_literal(value):
                pass
            case _:
                raise UnshownError(f"{_shown(statement)} in {name}")


def _check_function(described: ast.FunctionDef, name: str) -> None:
    given = described.args
    for default in (*given.defaults, *filter(None, given.kw_defaults)):
        if not _is_literal(default):
            raise UnshownError(f"the default {_shown(default)} in {name}")
    if described.decorator_list:
        raise UnshownError(f"a decorated function in {name}")
    _texts(described, name)
    functions = _functions(described)
    for node in _walk(described):
        if isinstance(node, ast.Attribute):
            _check_operation(node, name)
        elif isinstance(node, ast.Call):
            _check_call(node, functions, name)
        elif isinstance(node, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.JoinedStr, ast.FunctionDef, ast.BinOp)):
            raise UnshownError(f"{_shown(node)} in {name}")


def _walk(described: ast.FunctionDef) -> Iterator[ast.AST]:
    for statement in described.body:
        yield from ast.walk(statement)


def _functions(described: ast.FunctionDef) -> set[str]:
    """Names that stand for functions of the file, and for nothing else."""
    names, others = set[str](), set[str]()
    for node in _walk(described):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _root(node.value) == "__torch__":
            names.add(node.targets[0].id)
        elif isinstance(node, ast.Assign):
            others |= {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, (ast.For, ast.AnnAssign, ast.AugAssign)):
            others |= {each.id for each in ast.walk(node.target) if isinstance(each, ast.Name)}
    return names - others


def _texts(described: ast.FunctionDef, name: str) -> None:
    """Refuses text that grows: torch evaluates what depends on constants alone as it compiles."""
    lengths: dict[str, int] = {}
    assigned = [node for node in _walk(described) if isinstance(node, ast.Assign)]
    for node in sorted(assigned, key=lambda each: (each.lineno, each.col_offset)):
        length = _length(node.value, lengths)
        if length > _MOST_TEXT:
            raise UnshownError(f"text of {length} characters in {name}")
        for target in node.targets:
            if isinstance(target, ast.Name):
                lengths[target.id] = max(length, lengths.get(target.id, 0))


def _length(value: ast.expr, known: Mapping[str, int]) -> int:
    """Most characters of text that an expression may stand for; 0 where it is none."""
    match value:
        case ast.Constant(value=str(text)):
            return len(text)
        case ast.Name(id=name):
            return known.get(name, 0)
        case ast.Call(func=ast.Attribute(attr="mul" | "mul_"), args=args) if any(_length(arg, known) for arg in args):
            return _MOST_TEXT + 1
        case ast.Call(func=ast.Attribute(attr="add" | "add_" | "format" | "str"), args=args):
            lengths = [_length(arg, known) for arg in args]
            return sum(lengths) + 64 * len(args) if any(lengths) else 0  # a number takes some characters
    return 0


def dotted(node: ast.expr) -> str:
    """``a.b.c`` as text; empty where it begins with something other than a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _root(node: ast.expr) -> str:
    return dotted(node).partition(".")[0]


def _check_operation(node: ast.Attribute, name: str) -> None:
    """Looks at ``torch.NAME`` and ``ops.PACKAGE.NAME``."""
    parts = dotted(node).split(".")
    root = parts[0]
    if root == "torch" and len(parts) == 2 and parts[1] in ("nn", "jit", "device", "dtype", "Tensor", "Generator"):
        return
    if (root == "torch" and not _is_allowed("aten", parts[1])) or (
        root == "ops" and len(parts) > 2 and not _is_allowed(parts[1], parts[2])
    ):
        raise UnshownError(f"a call of {'.'.join(parts[:3])} in {name}")


def _check_call(node: ast.Call, functions: set[str], name: str) -> None:
    match node.func:
        case ast.Name(id=called) if called in _FORMS or called in functions:
            return
        case ast.Attribute(attr=called) as method:
            if _root(method) not in ("torch", "ops", "__torch__", "CONSTANTS") and not _is_method(called):
                raise UnshownError(f"a call of {called} in {name}")
            return
        case ast.Name() | ast.Subscript() if _root(node.func) in ("__torch__",):
            return
    raise UnshownError(f"a call of {_shown(node.func)} in {name}")


def _is_method(name: str) -> bool:
    """Whether a method may have that name: it is not one of an operation that is not allowed."""
    return _is_allowed("aten", name) or name not in _operations()


@functools.cache
def _operations() -> frozenset[str]:
    return frozenset(each.name.partition("::")[2] for each in torch._C._jit_get_all_schemas())


def _is_allowed(package: str, name: str) -> bool:
    match package:
        case "aten":
            return aten.in_file(name) or name in _ATEN
        case "prim":
            return name in _PRIM
        case "torchvision":
            return name in _TORCHVISION
        case "profiler":
            return name in _PROFILER
    return False


def _is_literal(value: ast.expr) -> bool:
    """Whether a value is written out: it needs no evaluation."""
    match value:
        case ast.Constant():
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return True
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return all(map(_is_literal, items))
        case ast.Name(id="inf" | "nan" | "None" | "True" | "False"):
            return True
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return True
        case ast.Call(func=ast.Name(id="annotate"), args=[kind, inner], keywords=[]):
            return _is_type(kind) and _is_literal(inner)
        case ast.Attribute(value=ast.Name(id="CONSTANTS")):
            return True
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="torch"), attr="device"), args=[ast.Constant()], keywords=[]
        ):
            return True
    return False


def _is_type(value: ast.expr) -> bool:
    match value:
        case ast.Name() | ast.Constant(value=None):
            return True
        case ast.Attribute(value=inner):
            return _is_type(inner)
        case ast.Subscript(value=outer, slice=inner):
            return _is_type(outer) and _is_type(inner)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return all(map(_is_type, items))
    return False


def _shown(node: ast.AST) -> str:
    return repr(ast.unparse(node).partition("\n")[0][:80])


def check_graph(graph: Any) -> None:
    """Looks at what was compiled: only operations that are allowed, and loops that end.

    Raises:
        UnshownError: Naming the operation.
    """
    blocks = [(graph, 1)]
    while blocks:
        block, times = blocks.pop()
        for node in block.nodes():
            package, _, name = node.kind().partition("::")
            if not _is_allowed(package, name):
                raise UnshownError(f"a call of {package}.{name}")
            inner = times * (_turns(node) if node.kind() == "prim::Loop" else 1)
            if inner > MOST_TURNS:
                raise UnshownError(f"a loop of {inner} turns")
            blocks.extend((each, inner) for each in node.blocks())


def _turns(loop: Any) -> int:
    """How often a loop runs, where that is written out; 1 where a condition ends it, which is not converted."""
    turns, condition = next(loop.inputs()).toIValue(), next(next(loop.blocks()).outputs()).toIValue()
    return max(1, turns) if isinstance(turns, int) and condition is True else 1
