"""Dynamo's graphs: for each the programs of every set of weights, at every bucket of shapes."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from armopt import capture
from armopt.capture.widening import widen_graph
from armopt.compiler import repair
from armopt.compiler.recipe import Prepared
from armopt.dynamo.process import PROCESS
from armopt.dynamo.programs import Forward, Programmed, Settings, make_program
from armopt.errors import ArmoptError, PassError
from armopt.ir import buckets
from armopt.ir import graph as g
from armopt.ir.calls import call_of, layers
from armopt.ir.records import Bucket, Plan, Skip
from armopt.kernels import sites, table

#: Sets of weights for which one graph keeps its programs: one for each layer that shares its code, times each model.
MOST_WEIGHTS = 256
#: The environment variable under which an error of armopt's own is raised, not worked around; tests set it.
RAISE = "ARMOPT_RAISE"


class Graph:
    """One graph of Dynamo. Called with a list of all its inputs, weights among them; the list is emptied.

    Attributes:
        name: Where it comes from, for people.
        settings: How it is planned.
    """

    _boxed_call = True  # what AOTAutograd looks for
    #: Why PyTorch runs it as it is, where armopt failed at it.
    failure: Failure | None = None

    def __init__(
        self,
        graph_module: fx.GraphModule,
        settings: Settings,
        name: str,
        weights: dict[int, str],
        *,
        half: bool = False,
    ) -> None:
        """Wraps a graph of ATen operations.

        Args:
            graph_module: Functional, but for copies into its inputs at its end; every node carries its fake value.
            settings: How to plan it.
            name: Where it comes from.
            weights: Position among the inputs -> name, of parameters and buffers.
            half: Whether weights are in half precision: programs take them as FP32.
        """
        self.half = half
        self.name = name
        self.settings = settings
        placeholders = list(capture.placeholders(graph_module))
        written = {node.name for node in g.written_nodes(graph_module.graph)}
        self.weights = {i: n for i, n in weights.items() if placeholders[i].name not in written}
        self.inputs = [i for i in range(len(placeholders)) if i not in self.weights]
        self._module = graph_module
        self._names = [node.name for node in placeholders]
        self.sizes = _sizes(placeholders, self.inputs)
        self._held: list[Weights] = []
        PROCESS.graphs.add(self)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Runs the graph."""
        try:
            forward = self._forward(args) if self.failure is None else None
        except Exception as error:
            self._fail(args, error)
            forward = None
        inputs = list(args) if forward is None else [args[i] for i in self.inputs]
        args.clear()
        return self._module.forward(*inputs) if forward is None else forward(*inputs)

    @property
    def held(self) -> tuple[Weights, ...]:
        """For each set of weights that is alive, its programs."""
        return tuple(each for each in self._held if each.alive)

    def freeze(self, tensors: dict[int, torch.Tensor]) -> fx.GraphModule:
        """The graph with weights as constants."""
        return capture.freeze(self._module, {self._names[i]: (n, tensors[i]) for i, n in self.weights.items()})

    def _forward(self, args: Sequence[Any]) -> Forward:
        """The program for the weights and shapes of a call."""
        weights = next((each for each in self._held if each.fits(args)), None) or self._find(args)
        programmed = weights.program(args)
        if PROCESS.watch.ran is not None:
            PROCESS.watch.ran.append((weights, weights.index(programmed)))
        return programmed.forward

    def _fail(self, args: Sequence[Any], error: Exception) -> None:
        """Leaves the graph to PyTorch where armopt itself failed at it; says so once.

        Raises:
            Exception: The error, where it is the user's, where tests want to see it, or where PyTorch can't run the
                graph either, because weights of it are released.
        """
        weights = [args[i] for i in self.weights]
        users = isinstance(error, ArmoptError) and not isinstance(error, PassError)
        if users or os.environ.get(RAISE) or any(map(is_released, weights)):
            raise error
        said = f"{error.where}: {error.what}" if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
        self.failure = Failure(f"armopt failed at it: {said}", tuple(map(weakref.ref, weights)))
        self._held = []
        PROCESS.warn_once(
            f"{self.name}: PyTorch's own kernels run it, as armopt failed at it: {said}",
            f"The result is right. It is a bug in armopt: please report it with the model. {RAISE}=1 makes it an error",
            said,
        )

    def _find(self, args: Sequence[Any]) -> Weights:
        with PROCESS.lock:
            for each in self._held:
                if each.fits(args):
                    return each
            made = Weights(self, args)
            others = [each for each in self._held if each.alive and not each.replaced_by(args)]
            self._held = [made, *others][:MOST_WEIGHTS]
            return made


