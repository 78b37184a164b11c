"""Measures kernels on this host by time, on the shapes that a bundle has.

Unlike instruction counts, times see caches, memory and threads as they are in deployment. All kernels of a shape take
turns in each round, so that whatever else the host does hits them alike; a shape's figure is the median over rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from armopt import environment, targets
from armopt.ir.records import Op, Site
from armopt.kernels import table
from armopt.kernels.base import Kernel, Use
from armopt.kernels.timings import Timings, site_key
from armopt.runtime import own, probe
from armopt.runtime.bind import single

#: Linear shapes for a host without a bundle: rows, then (K, N).
_ROWS = (1, 8, 32, 128)
_SIZES = ((256, 256), (768, 768), (768, 3072), (1024, 1024), (4096, 4096))


def default_sites() -> tuple[Site, ...]:
    """Linear layers of common sizes."""
    return tuple(Site("linear", Op.LINEAR, m, k, n, (m, k), (n, k)) for m in _ROWS for k, n in _SIZES)


def measure(
    sites: Sequence[Site],
    *,
    rounds: int = 15,
    fast_math: bool,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Timings:
    """Times every kernel that this host runs properly, on every distinct site.

    Args:
        sites: What to measure.
        rounds: Rounds per site; in each, every kernel is called once.
        fast_math: Whether oneDNN multiplies FP32 in BF16 in this process.
        progress: Told of each site.
    """
    distinct = {site_key(site): site for site in sites}
    times: dict[str, dict[str, float]] = {}
    for done, (key, site) in enumerate(distinct.items()):
        progress(f"{site.op} {'x'.join(map(str, site.shape))}", done, len(distinct))
        kernels = table.kernels(site.op, Use.PLAN, Use.FALLBACK)
        runs = {kernel.name: run for kernel in kernels if (run := _prepare(kernel, site, fast_math)) is not None}
        times[key] = _interleaved(runs, rounds)
    record = environment.record()
    host = {name: record.get(name, "") for name in ("torch", "onednn", "blas", "threads")}
    return Timings(host | {"core": targets.this_host().core, "fast_math": str(fast_math)}, times)


def _prepare(kernel: Kernel, site: Site, fast_math: bool) -> Callable[[], Any] | None:
    """A kernel ready to call on a site; None where this host can't run it properly."""
    if kernel.refuses(site) is not None:
        return None
    stored = torch.randn(site.weight, generator=torch.Generator().manual_seed(0)) / math.sqrt(max(1, site.k))
    bias = torch.zeros(site.n, dtype=kernel.activations)
    primitive = own.proven(kernel, site, stored, bias)
    if primitive is not None:
        return single(kernel, site, primitive, bias)
    if kernel.fast_math and not fast_math:
        return None
    try:
        weight = kernel.packed_weight(stored, site)
    except RuntimeError:  # e.g. oneDNN on x86 packs BF16 with AVX-512 alone
        return None
    run = single(kernel, site, weight, bias)
    return run if probe.refusal(kernel, site, run) is None else None


def _interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for round_number in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if round_number:  # the first round warms up
                    samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items() if values}
