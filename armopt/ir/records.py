"""The core types: frozen records that flow from one stage to the next. No logic and no torch import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from armopt.errors import CONTROL
from armopt.ir.nesting import Inputs, Outputs

if TYPE_CHECKING:
    import torch
    from torch import fx

#: One line that is shown to people.
Line = Annotated[str, Meta(pattern=rf"\A[^{CONTROL}]*\Z")]
#: A size, or a number of things.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
#: A dimension is a number, or the name of a symbol where it is dynamic.
Dim = Count | Line
#: One value for each dynamic symbol: the point at which a plan is made. Empty for a static model.
Bucket = Mapping[Line, Count]
#: A dtype by name: ``float32``…
Dtype = Annotated[str, Meta(pattern=r"\A(bool|u?int(8|16|32|64)|b?float16|float(32|64|8_\w+)|complex(32|64|128))\Z")]


class Op(StrEnum):
    """The two kinds of layers."""

    LINEAR = "linear"
    CONV = "conv"


class Precision(StrEnum):
    """What is in BF16: weights and products, weights alone with products in FP32, or nothing."""

    BF16 = "bf16"
    BF16_WEIGHTS = "bf16-weights"
    FP32 = "fp32"


class Backend(StrEnum):
    """The library whose code does a kernel's arithmetic."""

    ONEDNN = "onednn"
    BLAS = "blas"
    ATEN = "aten"


class Layout(StrEnum):
    """How the activations lie in memory that a kernel works on."""

    CHANNELS_LAST = "channels_last"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Target:
    """A product that runs PyTorch: its core and what that core can do.

    Attributes:
        name: Product, as given to ``--target``.
        core: The core's name, e.g. ``neoverse-v1``.
        isa_features: Names as in /proc/cpuinfo (``bf16``, ``svebf16``, ``i8mm``, ``sve``…).
        vector_bits: Width of one SIMD register, in bits.
        simd_pipes: SIMD pipes of `vector_bits` each.
        l2_kib: Private L2 cache per core, in KiB.
        cores: Most cores of the product in one socket.
        cost_table: The core whose cost table stands in; empty where its own does.
        provenance: Where each figure comes from.
    """

    name: str
    core: str
    isa_features: frozenset[str]
    vector_bits: int
    simd_pipes: int
    l2_kib: int
    cores: int
    cost_table: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        """Whether the core multiplies BF16 natively."""
        return "bf16" in self.isa_features


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor input: its name, shape (symbols by name) and dtype (``float32``…)."""

    name: Line
    shape: tuple[Dim, ...]
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean, spread and range of an example input, by which others can be generated."""

    mean: float
    std: Annotated[float, Meta(ge=0)]
    min: float
    max: float

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")


@dataclass(frozen=True, slots=True)
class ExampleSpec(InputSpec):
    """A tensor input with the statistics of its example; None where it has no finite real numbers."""

    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dynamic dimension: its name for people, torch.export's name, and its range (most is None where unbounded)."""

    name: Line
    expression: Line
    least: Count
    most: Count | None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a graph takes and returns.

    Attributes:
        inputs: How (args, kwargs) nest the tensors.
        outputs: How the flat outputs nest.
        specs: One for each tensor input, in order.
        symbols: The dynamic dimensions of the inputs.
        rows: Of one run: calls with other numbers of rows run in pieces; 0 where all rows of a call run at once.
    """

    inputs: Inputs
    outputs: Outputs
    specs: tuple[ExampleSpec, ...]
    symbols: tuple[Symbol, ...]
    rows: Count = 0

    def __post_init__(self) -> None:
        self.inputs.check_numbers(len(self.specs))


@dataclass(frozen=True, slots=True)
class Captured:
    """A model as a flat graph.

    Attributes:
        graph_module: Placeholders are the tensor inputs, get_attr nodes the weights, the output is a flat tuple.
            Every node carries a fake tensor in ``meta["val"]``.
        input_specs: One for each placeholder, in order.
        symbols: The dynamic dimensions of the inputs.
        inputs: How (args, kwargs) nest the tensors.
        outputs: How the flat outputs nest.
        example: One tensor for each placeholder.
        digest: sha256 over graph and weights, in hexadecimal.
        source: Where the model came from, for messages.
        eager: Runs the model as its user calls it, flat inputs to flat outputs; None where there is the graph alone.
    """

    graph_module: fx.GraphModule
    input_specs: tuple[InputSpec, ...]
    symbols: tuple[Symbol, ...]
    inputs: Inputs
    outputs: Outputs
    example: tuple[torch.Tensor, ...]
    digest: str
    source: str
    eager: Callable[..., Sequence[Any]] | None = None

    def values(self, bucket: Bucket) -> dict[str, int]:
        """A bucket by torch.export's names instead of ours."""
        return {symbol.expression: bucket[symbol.name] for symbol in self.symbols if symbol.name in bucket}


