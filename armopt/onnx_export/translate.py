"""A standard program -> an ONNX model in memory, by torch.export and torch.onnx."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx
from torch.fx import traceback as fx_traceback

from armopt import capture
from armopt.errors import InputError, first_line
from armopt.ir import nesting
from armopt.ir.records import Bucket, InputSpec, Signature
from armopt.onnx_export.guard import guard
from armopt.onnx_export.options import OPSET
from armopt.onnx_export.standard import CALLED_IN, Standard

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IR_TYPES = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}


@dataclass(frozen=True, slots=True)
class Translated:
    """An ONNX model and what is worth saying of it.

    Attributes:
        model: Its weights are made one by one as they are stored.
        inputs: Names, in order.
        outputs: Names, in order.
        kept: Weights that stay in FP32 because the dtype asked for can't hold their values.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[str, ...]


class _Traced(torch.nn.Module):
    """Runs a graph node by node, so that what torch.export makes of each node knows where it comes from."""

    def __init__(self, source: Standard, positions: Sequence[int]) -> None:
        super().__init__()
        for name, value in source.graph_module.named_buffers():
            self.register_buffer(name, value)
        self._graph = source.graph_module.graph
        self._positions = positions

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = fx.Interpreter(self, graph=self._graph).run(*inputs)
        return tuple(results[i] for i in self._positions)


def translate(source: Standard, signature: Signature, bucket: Bucket, weights: str) -> Translated:
    """Translates a program.

    Args:
        source: The program.
        signature: What the model takes and returns.
        bucket: The sizes that it was planned for.
        weights: The dtype that matrices, filters and embedding tables are stored in: one of options.WEIGHT_DTYPES.

    Raises:
        InputError: ONNX has no form of an operation.
    """
    dims = {each.name: torch.export.Dim(each.name, min=each.least, max=each.most) for each in signature.symbols}
    dynamic = [{d: size for d, size in enumerate(spec.shape) if size in dims} for spec in signature.specs]
    inputs = tuple(spec.name for spec in signature.specs)
    outputs = _output_names(signature.outputs, inputs)
    example = tuple(_zeros(spec, dims, bucket) for spec in signature.specs)
    module = _Traced(source, signature.outputs.positions)
    with fx_traceback.preserve_node_meta(), torch.no_grad(), capture.quiet():
        try:
            program = torch.export.export(
                module,
                example,
                dynamic_shapes={"inputs": tuple({d: dims[size] for d, size in each.items()} for each in dynamic)},
                strict=False,
            )
            translated = torch.onnx.export(
                program,
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes={"inputs": tuple(dynamic)},  # the names of the axes
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise _explain(error) from error
        assert translated is not None
        _attach(translated.model, source.weights)
        translated.optimize()  # now, as it may fold what it finds in a weight
    if source.fast:
        guard(translated.model)
    kept = _store_as(translated.model, source.weights, weights)
    _strip(translated.model)
    return Translated(translated.model, inputs, outputs, kept)


def _output_names(outputs: nesting.Outputs, inputs: Sequence[str]) -> tuple[str, ...]:
    """A name for each output: its path in what the model returns, unlike that of any input."""
    positions = outputs.positions
    named = nesting.output_names(outputs, max(positions, default=-1) + 1)
    names = [f"output_{named[i]}" if named[i][:1].isdigit() else named[i] for i in positions]
    return tuple(f"{name}_out" if name in inputs else name for name in names)


def _zeros(spec: InputSpec, symbols: Collection[str], bucket: Bucket) -> torch.Tensor:
    """An input to trace with. A dynamic dimension is at least 2: torch.export treats a size of 1 as a constant."""
    shape = []
    for size in spec.shape:
        if isinstance(size, str) and size not in symbols:
            raise InputError(
                f"a dimension is {size}, computed from others; ONNX export takes none such",
                where=f"input {spec.name}",
                hint="Optimize the model with that dimension fixed",
            )
        shape.append(max(2, bucket[size]) if isinstance(size, str) else size)
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _explain(error: BaseException) -> InputError:
    """The error for what can't be translated: the operation, and the model's line that calls it."""
    node = _failed_node(error)
    if node is not None:
        what = str(node.meta.get("stack_trace") or node.target)
        operation, _, source = what.partition(CALLED_IN)
        return InputError(
            f"ONNX has no form of {operation}",
            where=source,
            hint="Replace it by operations that ONNX has; a bundle alone needs no change",
        )
    reason = first_line(error.__cause__ or error)
    return InputError(f"the graph can't be translated to ONNX: {reason}", hint="A bundle alone needs no change")


def _failed_node(error: BaseException | None) -> fx.Node | None:
    """The node that torch.onnx was translating; its errors have it only in their frames."""
    found = None
    while error is not None:
        if isinstance(error, torch.onnx.OnnxExporterError):
            for frame, _ in traceback.walk_tb(error.__traceback__):
                node = frame.f_locals.get("node")
                found = node if isinstance(node, fx.Node) else found
        error = error.__cause__
    return found


def _attach(model: ir.Model, weights: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    """Gives the placeholders their values, each made anew when it is read."""
    for name, make in weights.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = _lazy(name, make, value.const_value.dtype, value.const_value.shape)


def _lazy(name: str, make: Callable[[], torch.Tensor], dtype: ir.DataType, shape: Any) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: TorchTensor(make(), name), dtype=dtype, shape=ir.Shape(shape), name=name)


def _store_as(model: ir.Model, weights: Mapping[str, Callable[[], torch.Tensor]], wanted: str) -> tuple[str, ...]:
    """Stores weights in a half-precision dtype, with a cast behind each; returns those that have to stay in FP32."""
    if wanted not in _HALF:
        return ()
    dtype = _HALF[wanted]
    kept = []
    for name, make in weights.items():
        value = model.graph.initializers.get(name)
        if value is None:  # equal to another one, or folded
            continue
        if not _fits(make(), dtype):
            kept.append(name)
            continue
        half = ir.Value(name=f"{name}_{wanted}", shape=value.shape, type=ir.TensorType(_IR_TYPES[dtype]))
        half.const_value = _lazy(half.name or "", _rounded(make, dtype), _IR_TYPES[dtype], value.shape)
        cast = ir.node("Cast", inputs=[half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}_cast")
        widened = cast.outputs[0]
        widened.name, widened.shape, widened.type = f"{name}_fp32", value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(widened)
        del model.graph.initializers[name]
        model.graph.register_initializer(half)
        first = next(iter(model.graph))
        first.prepend(cast)
    return tuple(kept)


def _rounded(make: Callable[[], torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: make().to(dtype)


def _fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether no finite value becomes infinite."""
    return bool((torch.isfinite(value.to(dtype)) == torch.isfinite(value)).all())


def _strip(model: ir.Model) -> None:
    """Removes what torch.onnx notes of its own work in every node: paths of this machine among it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