class Failure(NamedTuple):
    """Why a graph is left to PyTorch, and the weights that it reads."""

    reason: str
    weights: tuple[weakref.ref[torch.Tensor], ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of the weights that are alive."""
        return tuple(tensor for each in self.weights if (tensor := each()) is not None)


class Weights:
    """The programs of one graph for one set of weights, at each bucket of its shapes."""

    def __init__(self, graph: Graph, args: Sequence[Any]) -> None:
        self._graph = graph
        forget = functools.partial(_forget, weakref.ref(graph))
        self._watched = [_Watched(i, weakref.ref(args[i], forget), *_state(args[i])) for i in graph.weights]
        #: The prepared graph and which inputs its constants were, for further buckets; it holds folded weights in FP32.
        self._prepared: tuple[Prepared, Mapping[str, int]] | None = None
        self._planned: list[tuple[Bucket, Programmed]] = []
        self._by_bucket: dict[tuple[int, ...], int] = {}
        self._relevant: list[tuple[str, int, int | None]] = []
        #: Weights in BF16 of plans that are tried.
        self._trials: dict[str, torch.Tensor] = {}
        self._plan(args, first=True)

    @property
    def programs(self) -> tuple[Programmed, ...]:
        """One for each bucket that was met."""
        return tuple(programmed for _, programmed in self._planned)

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """All tensors that the programs need: constants, packed weights, and what stands for released ones."""
        released = [half for tensor in self.tensors if (half := PROCESS.released.get(tensor)) is not None]
        return (*(tensor for programmed in self.programs for tensor in programmed.constants), *released)

    @property
    def halved(self) -> tuple[torch.Tensor, ...]:
        """The weights whose values all programs use in BF16 alone."""
        used: dict[int, frozenset[torch.dtype]] = {}
        for programmed in self.programs:
            for position, dtypes in programmed.dtypes.items():
                used[position] = used.get(position, frozenset()) | dtypes
        alone = {position for position, dtypes in used.items() if dtypes == {torch.bfloat16}}
        weights = [each.reference() for each in self._watched if each.position in alone]
        return tuple(t for t in weights if t is not None and t.dim() > 1 and t.dtype != torch.float16)

    @property
    def alive(self) -> bool:
        """Whether anyone can still call with these weights."""
        return all(each.reference() is not None for each in self._watched)

    def watch(self) -> None:
        """Takes the weights' values as they are now for the ones that the programs hold."""
        self._prepared = None
        self._watched = [
            each._replace(address=state[0], version=state[1])
            for each in self._watched
            if (tensor := each.reference()) is not None and (state := _state(tensor))
        ]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The weights as the model holds them."""
        return tuple(t for each in self._watched if (t := each.reference()) is not None)

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether these are the very weights, unchanged."""
        for position, reference, address, version in self._watched:
            tensor: torch.Tensor = args[position]
            if reference() is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def replaced_by(self, args: Sequence[Any]) -> bool:
        """Whether these are the same tensors with other values."""
        return bool(self._watched) and all(each.reference() is args[each.position] for each in self._watched)

    def program(self, args: Sequence[Any]) -> Programmed:
        """The program for the shapes of a call."""
        if not self._relevant:
            return self._planned[0][1]
        key = buckets.round_up([args[i] if d is None else args[i].shape[d] for _, i, d in self._relevant])
        found = self._by_bucket.get(key)
        return self._planned[found][1] if found is not None else self._extend(args, key)

    def swap(self, index: int, programmed: Programmed) -> None:
        """Puts another program in the place of one."""
        self._planned[index] = (self._planned[index][0], programmed)

    def twin(self, index: int, plan: Plan) -> Programmed:
        """The portable twins of a program with another plan: to be measured, not to stay."""
        before = self.programs[index]
        with torch.inference_mode(False), torch.no_grad():
            prepared, _ = self._prepare(self._weights())
            program = self._graph.settings.recipe.lower(prepared, plan, before.values, self._trials)
        return replace(before, plan=plan, forward=program.graph_module.forward)

    def index(self, programmed: Programmed) -> int:
        """The number of one of its programs."""
        return next(i for i, (_, each) in enumerate(self._planned) if each is programmed)

    def keep(self, index: int, plan: Plan) -> None:
        """Makes a plan that was tried the one of a program. What it takes out of BF16 leaves it in later plans too."""
        before = self.programs[index]
        changed = [new for old, new in zip(before.plan.decisions, plan.decisions, strict=True) if old != new]
        with PROCESS.lock, torch.inference_mode(False), torch.no_grad():
            prepared, names = self._prepare(self._weights())
            repaired, own = self._graph.settings.repaired, self._weights_of_layers(prepared, names)
            for entry in changed:
                if (tensor := own.get(entry.node)) is not None:
                    repaired[tensor] = max(repaired.get(tensor, 0), table.get(entry.kernel).steps_out_of_bf16)
            if changed:
                self.swap(index, self._make(prepared, names, plan, before.values))

    def settle(self) -> None:
        """Forgets what served trials alone."""
        self._trials.clear()
        self._drop_prepared()

    def _weights_of_layers(self, prepared: Prepared, names: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Layer -> the model's own tensor that its weight is, or is made of."""
        weights = self._weights()
        found: dict[str, torch.Tensor] = {}
        for node in layers(prepared.graph_module.graph):
            sources = g.source_constants(call_of(node).weight) & names.keys()
            matrices = [weights[names[name]] for name in sorted(sources) if weights[names[name]].dim() > 1]
            if matrices:
                found[g.shown_name(node)] = matrices[0]
        return found

    def _weights(self) -> dict[int, torch.Tensor]:
        """The weights by their position among the inputs."""
        return {each.position: t for each in self._watched if (t := each.reference()) is not None}

    def _extend(self, args: Sequence[Any], key: tuple[int, ...]) -> Programmed:
        """A new plan for a new bucket; past the limit, the nearest there is."""
        with PROCESS.lock:
            if key in self._by_bucket:
                return self._planned[self._by_bucket[key]][1]
            if len(self._planned) < self._graph.settings.plans:
                return self._plan(args)
            sizes = dict(zip([symbol for symbol, _, _ in self._relevant], key, strict=True))
            return buckets.nearest(self._planned, sizes)

    def _plan(self, args: Sequence[Any], first: bool = False) -> Programmed:
        settings = self._graph.settings
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            prepared, names = self._prepare(args)
            if first:
                symbols = _symbols_of_layers(prepared.graph_module)
                self._relevant = [entry for entry in self._graph.sizes if entry[0] in symbols]
            found = [(s, args[i] if d is None else args[i].shape[d]) for s, i, d in self._relevant]
            key = buckets.round_up([size for _, size in found])
            bucket = dict(zip([symbol for symbol, _ in found], key, strict=True))
            values = {s: args[i] if d is None else args[i].shape[d] for s, i, d in self._graph.sizes} | bucket
            chosen = settings.recipe.plan(prepared, bucket, values)
            if settings.repaired:
                known = {site.node: site for site in sites.find(prepared.graph_module, values)}
                own = self._weights_of_layers(prepared, names).items()
                steps = {node: settings.repaired[tensor] for node, tensor in own if tensor in settings.repaired}
                chosen = repair.apply(chosen, known, steps)
            programmed = self._make(prepared, names, chosen, values)
        if not programmed.plan.decisions:
            _warn_of_nothing(self._graph.name, programmed.plan.refused, self.tensors)
        self._by_bucket[key] = len(self._planned)
        self._planned.append((bucket, programmed))
        self._drop_prepared()
        return programmed

    def _make(self, prepared: Prepared, names: Mapping[str, int], chosen: Plan, values: Bucket) -> Programmed:
        PROCESS.made += 1
        own = {tensor.data_ptr() for tensor in self.tensors}
        return make_program(prepared, chosen, values, self._graph.settings, self._graph.name, own, names)

    def _drop_prepared(self) -> None:
        if not self._relevant or len(self._planned) == self._graph.settings.plans:
            self._prepared = None  # nothing more is planned from it

    def _prepare(self, args: Sequence[Any] | Mapping[int, Any]) -> tuple[Prepared, Mapping[str, int]]:
        """The prepared graph, made once, and which input of the graph each of its constants was, by name."""
        if self._prepared is None:
            weights = {i: _values_of(args[i]) for i in self._graph.weights}
            frozen = self._graph.freeze(weights)
            positions = {tensor.data_ptr(): i for i, tensor in weights.items()}
            names = {n: positions[t.data_ptr()] for n, t in frozen.named_buffers() if t.data_ptr() in positions}
            if self._graph.half:
                widen_graph(frozen)
            self._prepared = self._graph.settings.recipe.prepare(frozen), names
        return self._prepared


def _warn_of_nothing(name: str, refused: Sequence[Skip], weights: Sequence[torch.Tensor]) -> None:
    """Says that no kernel was planned for a graph that multiplies with weights, once for each first reason."""
    if not refused:
        return
    first = refused[0]
    hint, where = "armopt.explain(model) says it of every node", ""
    if "not FP32" in first.reason and all(tensor.dtype == torch.float32 for tensor in weights):
        hint, where = "Call it outside of torch.autocast: armopt rounds FP32 weights itself", " where weights are cast"
    elif "not FP32" in first.reason:
        hint = "Give it the model in FP32: armopt rounds weights itself"
    what = f"nothing was planned{where}, so PyTorch's own kernels run"
    PROCESS.warn_once(f"{name}: {what}: {first.node}: {first.reason}", hint, f"{what}: {first.reason}")


class _Watched(NamedTuple):
    """One weight: where it stands among the inputs, which object it is, and the state of its values."""

    position: int
    reference: weakref.ref[torch.Tensor]
    address: int
    version: int | None


def _state(tensor: torch.Tensor) -> tuple[int, int | None]:
    """Address and version: one of them changes when the values do. Inference tensors count no versions."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _forget(graph: weakref.ref[Graph], tensor: weakref.ref[torch.Tensor]) -> None:
    """Drops the programs of a model that is gone."""
    if (found := graph()) is not None:
        found._held = [each for each in found._held if each.alive]


def release(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Frees the FP32 values of those weights that programs multiply in BF16 alone; what they hold stays.

    A copy in BF16 is kept, from which other graphs and buckets can be planned. The tensor itself keeps its shape and
    reads as NaN.

    Returns:
        Those that were released.
    """
    wanted = {id(tensor) for tensor in tensors}
    with PROCESS.lock, torch.inference_mode(False), torch.no_grad():
        owners = _owners(wanted)
        kept = _kept_storages(owners) | _unplanned_storages()
        halved = {id(tensor): tensor for weights in owners for tensor in weights.halved if id(tensor) in wanted}
        still = [tensor for tensor in halved.values() if tensor not in PROCESS.released]
        freed = tuple(tensor for tensor in still if tensor.untyped_storage().data_ptr() not in kept)
        for tensor in freed:
            PROCESS.released[tensor] = PROCESS.pool.share(tensor.detach().bfloat16())
            tensor.data = torch.full((1,) * tensor.dim(), math.nan, dtype=tensor.dtype).expand(tensor.shape)
        for weights in owners:
            weights.watch()
        return freed


def _owners(wanted: set[int]) -> list[Weights]:
    """The sets of weights that hold one of these tensors, by identity."""
    held = (weights for graph in graphs() for weights in graph.held)
    return [weights for weights in held if any(id(tensor) in wanted for tensor in weights.tensors)]


def _kept_storages(owners: Iterable[Weights]) -> set[int]:
    """Addresses of the memory that programs hold as it is: releasing a tensor there would free nothing."""
    programs = (programmed for weights in owners for programmed in weights.programs)
    constants = (tensor for programmed in programs for tensor in programmed.constants)
    return {tensor.untyped_storage().data_ptr() for tensor in constants if tensor.layout is torch.strided}


def _unplanned_storages() -> set[int]:
    """Addresses of the weights that PyTorch reads, of graphs at which armopt failed."""
    failures = (graph.failure for graph in graphs() if graph.failure is not None)
    return {tensor.untyped_storage().data_ptr() for failure in failures for tensor in failure.tensors}


def is_released(tensor: torch.Tensor) -> bool:
    """Whether a weight's FP32 values are gone."""
    return tensor in PROCESS.released


def _values_of(tensor: torch.Tensor) -> torch.Tensor:
    """A weight's values, also where the original is released."""
    half: torch.Tensor | None = PROCESS.released.get(tensor)
    return tensor if half is None else half.to(tensor.dtype)


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[Weights, int]]]:
    """Notes the programs that run in this thread: whose weights, and which of their programs."""
    before, PROCESS.watch.ran = PROCESS.watch.ran, []
    try:
        yield PROCESS.watch.ran
    finally:
        PROCESS.watch.ran = before


def count() -> int:
    """How many programs were made in this process."""
    return PROCESS.made


def graphs() -> Iterator[Graph]:
    """All graphs that are alive."""
    return iter(list(PROCESS.graphs))


def _sizes(placeholders: Sequence[fx.Node], inputs: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """Where the value of each symbol is found: the input, and its dimension unless the input is the number itself."""
    found: dict[str, tuple[str, int, int | None]] = {}
    for i in inputs:
        value = placeholders[i].meta.get("val")
        sizes: Any = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dimension, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbol = str(size.node.expr)
                found.setdefault(symbol, (symbol, i, dimension))
    return list(found.values())


def _symbols_of_layers(prepared: fx.GraphModule) -> set[str]:
    """The symbols that the inputs of Linears and convolutions depend on: no other changes a plan."""
    shapes: list[Any] = [g.fake_value(call_of(node).x).shape for node in layers(prepared.graph)]
    return {
        str(symbol)
        for shape in shapes
        for size in shape
        if not isinstance(size, int)
        for symbol in size.node.expr.free_symbols
    }
