"""Checks on a bundle's programs, bit for bit, that the result of a row depends on no other row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from armopt.accuracy import bucket_name, runs
from armopt.bundle.program import Program
from armopt.compiler.checks import Judged, example_at
from armopt.errors import InputError
from armopt.ir import graph as g
from armopt.ir.pieces import BATCH, run_in_pieces
from armopt.ir.records import Captured

_WHERE = "batch_invariant (--batch-invariant)"


def check_shapes(captured: Captured) -> None:
    """Refuses a graph whose rows can't be told from each other by their shapes.

    Raises:
        InputError: Naming the input or output.
    """
    symbol = next((each for each in captured.symbols if each.name == BATCH), None)
    if symbol is None:
        raise InputError(
            "the model has no dynamic batch",
            where=_WHERE,
            hint="Give batch (--batch), or leave the batch of a .pt2 dynamic",
        )
    for spec in captured.input_specs:
        for d, size in enumerate(spec.shape):
            if isinstance(size, str) and BATCH in size and (d, size) != (0, BATCH):
                what = f"input {spec.name} has {size} rows in dimension {d}: a row of the batch is no row there"
                raise InputError(what, where=_WHERE, hint="Leave it out")
    results: Any = captured.graph_module.graph.output_node().args[0]
    for number, node in enumerate(results):
        shape = g.symbolic_shape(g.fake_value(node).shape)
        if not shape or shape[0] != symbol.expression or any(symbol.expression in str(size) for size in shape[1:]):
            what = f"output {number} has shape {list(shape)}, whose first dimension alone has to be the batch"
            raise InputError(what, where=_WHERE, hint="Leave it out: this output is of the batch as a whole")


def check_rows(judged: Judged, sizes: Sequence[int]) -> None:
    """Compares rows of batches with the same rows alone.

    Args:
        judged: The programs that are to be written.
        sizes: Of batches that are asked for; some between are tried too.

    Raises:
        InputError: A row differs by a bit.
    """
    captured = judged.planned.captured
    batched = [bool(spec.shape) and spec.shape[0] == BATCH for spec in captured.input_specs]
    for program in judged.programs:
        example, rows = example_at(captured, program.bucket), program.bucket[BATCH]

        def run(*tensors: torch.Tensor, program: Program = program) -> Sequence[torch.Tensor]:
            found: Sequence[torch.Tensor] = runs.run(program.graph_module, tensors)
            return found

        most = max(max(sizes), 2)
        many = [_distinct(x, most) if each else x for x, each in zip(example, batched, strict=True)]
        alone = [run_in_pieces(run, _rows(many, batched, i, i + 1), batched, rows) for i in range(most)]
        for size in _tried(sizes):
            together = run_in_pieces(run, _rows(many, batched, 0, size), batched, rows)
            for number, found in enumerate(together):
                for i in range(size):
                    if not _same_bits(found[i], alone[i][number][0]):
                        raise InputError(
                            f"row {i} of output {number} is another among {size} rows than alone, at "
                            f"{bucket_name(program.bucket)}: the model mixes rows, or a kernel works on them together",
                            where=_WHERE,
                            hint="Leave it out; or serve single rows, with --batch 1 --batch-invariant",
                        )


def _tried(sizes: Sequence[int]) -> Iterator[int]:
    """The sizes, and one between each two of them."""
    ordered = sorted({1, *sizes, max(max(sizes), 2)})
    between = {(low + high + 1) // 2 for low, high in itertools.pairwise(ordered)}
    yield from sorted({*ordered, *between})


def _distinct(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """So many rows of an example, no two the same where it holds numbers: the example's, turned and scaled."""
    repeated = tensor.repeat(-(-rows // tensor.shape[0]), *[1] * (tensor.dim() - 1))[:rows]
    turned = [row.roll(i, -1) if row.dim() else row for i, row in enumerate(repeated)]
    scaled = [row * (1 + i / 16) if row.is_floating_point() else row for i, row in enumerate(turned)]
    return torch.stack(scaled)


def _rows(tensors: Sequence[torch.Tensor], batched: Sequence[bool], start: int, end: int) -> list[torch.Tensor]:
    return [x[start:end] if each else x for x, each in zip(tensors, batched, strict=True)]


def _same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return g.tensor_bytes(found.contiguous()) == g.tensor_bytes(wanted.contiguous())
