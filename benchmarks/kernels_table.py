"""The table of docs/kernels.md, from what the kernels say of themselves.

python -m benchmarks.kernels_table          # prints it
python -m benchmarks.kernels_table --write  # puts it into the page
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from armopt.ir.records import Op, Precision
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use, whole_sum

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
_COLUMNS = ("kernel", "layer", "activations", "weights", "sum", "what runs")
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "FP32"}


def markdown() -> str:
    """The table, one row a kernel."""
    kernels = sorted(table.kernels(), key=lambda kernel: list(Op).index(kernel.op))
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_row, kernels)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """The page with the table in place of the one that it has."""
    found, count = re.subn(r"(?m)^\| kernel \|.*\n(\|.*\n)*", lambda _: markdown(), text)
    assert count == 1, f"{PAGE} has {count} tables of kernels"
    return found


def _row(kernel: Kernel) -> list[str]:
    weights = _DTYPES[kernel.rounding.weights]
    if kernel.precision == Precision.BF16_WEIGHTS:
        weights += ", widened at load"
    what = [kernel.summary]
    if kernel.fast_math:
        what.append("without a primitive of its own needs DNNL_DEFAULT_FPMATH_MODE=BF16")
    if kernel.uses == {Use.REPAIR}:
        what.append("chosen by repair alone")
    total = "FP32" if kernel.block is whole_sum else "FP32, rounded to BF16 between blocks of K"
    return [f"`{kernel.name}`", kernel.covers, _DTYPES[kernel.activations], weights, total, "; ".join(what)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/kernels.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(markdown(), end="")


if __name__ == "__main__":
    main()