@dataclass(frozen=True, slots=True)
class Skip:
    """A node that a pass left as it was, and why."""

    node: Line
    reason: Line


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did: the graph, whether it changed, and the nodes rewritten and skipped."""

    graph_module: fx.GraphModule
    modified: bool
    rewritten: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """A Linear or a convolution as the planner sees it, at one bucket.

    Attributes:
        node: Name of its node.
        op: Its kind.
        m: Rows of the product (Linear), or output pixels times batch (convolution).
        k: Length of each dot product.
        n: Output features or channels.
        shape: Of the input, concrete.
        weight: Shape of the weight.
        stride: Of a convolution, for each spatial dimension; empty for a Linear.
        padding: Of a convolution, for each spatial dimension; empty for a Linear.
        dilation: Of a convolution, for each spatial dimension; empty for a Linear.
        groups: Of a convolution.
        transposed: Whether a convolution is transposed.
        output_padding: Of a transposed convolution.
        post_op: What is fused behind it (``none``, ``relu``, ``add_relu``…).
        weight_key: The parameter; sites that share it share storage.
        source: The node that makes the input, looking through operations that only move or select values.
        residual: The node that makes the second tensor of a fused addition; empty where there is none.
        escapes: Whether the result is read, through such operations, by anything but sites.
        attended: Heads of all images, scores, and multiply-adds of attention whose query is of the result and whose key
            and value are of sites: all of it works in BF16 if they do.
    """

    node: str
    op: Op
    m: int
    k: int
    n: int
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    post_op: str = "none"
    weight_key: str = ""
    source: str = ""
    residual: str = ""
    escapes: bool = True
    attended: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Decision:
    """The kernel that a node gets, and why.

    Attributes:
        node: Name of the node.
        op: Its kind.
        kernel: Name of the kernel (see :mod:`armopt.kernels`).
        precision: Of that kernel.
        layout: Of the activations that the kernel works on.
        shape: Of the input, concrete.
        reason: One sentence.
        block: Terms after which the kernel rounds its sum to BF16; 0 where it stays in FP32.
    """

    node: Line
    op: Op
    kernel: Line
    precision: Precision
    layout: Layout
    shape: tuple[int, ...]
    reason: Line
    block: int = 0


@dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies, at one bucket.

    Attributes:
        node: Its name.
        op: ``linear`` or ``conv`` of a layer, else the operation: ``aten.bmm``…
        multiplications: In one call; 0 where they can't be counted.
        weight_bytes: Of the constants that it multiplies with; 0 for a product of two activations.
        reason: Why it is no layer, or why it is in FP32; empty otherwise.
    """

    node: str
    op: str
    multiplications: Count
    weight_bytes: Count
    reason: str


@dataclass(frozen=True, slots=True)
class Remainder:
    """What of one plan is not in BF16.

    Attributes:
        part: Path of the part of the model; empty for all of it.
        bucket: As the plan's.
        multiplications: Of the whole graph.
        products: On weights, in FP32, each with its reason; the largest first.
        activations: How many products are of two activations: they have no weight to be stored in BF16.
        activation_multiplications: How many multiplications those products have.
    """

    part: str
    bucket: Bucket
    multiplications: Count
    products: tuple[Product, ...]
    activations: Count
    activation_multiplications: Count

    def share(self, multiplications: int) -> float:
        """Of all multiplications."""
        return multiplications / self.multiplications if self.multiplications else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one bucket.

    Attributes:
        target: What it is for.
        policy: How it was made.
        bucket: The sizes that it is for.
        decisions: One for each layer.
        refused: What runs as plain ATen: layers that no kernel takes, and products on weights that are no layers.
        products: All that multiplies: see :mod:`armopt.plan.products`.
        pinned: Nodes that the user keeps in FP32: layers, and tables of embeddings.
    """

    target: Target
    policy: str
    bucket: Bucket
    decisions: tuple[Decision, ...]
    refused: tuple[Skip, ...] = ()
    products: tuple[Product, ...] = ()
    pinned: frozenset[str] = frozenset()
