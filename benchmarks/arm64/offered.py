"""Counts everything that oneDNN offers for each layer of a model, beside what armopt's bundle takes.

    python -m benchmarks.arm64.offered "mobilenet_v3_large 224"
    python -m benchmarks.arm64.offered "mlp/4 batch 10" "gpt2 block, 1 token" --torch 2.13.0

Thousands of instructions and of cycles (benchmarks/arm64/cycles.py) of one execution on the emulated Graviton3, without
post-op, of each implementation but references: in BF16, in FP32 multiplied in BF16, and in FP32, and of what is a
product both as a convolution and as an inner product. The first of a layer is the one of the fewest instructions; their
sum is what no plan can go below, whatever it chooses. The second sum is of the fewest instructions among what needs
hardly more cycles than the quickest: what a plan for time can't go below.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from armopt.emulation.folder import DEFAULT_TORCH

#: Activations, and whether FP32 is multiplied in BF16.
MODES = {"BF16": ("bfloat16", False), "fast math": ("float32", True), "FP32": ("float32", False)}
#: No layer is offered more.
_MOST = 5
_HARDLY_MORE = 1.05
_PARTS = ("source", "weight", "result", "geometry")


def layers(path: str) -> list[dict[str, Any]]:
    """On the emulated side: the layers of a bundle that are primitives of their own, as oneDNN has their shapes."""
    from armopt.kernels.onednn.layer import Wanted
    from benchmarks.arm64 import jobs

    nodes = jobs.bundle(path).graph_module.graph.nodes
    held = [(n.name, cell.cell_contents) for n in nodes for cell in getattr(n.target, "__closure__", None) or ()]
    return [
        {"node": name, **{part: getattr(wanted, part) for part in _PARTS}}
        for name, wanted in held
        if isinstance(wanted, Wanted)
    ]


def make(shape: Mapping[str, Any], mode: str, index: int, number: int) -> Callable[[], str]:
    """One execution by an implementation, on the emulated side; says its name with the number of the job.

    Raises:
        LookupError: There are not so many, or it is a reference.
    """
    import torch

    from armopt.kernels.onednn import primitives
    from armopt.kernels.onednn.layer import Wanted

    api = primitives.api()
    assert isinstance(api, primitives.Api)
    name, fast_math = MODES[mode]
    dtype = getattr(torch, name)
    source, weight, result = (tuple(shape[part]) for part in _PARTS[:3])
    wanted = Wanted(source, weight, result, dtype, dtype, shape["geometry"])
    tensors = (
        api.strided(source, wanted.strides(source), dtype),
        api.anyhow(weight, dtype),
        api.strided((result[1],), (1,), dtype),
        api.strided(result, wanted.strides(result), dtype),
    )
    attributes = api.attributes(fast_math=fast_math, post_op="")
    try:
        product = shape["geometry"] is None
        found = (
            api.inner_product(tensors, attributes)
            if product
            else api.convolution(tensors, shape["geometry"], attributes)
        )
    except primitives.OneDnnError as error:
        raise LookupError(str(error)) from error
    implementation = _advance(api, found, index)
    parts = {
        primitives.SRC: tensors[0],
        primitives.DST: tensors[3],
        primitives.BIAS: tensors[2],
        primitives.WEIGHTS: api.part(found, primitives.WEIGHTS_DESC),
        primitives.SCRATCHPAD: api.part(found, primitives.SCRATCHPAD_DESC),
    }
    buffers = {which: primitives.buffer(api.size(part)).zero_() for which, part in parts.items()}
    memories = {which: api.memory(part, primitives.aligned(buffers[which])) for which, part in parts.items()}
    array = (primitives.Argument * len(memories))(*(primitives.Argument(w, m.pointer) for w, m in memories.items()))
    place, primitive = ctypes.c_void_p(ctypes.addressof(array)), api.primitive(found)

    def run() -> str:
        primitives.check(api.execute(primitive.pointer, api.stream.pointer, len(memories), place), implementation)
        return implementation

    run.__dict__["memory"] = buffers, memories, array, found
    print(f"{_OFFERED}{number} {implementation}", flush=True)
    return run


_OFFERED = "implementation "


def _advance(api: Any, description: Any, index: int) -> str:
    """Goes to the implementation of that number; each counts once, also if oneDNN's cache has it in front."""
    from armopt.ir.onednn_names import is_reference

    names = [api.implementation(description)]
    while len(names) <= index:
        if not api.advance(description):
            raise LookupError(f"{len(names)} implementations")
        if (name := api.implementation(description)) not in names:
            names.append(name)
    if is_reference(names[index]):
        raise LookupError(f"a reference: {names[index]}")
    return str(names[index])


