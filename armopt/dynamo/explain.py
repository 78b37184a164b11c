"""What runs where in a model that was compiled: every layer's kernel, what was left alone, and the bytes held."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from armopt.dynamo import graphs
from armopt.dynamo.programs import Programmed
from armopt.ir.records import Product, Remainder, Skip
from armopt.plan import remainder


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear or convolution of one program.

    Attributes:
        graph: Where in the source its graph begins.
        bucket: The sizes that it was planned for.
        node: Its name.
        op: ``linear`` or ``conv``.
        shape: Of the input.
        planned: The kernel planned.
        kernel: The kernel that runs; the planned one's twin where this machine is not the target.
        precision: ``bf16``, ``bf16-weights`` or ``fp32``.
        reason: Why it was planned, and why another one runs if so.
    """

    graph: str
    bucket: Mapping[str, int]
    node: str
    op: str
    shape: tuple[int, ...]
    planned: str
    kernel: str
    precision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of a model.

    Attributes:
        layers: In every program that was made for it so far.
        left_alone: What runs as PyTorch runs it, and why.
        not_in_bf16: What multiplies in FP32, for each program; then what no program holds, by module.
        original_bytes: Of the model's parameters and buffers in memory.
        program_bytes: Of what programs hold besides: weights rounded and packed.
    """

    layers: tuple[Layer, ...]
    left_alone: tuple[Skip, ...]
    not_in_bf16: tuple[Remainder, ...]
    original_bytes: int
    program_bytes: int


def explain(model: torch.nn.Module) -> Explanation:
    """Explains a model that ``armopt.compile`` or ``torch.compile(…, backend="armopt")`` made and that has run.

    Args:
        model: That model, or the one it was made from.
    """
    own = [*model.parameters(), *model.buffers()]
    known = {id(tensor) for tensor in own}
    layers: list[Layer] = []
    left: list[Skip] = []
    rest: list[Remainder] = []
    compiled: set[int] = set()
    held: list[torch.Tensor] = []
    for graph in graphs.graphs():
        for weights in graph.held:
            if not weights.tensors or not all(id(tensor) in known for tensor in weights.tensors):
                continue
            held += weights.held
            compiled |= {id(tensor) for tensor in weights.tensors}
            for programmed in weights.programs:
                layers += _layers(graph.name, programmed)
                rest.append(remainder.find(programmed.plan, graph.name))
                left += [Skip(f"{graph.name}: {skip.node}", skip.reason) for skip in programmed.plan.refused]
    outside = _outside(model, compiled)
    left += [Skip(product.node, product.reason) for product in outside] + [*_failed(known), *_divided(model)]
    if outside:
        rest.append(Remainder("", {}, 0, outside, 0, 0))
    originals = _storages(own)
    packed = {address: size for address, size in _storages(held).items() if address not in originals}
    return Explanation(
        tuple(layers), tuple(dict.fromkeys(left)), tuple(rest), sum(originals.values()), sum(packed.values())
    )


def _failed(known: Collection[int]) -> Iterable[Skip]:
    """The graphs on these tensors, by identity, at which armopt failed."""
    failures = [(graph.name, graph.failure) for graph in graphs.graphs() if graph.failure is not None]
    return [Skip(name, each.reason) for name, each in failures if any(id(tensor) in known for tensor in each.tensors)]


def _divided(model: torch.nn.Module) -> Iterable[Skip]:
    """The modules that ``armopt.compile`` left to Python, compiling their parts, and why."""
    forwards: Iterable[Any] = (part.forward for part in model.modules())
    return [Skip(each.title, each.divided) for each in forwards if getattr(each, "divided", "")]


def _outside(model: torch.nn.Module, compiled: Set[int]) -> tuple[Product, ...]:
    """The modules of which no program holds the matrices, with their bytes."""
    found = []
    for name, part in model.named_modules():
        matrices = [p for p in part.parameters(recurse=False) if p.dim() > 1 and id(p) not in compiled]
        if matrices:
            reason = _RECURRENT if isinstance(part, torch.nn.RNNBase) else _UNSEEN
            size = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
            found.append(Product(name or type(model).__name__, type(part).__name__, 0, size, reason))
    return tuple(found)


_RECURRENT = "recurrent: each step needs the one before, so PyTorch's own kernel runs it whole"
_UNSEEN = "no program holds it: it was not called so far, or Python runs it"


def _layers(graph: str, programmed: Programmed) -> Iterable[Layer]:
    ran = {bound.node: bound for bound in programmed.kernels}
    for entry in programmed.plan.decisions:
        bound = ran.get(entry.node)
        other = bound is not None and bound.kernel != entry.kernel
        yield Layer(
            graph=graph,
            bucket=dict(programmed.plan.bucket),
            node=entry.node,
            op=entry.op,
            shape=entry.shape,
            planned=entry.kernel,
            kernel=bound.kernel if bound is not None else entry.kernel,
            precision=entry.precision,
            reason=f"{entry.reason}; {bound.reason}" if bound is not None and other else entry.reason,
        )


def _storages(tensors: Iterable[torch.Tensor]) -> dict[Any, int]:
    """Bytes by address, each memory once."""
    found: dict[Any, int] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:  # packed by oneDNN: opaque
            found[id(tensor)] = tensor.numel() * tensor.element_size()
    return found
