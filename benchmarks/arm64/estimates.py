"""Whole models in estimated milliseconds on Graviton3, with 1, 4 and 16 threads: the second part of docs/benchmarks.md.

python -m benchmarks.arm64.measuring --models     # adds what is missing to measures.json
python -m benchmarks.arm64.estimates              # writes the part from it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from armopt import targets
from armopt.emulation.folder import DEFAULT_TORCH
from benchmarks.arm64 import clock, measuring, tables
from benchmarks.arm64.contenders import ARMOPT, BASELINE, CONTENDERS, INDUCTOR
from benchmarks.arm64.measuring import Measure
from benchmarks.arm64.published import Case
from benchmarks.arm64.workloads import WORKLOADS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- estimates: python -m benchmarks.arm64.estimates -->", "<!-- end of estimates -->"
PRODUCT = "graviton3"
THREADS = (1, 4, 16)
_ONNX = "ONNX Runtime, BF16 flag"
#: What makes each contender's call; ONNX Runtime's threads take work as they come, which depends on the emulator.
_MAKES = {
    "eager FP32": "workloads:eager",
    BASELINE: "workloads:eager",
    INDUCTOR: "workloads:inductor",
    _ONNX: "onnx",
    ARMOPT: "bundle",
}


def case(workload: str, contender: str, threads: int) -> Case | None:
    """A call as docs/benchmarks.md counts it, with so many threads; None where that is not measured."""
    kind = CONTENDERS[contender]
    if not kind.takes(workload) or not WORKLOADS[workload].whole or (contender == _ONNX and threads > 1):
        return None
    env = {name: value for name, value in kind.env.items() if name != "OMP_NUM_THREADS"}
    return Case(_MAKES[contender], {"workload": workload}, DEFAULT_TORCH, PRODUCT, threads, env)


def cases() -> Iterable[Case]:
    """All that is measured for the tables, small models first."""
    for workload in sorted(WORKLOADS, key=lambda name: WORKLOADS[name].macs):
        for threads in THREADS:
            yield from (found for contender in _MAKES if (found := case(workload, contender, threads)))


def table(threads: int, held: Mapping[str, Measure]) -> str:
    """One row a model that was measured."""
    rows = []
    for workload in WORKLOADS:
        times = {name: clock.estimate(case(workload, name, threads), held) for name in _MAKES}
        known = {name: time for name, time in times.items() if time is not None}
        if ARMOPT in known and BASELINE in known:
            mine = known.pop(ARMOPT)
            cells = [f"{known[name]:.3g}" if name in known else "" for name in _MAKES if name != ARMOPT]
            ratios = [f"{known[BASELINE] / mine:.2f}x", f"{min(known.values()) / mine:.2f}x"]
            rows.append([workload, *cells, f"{mine:.3g}", *ratios])
    return tables.table(rows, ["model", *_MAKES, "fast math / armopt", "best other / armopt"]) if rows else ""


def section(held: Mapping[str, Measure]) -> str:
    """The part of the page, with its marks."""
    figures = targets.product(PRODUCT).clock
    assert figures is not None
    made = {threads: table(threads, held) for threads in THREADS}
    parts = [
        f"{'One thread' if threads == 1 else f'{threads} threads'}:\n\n{text}" for threads, text in made.items() if text
    ]
    return "\n\n".join([BEGIN, _TITLE.format(error=figures.error), *parts, END])


_TITLE = """## Estimated time

Estimated milliseconds of the same calls on Graviton3, never a time that was measured: [clock.md](clock.md) says how a
call's cycles, bytes and page faults become one, and judges it by published times, of which nine of ten are within
{error:.2f}x. Which of two contenders is faster is surer than either time. Bundles are planned for the number of
threads. ONNX Runtime's threads take work as they come, which under emulation is not as on the real machine: it is
estimated for one thread alone. Cells without a number were not measured."""


def main() -> int:
    """Writes the part of the page; returns the exit code."""
    made = section(measuring.read())
    pattern = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    PAGE.write_text(pattern.sub(lambda _: made, PAGE.read_text()))
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
