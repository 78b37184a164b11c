"""The two operations' arguments by name: of a node in a graph, or of the tensors that an interpreter runs it on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import fx

from armopt.ir import graph as g
from armopt.ir.operations import CONV, LINEAR
from armopt.ir.records import Op

#: What stands for a tensor: fx.Node in a graph, torch.Tensor where the call is run.
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall(Generic[Value]):
    """What both operations take. The field names are those of the schemas.

    Attributes:
        x: The input.
        weight: [N, K] of a Linear; as torch.nn.functional.conv*d has it of a convolution.
        bias: One value for each output feature or channel.
        other: The second tensor of a fused addition.
        post_op: What is fused behind it: see :mod:`armopt.kernels.post_ops`.
        kernel: Name of the kernel.
        block: Terms after which the kernel rounds its sum to BF16; 0 where it stays in FP32.
    """

    op: ClassVar[Op]
    operation: ClassVar[torch._ops.OpOverload]

    x: Value
    weight: Value
    bias: Value | None
    other: Value | None = None
    post_op: str = "none"
    kernel: str
    block: int = 0

    @classmethod
    def from_args(cls, args: Sequence[Any]) -> Self:
        """The call on arguments in the order of the schema."""
        return cls(**dict(zip(_names(cls.operation), args, strict=True)))

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        return tuple(getattr(self, name) for name in _names(self.operation))

    @property
    def weight_name(self: LayerCall[fx.Node]) -> str:
        """The constant that is the weight."""
        return str(self.weight.target)

    def replace(self, **changes: Any) -> Self:
        """The same call with some arguments changed."""
        return dataclasses.replace(self, **changes)

    def insert(self: LayerCall[fx.Node], before: fx.Node, name: str | None = None) -> fx.Node:
        """Inserts the call in front of a node and on its behalf, with true metadata."""
        return g.insert_call(before.graph, before, self.operation, self.args, name=name)

    def run(self: LayerCall[torch.Tensor]) -> torch.Tensor:
        """Runs the kernel's portable twin."""
        result: torch.Tensor = self.operation(*self.args)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCall(LayerCall[Value]):
    """A call of armopt::linear."""

    op: ClassVar[Op] = Op.LINEAR
    operation: ClassVar[torch._ops.OpOverload] = LINEAR

    @staticmethod
    def of(node: fx.Node) -> LinearCall[fx.Node]:
        """The call that a node makes."""
        return LinearCall.from_args(node.args)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvCall(LayerCall[Value]):
    """A call of armopt::conv. Geometry has one value for each spatial dimension.

    Attributes:
        stride: Of the filter.
        padding: On both sides of the input.
        dilation: Of the filter.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed one.
        groups: Of the channels.
    """

    op: ClassVar[Op] = Op.CONV
    operation: ClassVar[torch._ops.OpOverload] = CONV

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @staticmethod
    def of(node: fx.Node) -> ConvCall[fx.Node]:
        """The call that a node makes."""
        return ConvCall.from_args(node.args)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        """stride, padding, dilation, transposed, output_padding and groups, as torch.convolution takes them."""
        first = list(self.stride), list(self.padding), list(self.dilation)
        return (*first, self.transposed, list(self.output_padding), self.groups)


def layers(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of armopt::linear and armopt::conv, in order; safe against erasing while iterating."""
    return g.calls_to(graph, LINEAR, CONV)


def is_layer(node: object) -> bool:
    """Whether a node calls armopt::linear or armopt::conv."""
    return isinstance(node, fx.Node) and node.target in (LINEAR, CONV)


def call_of(node: fx.Node) -> LayerCall[fx.Node]:
    """The call that a node of either operation makes."""
    return call_from(node.target, node.args)


def call_from(operation: Any, args: Sequence[Any]) -> LayerCall[Any]:
    """The call of an operation on arguments in the order of its schema."""
    return ConvCall.from_args(args) if operation is CONV else LinearCall.from_args(args)


@functools.cache
def _names(operation: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in operation._schema.arguments)
