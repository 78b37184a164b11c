"""The records of a .pt2, as far as armopt hands them to torch: what else a file holds never gets there.

torch writes names into Python's source text and reads expressions as Python, so each has its grammar here. Fields that
are left out are those that torch evaluates or imports (guards, metadata, custom objects, Triton's arguments).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from armopt.capture.files.expressions import checked

Name = Annotated[str, Meta(pattern=r"\A[A-Za-z_][A-Za-z0-9_]{0,400}\Z")]
#: Of a parameter or buffer, which torch puts between quotes.
Path = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f\"'\\]{1,1000}\Z")]
Text = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f\"'\\]{0,1000}\Z")]
#: Of a check of sizes: torch says there which expression on which 'node' fails.
Message = Annotated[str, Meta(pattern=r"\A[^\x00-\x1f\x7f\\]{0,20000}\Z")]
#: A symbol, or what follows from one (``2*s77``), to be looked up as it stands. Torch counts up to the number of one
#: that begins as an unbacked symbol does, ``u`` or ``zuf``.
Size = Annotated[str, Meta(pattern=r"\A(?:[A-Za-z_]+\d{0,6}|(?![uz])[\w*+/() -]{1,200})\Z")]
Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Float = float | Literal["Infinity", "-Infinity", "NaN"]


class Record(Struct, frozen=True):
    """Fields by name."""


class OneOf(Struct, frozen=True):
    """One of several, by the name of its kind."""

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not UNSET for name in self.__struct_fields__) != 1:
            raise ValueError("one kind of value is expected")


class Device(Record, frozen=True):
    type: Literal["cpu"]
    index: Literal[0] | None = None


class Hint(OneOf, frozen=True):
    as_int: Int | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET
    as_float: Float | UnsetType = UNSET


class Expression(Struct):
    expr_str: str
    hint: Hint | None = None

    def __post_init__(self) -> None:
        self.expr_str = checked(self.expr_str)


class SymInt(OneOf, frozen=True):
    as_expr: Expression | UnsetType = UNSET
    as_int: Int | UnsetType = UNSET


class SymFloat(OneOf, frozen=True):
    as_expr: Expression | UnsetType = UNSET
    as_float: Float | UnsetType = UNSET


class SymBool(OneOf, frozen=True):
    as_expr: Expression | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET


class TensorMeta(Record, frozen=True):
    dtype: Annotated[int, Meta(ge=0, le=63)]
    sizes: Annotated[list[SymInt], Meta(max_length=64)]
    requires_grad: bool
    device: Device
    strides: Annotated[list[SymInt], Meta(max_length=64)]
    storage_offset: SymInt
    layout: Literal[7]


class Tensor(Record, frozen=True):
    name: Name


class SymIntArgument(OneOf, frozen=True):
    as_name: Name | UnsetType = UNSET
    as_int: Int | UnsetType = UNSET


class SymFloatArgument(OneOf, frozen=True):
    as_name: Name | UnsetType = UNSET
    as_float: Float | UnsetType = UNSET


class SymBoolArgument(OneOf, frozen=True):
    as_name: Name | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET


class OptionalTensor(OneOf, frozen=True):
    as_tensor: Tensor | UnsetType = UNSET
    as_none: bool | UnsetType = UNSET


class Complex(Record, frozen=True):
    real: Float
    imag: Float


class GraphArgument(Record, frozen=True):
    name: Name
    graph: Graph


class Argument(OneOf, frozen=True):
    as_none: bool | UnsetType = UNSET
    as_tensor: Tensor | UnsetType = UNSET
    as_tensors: list[Tensor] | UnsetType = UNSET
    as_int: Int | UnsetType = UNSET
    as_ints: list[Int] | UnsetType = UNSET
    as_float: Float | UnsetType = UNSET
    as_floats: list[Float] | UnsetType = UNSET
    as_string: Message | UnsetType = UNSET
    as_strings: list[Text] | UnsetType = UNSET
    as_sym_int: SymIntArgument | UnsetType = UNSET
    as_sym_ints: list[SymIntArgument] | UnsetType = UNSET
    as_scalar_type: Annotated[int, Meta(ge=0, le=63)] | UnsetType = UNSET
    as_memory_format: Annotated[int, Meta(ge=0, le=15)] | UnsetType = UNSET
    as_layout: Literal[7] | UnsetType = UNSET
    as_device: Device | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET
    as_bools: list[bool] | UnsetType = UNSET
    as_sym_bool: SymBoolArgument | UnsetType = UNSET
    as_sym_bools: list[SymBoolArgument] | UnsetType = UNSET
    as_graph: GraphArgument | UnsetType = UNSET
    as_optional_tensors: list[OptionalTensor] | UnsetType = UNSET
    as_sym_float: SymFloatArgument | UnsetType = UNSET
    as_sym_floats: list[SymFloatArgument] | UnsetType = UNSET
    as_optional_tensor: OptionalTensor | UnsetType = UNSET
    as_complex: Complex | UnsetType = UNSET


class NamedArgument(Record, frozen=True):
    name: Annotated[str, Meta(pattern=r"\A\w{0,100}\Z")]
    arg: Argument
    kind: Literal[0, 1, 2] | None = None


class Metadata(Record, frozen=True):
    stack_trace: str = ""


class Node(Record, frozen=True):
    target: Annotated[str, Meta(pattern=r"\A[A-Za-z_][\w.]{0,200}\Z")]
    inputs: list[NamedArgument]
    outputs: list[Argument]
    metadata: Metadata
    is_hop_single_tensor_return: bool | None = None
    name: Name | None = None


class Graph(Record, frozen=True):
    inputs: list[Argument]
    outputs: list[Argument]
    nodes: list[Node]
    tensor_values: dict[Name, TensorMeta]
    sym_int_values: dict[Name, SymInt]
    sym_bool_values: dict[Name, SymBool]
    is_single_tensor_return: bool = False
    sym_float_values: dict[Name, SymFloat] = {}


class UserInput(Record, frozen=True):
    arg: Argument


class ConstantValue(OneOf, frozen=True):
    as_none: bool | UnsetType = UNSET
    as_int: Int | UnsetType = UNSET
    as_float: Float | UnsetType = UNSET
    as_string: Text | UnsetType = UNSET
    as_bool: bool | UnsetType = UNSET


class ConstantInput(Record, frozen=True):
    name: Name
    value: ConstantValue


class Parameter(Record, frozen=True):
    arg: Tensor
    parameter_name: Path


class Buffer(Record, frozen=True):
    arg: Tensor
    buffer_name: Path
    persistent: bool


class TensorConstant(Record, frozen=True):
    arg: Tensor
    tensor_constant_name: Path


class InputSpec(OneOf, frozen=True):
    user_input: UserInput | UnsetType = UNSET
    parameter: Parameter | UnsetType = UNSET
    buffer: Buffer | UnsetType = UNSET
    tensor_constant: TensorConstant | UnsetType = UNSET
    constant_input: ConstantInput | UnsetType = UNSET


class BufferMutation(Record, frozen=True):
    arg: Tensor
    buffer_name: Path


class ParameterMutation(Record, frozen=True):
    arg: Tensor
    parameter_name: Path


class UserInputMutation(Record, frozen=True):
    arg: Tensor
    user_input_name: Name


class LossOutput(Record, frozen=True):
    arg: Tensor


class OutputSpec(OneOf, frozen=True):
    user_output: UserInput | UnsetType = UNSET
    loss_output: LossOutput | UnsetType = UNSET
    buffer_mutation: BufferMutation | UnsetType = UNSET
    parameter_mutation: ParameterMutation | UnsetType = UNSET
    user_input_mutation: UserInputMutation | UnsetType = UNSET


class GraphSignature(Record, frozen=True):
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class RangeConstraint(Record, frozen=True):
    min_val: Int | None
    max_val: Int | None


class CallSignature(Record, frozen=True):
    inputs: list[Argument]
    outputs: list[Argument]
    in_spec: str
    out_spec: str
    forward_arg_names: list[Name] | None = None


class CallEntry(Record, frozen=True):
    fqn: str
    signature: CallSignature | None = None


class GraphModule(Record, frozen=True):
    graph: Graph
    signature: GraphSignature
    module_call_graph: Annotated[list[CallEntry], Meta(min_length=1)]


class SchemaVersion(Record, frozen=True):
    major: Annotated[int, Meta(ge=0, le=1000)]
    minor: Annotated[int, Meta(ge=0, le=10000)]


class Program(Record, frozen=True):
    """The program: `models/NAME.json`."""

    graph_module: GraphModule
    opset_version: dict[Annotated[str, Meta(pattern=r"\A[\w.]+\Z")], Int]
    range_constraints: dict[Size, RangeConstraint]
    schema_version: SchemaVersion
    verifiers: list[Literal["", "ATEN", "TRAINING"]] = []


class Payload(Record, frozen=True):
    path_name: Annotated[str, Meta(pattern=r"\A[\w.-]{1,200}\Z")]
    is_param: bool
    use_pickle: bool
    tensor_meta: TensorMeta | None


class PayloadConfig(Record, frozen=True):
    """What a folder of tensors holds: `data/weights/NAME_weights_config.json`."""

    config: dict[Path, Payload]


class TreeNode(Record, frozen=True):
    """How inputs or outputs nest; `context` is JSON of its own."""

    type: Annotated[str, Meta(pattern=r"\A[\w.<>]{1,200}\Z")] | None
    context: Any
    children_spec: list[TreeNode]


TREE: msgspec.json.Decoder[tuple[Literal[1], TreeNode]] = msgspec.json.Decoder(tuple[Literal[1], TreeNode])
#: What a container may say of itself: the names of its fields, its length. A dictionary could name an enum to import.
_Key = str | int | None
CONTEXT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Key | list[_Key | list[_Key]])
