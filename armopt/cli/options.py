"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armopt.accuracy.tasks import NONE, TASKS
from armopt.capture.files import FORMATS
from armopt.capture.sample_files import SAMPLE_FILES
from armopt.plan.policies import POLICIES

if TYPE_CHECKING:
    from armopt.capture.dimensions import Dimension
    from armopt.capture.files import Divided
    from armopt.capture.files import Options as SourceOptions
    from armopt.compiler.recipe import Recipe
    from armopt.ir.records import Captured

EveryLayer = Annotated[
    bool, typer.Option("--layers", help="Show each layer with its reason, also where they are many.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: a folder, or a zip of it.")]
ModelPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help=f"A model file: {FORMATS.help()}; or a Hugging Face folder. May be left out with --model.",
        show_default=False,
    ),
]
TargetName = Annotated[str, typer.Option("--target", help="The product that will serve: see armopt targets; or host.")]
Reference = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="REF",
        help="torchvision:NAME, timm:NAME, hf:FOLDER or package.module:factory.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="NAME=SHAPE:DTYPE", help="An example input, e.g. x=1x3x224x224:float32. Repeatable."
    ),
]
Samples = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE", help=f"Example inputs by name: {SAMPLE_FILES.help()}.")
]
Batch = Annotated[
    str,
    typer.Option(
        "--batch", metavar="1,8,32", help="Batch sizes to plan for; several make the batch dynamic.", show_default=False
    ),
]
Dims = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        metavar="NAME=1..512",
        help="The sizes of a dimension that an --input names: --input ids=1xtokens:int64. Repeatable.",
    ),
]
At = Annotated[
    list[str] | None,
    typer.Option("--at", metavar="NAME=32,128", help="Sizes of a dimension to plan for; the nearest serves others."),
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="What comes of a row depends on no other row, to the bit: calls run in pieces of the largest --batch.",
    ),
]
Kind = Annotated[
    str,
    typer.Option(
        "--kind",
        help="graph: the model in one graph. module: its parts as graphs, for what can't be captured whole. auto.",
    ),
]
PolicyName = Annotated[
    str,
    typer.Option("--policy", help=f"How kernels are chosen: {POLICIES.help()}."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        max=999,
        help="Threads of a call, for --policy cost; by default those of the target's usual instance.",
        show_default=False,
    ),
]
KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="PATTERN",
        help='Layers that stay in FP32, by name or path in the model, e.g. "head" or "layers.0.*". Repeatable.',
    ),
]
TuningFile = Annotated[
    Path | None, typer.Option("--tuning", metavar="FILE", help="Times from armopt tune, instead of the cost table.")
]
MinCosine = Annotated[float, typer.Option("--min-cosine", help="Least cosine similarity to FP32 of any output.")]
Gates = Annotated[
    list[str] | None,
    typer.Option("--gate", metavar="METRIC>=VALUE", help='One more gate, e.g. "top1>=0.995". Repeatable.'),
]
TaskName = Annotated[
    str,
    typer.Option(
        "--task",
        metavar="TASK",
        help=f"{TASKS.help(NONE)}; found from the outputs.",
        show_default=False,
    ),
]
CheckInputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="FILE|DIR",
        help=f"What to compare on: {SAMPLE_FILES.help()}, or a folder of such files or of images.",
    ),
]
ReportPath = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Write a report: one HTML file, or JSON where the name ends in .json."
    ),
]
OnnxWeights = Annotated[
    str,
    typer.Option(
        "--onnx-weights", metavar="DTYPE", help="What the ONNX model stores its weights in: fp32, bf16 or fp16."
    ),
]
OnnxPlain = Annotated[
    bool,
    typer.Option("--onnx-plain", help="Keep Gemm and Conv everywhere, for other runtimes than ONNX Runtime on Arm."),
]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read the model file whatever that runs: a pickled module, or what can't be shown harmless.",
    ),
]


