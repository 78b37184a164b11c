"""The recurrence in operations that torch.export traces quickly: nothing is written in place."""

from __future__ import annotations

import torch

_Tensor = torch.Tensor


def run(
    gates: _Tensor, weight: _Tensor, bias: _Tensor | None, h: _Tensor, c: _Tensor | None, cell: str, backwards: bool
) -> tuple[_Tensor, _Tensor]:
    """What :func:`armopt.kernels.recurrence.run` gives, one step after the other."""
    results: list[_Tensor] = []
    for gate in gates.unbind()[:: -1 if backwards else 1]:
        sums = torch.mm(h, weight) if bias is None else torch.addmm(bias, h, weight)
        if c is not None:
            i, f, o, new = (gate + sums).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * new.tanh()
            h = o.sigmoid() * c.tanh()
        elif cell == "gru":
            r, z, n = zip(gate.chunk(3, 1), sums.chunk(3, 1), strict=True)
            candidate = (n[0] + (r[0] + r[1]).sigmoid() * n[1]).tanh()
            h = candidate + (z[0] + z[1]).sigmoid() * (h - candidate)
        else:
            h = (gate + sums).tanh() if cell == "rnn_tanh" else (gate + sums).relu()
        results.append(h)
    return torch.stack(results[:: -1 if backwards else 1]), h if c is None else c
