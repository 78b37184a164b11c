"""Keeps ONNX Runtime's BF16 flag away from products that it gets wrong.

With the flag on, MatMul by a matrix that is no constant gives wrong values where that has more than 256 rows and a
thread works on at most 64 of its columns: seen with the version in session.SEEN_WITH on emulated cores
(tests/arm64/test_onnx_runtime.py). The product of attention's probabilities with its values is one such, from 257
tokens on. The flag has no effect on Einsum.
"""

from __future__ import annotations

import onnx_ir as ir

#: Rows of the second matrix up to which the flag is right whatever the number of columns and threads.
MOST_ROWS = 256


def guard(model: ir.Model) -> tuple[str, ...]:
    """MatMul(a, b) -> Einsum(a, b) where b is no constant and has, or may have, more than MOST_ROWS rows.

    Returns:
        The names of the nodes.
    """
    guarded = []
    constants: set[ir.Value | None] = {None, *model.graph.initializers.values()}
    for node in list(model.graph):
        if constants.issuperset(node.inputs):  # ONNX Runtime computes it once, when it loads
            constants.update(node.outputs)
            continue
        if node.op_type != "MatMul" or node.domain:
            continue
        a, b = node.inputs
        if a is None or a.dtype != ir.DataType.FLOAT or b is None or b in constants:
            continue
        if a.shape is not None and isinstance(a.shape[-1], int) and a.shape[-1] <= MOST_ROWS:
            continue
        einsum = ir.node("Einsum", [a, b], {"equation": _equation(a, b)}, name=node.name, num_outputs=1)
        result = einsum.outputs[0]
        old = node.outputs[0]
        result.name, result.shape, result.type = old.name, old.shape, old.type
        model.graph.insert_before(node, einsum)
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        guarded.append(str(einsum.name))
    return tuple(guarded)


def _equation(a: ir.Value, b: ir.Value) -> str:
    """What MatMul means for operands of these ranks. An ellipsis stands for as many dimensions on either side."""
    ranks = [2 if value.shape is None else len(value.shape) for value in (a, b)]
    stacked = [max(rank - 2, 0) for rank in ranks]
    more = "abcdefgh"[: abs(stacked[0] - stacked[1])]
    shared = "..." if min(stacked) else ""
    first, second = (f"{more if own > other else ''}{shared}" for own, other in (stacked, stacked[::-1]))
    rows, columns = "m" if ranks[0] > 1 else "", "n" if ranks[1] > 1 else ""
    return f"{first}{rows}k,{second}k{columns}->{more}{shared}{rows}{columns}"