def forms(shape: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A layer as it is, and where it is a product of rows in the other form: a convolution or an inner product."""
    (n, k, *filters), geometry = shape["weight"], shape["geometry"]
    if geometry is None:
        rows = shape["source"][0]
        as_image = ((1, k, rows, 1), (n, k, 1, 1), (1, n, rows, 1), ((1, 1), (0, 0), (0, 0)))
        return [shape, dict(zip(_PARTS, as_image, strict=True))]
    batch, channels, *size = shape["source"]
    if filters != [1, 1] or channels != k or {*geometry[0], *geometry[2]} != {1, 0}:
        return [shape]
    rows = batch * size[0] * size[1]
    return [shape, dict(zip(_PARTS, ((rows, k), (n, k), (rows, n), None), strict=True))]


def offers(found: Sequence[Mapping[str, Any]], torch_version: str) -> list[list[tuple[float, float, str, str]]]:
    """For each layer what is offered: thousands of instructions and of cycles, mode and form, and implementation."""
    from armopt.targets.emulated import core_named
    from benchmarks.arm64 import counting, cycles, emulated_jobs
    from benchmarks.arm64.emulated_jobs import Job, Machine

    core = core_named("graviton3").name
    keys = [
        (number, form, mode, index)
        for number, shape in enumerate(found)
        for form in forms(shape)
        for mode in MODES
        for index in range(_MOST)
    ]
    jobs = [
        Job(
            "offered",
            "benchmarks.arm64.offered:make",
            {"shape": dict(form), "mode": mode, "index": index, "number": number},
            1,
        )
        for number, (_, form, mode, index) in enumerate(keys)
    ]
    names: dict[int, str] = {}
    counted: dict[int, cycles.Cycles] = {}

    def said(line: str) -> None:
        if line.startswith(_OFFERED):
            number, name = line.removeprefix(_OFFERED).split(" ", 1)
            names[int(number)] = name

    def keep(index: int, result: Mapping[str, Any]) -> None:
        if "error" not in result:
            counted[index] = cycles.cycles(cycles.blocks_of(result, core), core)

    machine = Machine("graviton3", torch_version, counting.FAST_MATH, timeout=4 * 3600)
    plugin = "memory=off"
    emulated_jobs.run(jobs, machine, "benchmarks.arm64.clock_region", lambda qemu: f"{qemu.clock},{plugin}", said, keep)
    offered: list[list[tuple[float, float, str, str]]] = [[] for _ in found]
    for index, made in counted.items():
        layer, form, mode, _ = keys[index]
        kind = "inner product" if form["geometry"] is None else "convolution"
        offered[layer].append((made.instructions / 1e3, made.cycles / 1e3, f"{mode}, {kind}", names[index]))
    return [sorted(each) for each in offered]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from armopt.emulation.worker import EmulatedWorker
    from benchmarks.arm64 import counting, tables
    from benchmarks.arm64.bundles import make_bundle

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.arm64.offered", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as in docs/benchmarks.md")
    parser.add_argument("--torch", default=DEFAULT_TORCH)
    options = parser.parse_args(arguments)
    for model in options.models:
        worker = EmulatedWorker("neoverse-v1", options.torch, counting.FAST_MATH)
        path = str(make_bundle(model, "graviton3", options.torch))
        held = worker.call("benchmarks.arm64.offered:layers", path=path, timeout=3600).value
        distinct = {str([layer[part] for part in _PARTS]): layer for layer in reversed(held)}
        times = Counter(str([layer[part] for part in _PARTS]) for layer in held)
        rows, least, least_of_quick = [], 0.0, 0.0
        for key, offered in zip(distinct, offers(list(distinct.values()), options.torch), strict=True):
            layer = distinct[key]
            shape = " ".join("x".join(map(str, layer[part])) for part in ("source", "weight"))
            head = [layer["node"], str(times[key]), shape]
            rows += [[*head, *(f"{x:,.0f}" for x in each[:2]), *each[2:]] for each in offered]
            least += min((each[0] for each in offered), default=0.0) * times[key]
            quickest = min((each[1] for each in offered), default=0.0)
            quick = [each[0] for each in offered if each[1] <= _HARDLY_MORE * quickest]
            least_of_quick += min(quick, default=0.0) * times[key]
        headers = ["node", "times", "source, weight", "instructions", "cycles", "form", "by"]
        print(f"{model}\n\n{tables.table(rows, headers)}\n")
        print(
            f"All {len(held)} layers by the fewest instructions: {least / 1e3:,.2f} million; by the fewest among what "
            f"needs at most {_HARDLY_MORE:.2f} times the cycles of the quickest: {least_of_quick / 1e3:,.2f}\n",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