def is_divided(kind: str, reference: str) -> bool:
    """Whether the model is captured part by part.

    Raises:
        InputError: There is no such kind.
    """
    from armopt.errors import InputError
    from armopt.models import torchvision_inputs

    if kind not in ("auto", "graph", "module"):
        raise InputError(f"unknown kind {kind!r}", where="--kind", hint="Write auto, graph or module")
    return kind == "module" or (kind == "auto" and torchvision_inputs.is_detection(reference))


def open_for(
    kind: str,
    model: Path | None,
    reference: str,
    described: list[str] | None,
    samples: Path | None,
    batch: tuple[int, ...],
    dims: Mapping[str, Dimension],
    trust_pickle: bool,
) -> Captured | Divided:
    """What the options name, whole or to be captured part by part.

    Raises:
        InputError: They name nothing, or something unusable.
    """
    from armopt.capture import files
    from armopt.errors import CaptureError, InputError

    if is_divided(kind, reference):
        if batch:
            raise InputError("parts have sizes of their own", where="--batch", hint="Leave it out")
        return files.open_divided(model, source_options(reference, described, samples, batch, dims, trust_pickle))
    try:
        return open_model(model, reference, described, samples, batch, dims, trust_pickle)
    except CaptureError as error:
        if reference and kind == "auto":
            raise CaptureError(
                error.what, where=error.where, hint=f"{error.hint}; or capture its parts: --kind module"
            ) from error
        raise


def parse_batch(text: str) -> tuple[int, ...]:
    """Sizes from ``1,8,32``.

    Raises:
        InputError: Something in it is no positive number.
    """
    from armopt.errors import InputError

    sizes = []
    for part in filter(None, text.split(",")):
        if not part.strip().isdigit() or int(part) < 1:
            raise InputError(
                f"{part!r} is no batch size", where="--batch", hint="Write numbers from 1, e.g. --batch 1,8,32"
            )
        sizes.append(int(part))
    return tuple(sizes)


def parse_dims(ranges: list[str] | None, at: list[str] | None) -> dict[str, Dimension]:
    """Dimensions that vary, from ``--dim`` and ``--at``.

    Raises:
        InputError: One can't be read.
    """
    if not ranges and not at:
        return {}
    from armopt.capture import dimensions

    return dimensions.parse(ranges or (), at or ())


def recipe_for(
    target: str, policy: str, tuning: Path | None = None, keep_fp32: Sequence[str] | None = None, threads: int = 0
) -> Recipe:
    """How the options say that graphs become programs.

    Raises:
        InputError: There is no such target or policy.
    """
    from armopt import targets
    from armopt.compiler.recipe import Recipe
    from armopt.plan import policies

    product = targets.load(target)
    text = f"{policy}@{threads}" if threads else policy
    found = policies.find_policy(text, product, tuning, where="--policy")
    return Recipe(product, found, keep_fp32=tuple(keep_fp32 or ()))


def open_model(
    model: Path | None,
    reference: str,
    described: list[str] | None,
    samples: Path | None,
    batch: tuple[int, ...],
    dims: Mapping[str, Dimension],
    trust_pickle: bool,
) -> Captured:
    """Captures what the options name.

    Raises:
        InputError: They name nothing, or something unusable.
    """
    from armopt.capture import files
    from armopt.errors import InputError

    options = source_options(reference, described, samples, batch, dims, trust_pickle)
    if model is not None:
        return files.open_model(model, options)
    if not reference:
        raise InputError("no model given", hint="Give a model file, or --model torchvision:resnet50")
    return files.from_reference(options)


def source_options(
    reference: str,
    described: list[str] | None,
    samples: Path | None,
    batch: tuple[int, ...],
    dims: Mapping[str, Dimension],
    trust_pickle: bool,
) -> SourceOptions:
    """The options of a model file.

    Raises:
        InputError: An input can't be read.
    """
    from armopt.capture import files, inputs, sample_files
    from armopt.capture.dimensions import Dimension
    from armopt.ir.pieces import BATCH

    return files.Options(
        model=reference,
        inputs=tuple(inputs.parse(text) for text in described or ()),
        samples=sample_files.read(samples) if samples else None,
        batch=batch,
        dims={**dims, BATCH: Dimension(BATCH, at=batch)} if batch else dims,
        trust_pickle=trust_pickle,
    )
