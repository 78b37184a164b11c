"""``armopt targets``: the products that armopt knows."""

from __future__ import annotations

from armopt.cli import options
from armopt.cli.output import Output, text_table


def targets(as_json: options.Json = False) -> None:
    """List the targets: core, SIMD, BF16, cache, and where each figure comes from (--json)."""
    from armopt import targets as known

    found = [*(known.load(name) for name in known.names()), known.this_host()]
    described = [
        {
            "name": t.name,
            "core": t.core,
            "bf16": t.bf16,
            "vector_bits": t.vector_bits,
            "simd_pipes": t.simd_pipes,
            "l2_kib": t.l2_kib,
            "cores": t.cores,
            "isa_features": sorted(t.isa_features),
            "provenance": dict(t.provenance),
        }
        for t in found
    ]
    rows = [
        (t.name, t.core, "yes" if t.bf16 else "no", f"{t.simd_pipes}x{t.vector_bits}", t.l2_kib, t.cores) for t in found
    ]
    Output(as_json).result(
        {"targets": described}, lambda: text_table(("target", "core", "BF16", "SIMD", "L2 KiB", "cores"), rows)
    )
