"""graph.json as records: for each part its signature, and one program of operations for each bucket."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from armopt.ir.records import Bucket, Count, Dtype, Line, Signature


class _Tagged(Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """An argument that JSON has no form of; ``kind`` says which."""


class Ref(_Tagged, frozen=True, tag="node"):
    """The result of a node."""

    name: str


class SpecialFloat(_Tagged, frozen=True, tag="float"):
    """A number that is not finite."""

    name: Literal["inf", "-inf", "nan"]


class Complex(_Tagged, frozen=True, tag="complex"):
    """A complex number."""

    real: float
    imag: float


class Device(_Tagged, frozen=True, tag="device"):
    """Where tensors are: bundles are for CPUs."""

    name: Literal["cpu"]


class DtypeName(_Tagged, frozen=True, tag="dtype"):
    """A dtype."""

    name: Dtype


class MemoryFormat(_Tagged, frozen=True, tag="memory_format"):
    """The order of a tensor's elements."""

    name: Literal["contiguous_format", "preserve_format", "channels_last", "channels_last_3d"]


class Layout(_Tagged, frozen=True, tag="layout"):
    """How a tensor is stored: bundles hold dense ones."""

    name: Literal["strided"]


Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
#: A mode, an equation or a message; nothing that could end a string where it is quoted.
Text = Annotated[str, Meta(pattern=r"\A[ !#-&(-\[\]-~]*\Z", max_length=1000)]
_NOT_QUOTABLE = str.maketrans({"'": "`", '"': "`", "\\": "/", "\n": " "})


def quotable(text: str) -> str:
    """A message of an assertion as :data:`Text` takes it; modes and equations stay as they are."""
    return text.translate(_NOT_QUOTABLE)[:1000]


Leaf = None | bool | Integer | float | Text | Ref | SpecialFloat | Complex | Device | DtypeName | MemoryFormat | Layout
#: Operations take lists, and lists of lists at most.
Argument = Leaf | list[Leaf | list[Leaf]]


class _Node(Struct, frozen=True, tag_field="op", forbid_unknown_fields=True, omit_defaults=True):
    """A node; ``op`` says of which kind. Its name is for people and for references."""

    name: Line


class Input(_Node, frozen=True, tag="input"):
    """The next flat input."""


class Weight(_Node, frozen=True, tag="weight"):
    """A tensor of weights.safetensors, by its name there."""

    target: str


class Call(_Node, frozen=True, tag="call"):
    """A call of an operation.

    Attributes:
        target: The operation by name.
        args: By position.
        kwargs: By name.
        shape: Of a layer's input, as planned.
        output: Shape of a layer's result; None where dynamic.
        source: The model's line that it comes from; empty where unknown.
    """

    target: str
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument] = {}
    shape: tuple[Count, ...] | None = None
    output: tuple[Count | None, ...] | None = None
    source: Line = ""


class StoredProgram(Struct, frozen=True, forbid_unknown_fields=True):
    """The graph for one bucket: nodes in order, and what it returns."""

    bucket: Bucket
    nodes: tuple[Input | Weight | Call, ...]
    output: tuple[Leaf, ...]


class StoredPart(Struct, frozen=True, forbid_unknown_fields=True):
    """One graph: of the submodule at `path`, or of the whole model, which has none."""

    path: Line
    signature: Signature
    programs: Annotated[tuple[StoredProgram, ...], Meta(min_length=1)]


class Graph(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All of graph.json.

    Attributes:
        parts: The graphs.
        tied: Parameters and buffers outside of the parts -> the tensor of weights.safetensors that holds their values.
    """

    parts: Annotated[tuple[StoredPart, ...], Meta(min_length=1)]
    tied: dict[str, str] = {}
