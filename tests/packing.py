"""Which reorders in oneDNN's log pack a tensor: for tests here and on the emulated core."""

from __future__ import annotations

from armopt.runtime.onednn_log import Execution, Tensor


def is_packing(execution: Execution) -> bool:
    """Whether a reorder packs a tensor: its destination has inner blocks, its source has none."""
    source, sink = execution.tensors.get("src"), execution.tensors.get("dst")
    packs = source is not None and sink is not None and _in_blocks(sink) and not _in_blocks(source)
    return execution.primitive == "reorder" and packs


def _in_blocks(tensor: Tensor) -> bool:
    return any(character.isdigit() for character in tensor.layout)
