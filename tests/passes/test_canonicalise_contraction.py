from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, Contract, Forward, Forward2, noise, run_pass, storages, until
from torch import fx, nn

from armopt.passes import Pass, pipeline
from armopt.passes.canonicalise_contraction import CanonicaliseContraction
from armopt.passes.canonicalise_linear import CanonicaliseLinear

BEFORE = until(CanonicaliseContraction)
EINSUM, LINEAR, MATMUL = "aten.einsum.default", "aten.linear.default", "aten.matmul.default"


def einsum(equation: str, *shape: int, first: bool = False) -> Callable[[], nn.Module]:
    """einsum of the input and a weight of that shape, which comes `first` or last."""

    def function(s: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *((s.w, x) if first else (x, s.w)))

    return lambda: Forward(function, w=nn.Parameter(noise(*shape)))


class TestCanonicaliseContraction(Contract):
    folder = "canonicalise_contraction"
    # The same FP32 products, summed in another order: a few units of 2^-24 of the largest.
    tolerance = 1e-6

    def before(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        return pipeline.run(graph_module, BEFORE)[0]

    def make(self, graph_module: fx.GraphModule) -> Pass:
        return CanonicaliseContraction(least=64 * 64)  # golden files of small models

    cases = (
        Case(
            "into_heads",
            einsum("bsd,dhk->bshk", 6, 2, 4),
            (noise(2, 3, 6),),
            batch=(1, 4),
            ops={LINEAR: 1, "aten.unflatten.int": 1},
            absent=(EINSUM, "aten.permute.default"),
            rewritten=1,
        ),
        Case(
            "out_of_heads",
            einsum("bshk,hkd->bsd", 2, 4, 6),
            (noise(2, 3, 2, 4),),
            batch=(1, 4),
            ops={LINEAR: 1, "aten.flatten.using_ints": 1},
            absent=(EINSUM, "aten.permute.default"),
        ),
        Case("matrix", einsum("bd,de->be", 6, 4), (noise(1, 6),), ops={MATMUL: 1}, absent=(EINSUM,)),
        Case("transposed", einsum("bnd,ed->bne", 4, 6), (noise(2, 3, 6),), ops={LINEAR: 1}, absent=(EINSUM,)),
        Case(
            "implicit_and_ellipsis",
            einsum("...d,de", 6, 4),
            (noise(2, 3, 5, 6),),
            ops={MATMUL: 1},
            absent=(EINSUM, "aten.permute.default"),
        ),
        Case("middle", einsum("bdn,ed->ben", 4, 6), (noise(2, 6, 3),), ops={LINEAR: 1, "aten.permute.default": 2}),
        Case("weight_first", einsum("ed,bnd->ebn", 4, 6, first=True), (noise(2, 3, 6),), ops={LINEAR: 1}),
        Case("summed_alone", einsum("bnd,edk->be", 4, 6, 3), (noise(2, 5, 6),), ops={LINEAR: 1}, absent=(EINSUM,)),
        Case("spread", einsum("bnd,nde->be", 5, 6, 4), (noise(2, 1, 6),), ops={LINEAR: 1}, absent=(EINSUM,)),
        Case(
            "tensordot",
            lambda: Forward(
                lambda s, x: torch.tensordot(torch.tensordot(x, s.a, 1), s.b, ([3, 1], [0, 2])),
                a=nn.Parameter(noise(6, 2, 4)),
                b=nn.Parameter(noise(4, 5, 3)),
            ),
            (noise(2, 3, 6),),
            ops={LINEAR: 2},
            absent=("aten.tensordot.default",),
            rewritten=2,
        ),
        Case(
            "matrix_on_the_left",
            lambda: Forward(
                lambda s, x: s.w @ torch.inner(s.w @ x, s.v), w=nn.Parameter(noise(4, 4)), v=nn.Parameter(noise(3, 5))
            ),
            (noise(2, 4, 5),),
            ops={LINEAR: 3},
            absent=(MATMUL, "aten.inner.default"),
            rewritten=3,
        ),
        Case(
            "vector_input",
            lambda: Forward(lambda s, x: torch.mv(s.w, x) + s.w @ x, w=nn.Parameter(noise(4, 6))),
            (noise(6),),
            ops={LINEAR: 2},
            absent=("aten.mv.default", MATMUL),
        ),
        Case(
            "outputs_of_a_batch",
            lambda: Forward(lambda s, x: x @ s.w, w=nn.Parameter(noise(3, 6, 4))),
            (noise(5, 6),),
            ops={LINEAR: 1},
            absent=(MATMUL,),
        ),
        Case(
            "three_operands",
            lambda: Forward(
                lambda s, x: torch.einsum("bi,bij,oij,bo->b", x, x.unsqueeze(2) * s.a, s.w, x[:, :3]),
                w=nn.Parameter(noise(3, 4, 5)),
                a=noise(5),
            ),
            (noise(2, 4),),
            ops={LINEAR: 1, EINSUM: 2},
        ),
        Case(
            "batch_of_matrices",
            lambda: Forward(
                lambda s, x: torch.baddbmm(s.b, torch.bmm(x, s.w), s.v),
                w=nn.Parameter(noise(3, 64, 80)),
                v=nn.Parameter(noise(3, 80, 64)),
                b=nn.Parameter(noise(3, 1, 64)),
            ),
            (noise(3, 2, 64),),
            ops={LINEAR: 6, "aten.stack.default": 2, "aten.add.Tensor": 1},
            absent=("aten.bmm.default", "aten.baddbmm.default"),
            rewritten=2,
        ),
        Case(
            "heads_of_their_own",
            lambda: Forward(
                lambda s, x: torch.einsum("bhsk,hkd->bshd", x, s.w) + (x @ s.w).transpose(1, 2),
                w=nn.Parameter(noise(2, 64, 64)),
            ),
            (noise(2, 2, 3, 64),),
            batch=(1, 4),
            ops={LINEAR: 4},
            absent=(EINSUM, MATMUL),
            rewritten=2,
        ),
        Case(
            "small_matrices",
            einsum("bhk,hkd->bhd", 2, 4, 6),
            (noise(3, 2, 4),),
            skips=("2 matrices of 24 values: their calls would cost more than they save",),
            rewritten=0,
        ),
        Case(
            "activations",
            lambda: Forward(lambda s, x: torch.einsum("bi,bj->ij", x, x)),
            (noise(2, 3),),
            skips=("the weight is not a constant",),
            rewritten=0,
        ),
        Case(
            "several_constants",
            lambda: Forward(
                lambda s, x: torch.einsum("bi,ij,jk->bk", x, s.a, s.b),
                a=nn.Parameter(noise(4, 5)),
                b=nn.Parameter(noise(5, 3)),
            ),
            (noise(2, 4),),
            skips=("2 of its 3 operands are constants",),
            rewritten=0,
        ),
        Case("diagonal", einsum("bb,bd->bd", 3, 4), (noise(3, 3),), skips=("takes a diagonal",), rewritten=0),
        Case("vector_weight", einsum("bd,d->b", 6), (noise(2, 6),), skips=("the weight is a vector",), rewritten=0),
        Case(
            "outer",
            einsum("b,d->bd", 6),
            (noise(2),),
            skips=("it sums over nothing that both operands have",),
            rewritten=0,
        ),
        Case(
            "doubles",
            lambda: Forward(lambda s, x: torch.einsum("bd,de->be", x.double(), s.w).float(), w=noise(4, 5).double()),
            (noise(3, 4),),
            skips=("works on another dtype than FP32",),
            rewritten=0,
        ),
        Case(
            "nothing_to_sum",
            einsum("bd,de->be", 0, 4),
            (noise(2, 0),),
            skips=("an empty or scalar operand",),
            rewritten=0,
        ),
        Case(
            "weight_spreads",
            einsum("bd,de->be", 1, 4),
            (noise(2, 6),),
            skips=("its sizes 6 and 1 are not known to be equal",),
            rewritten=0,
        ),
    )


def bilinear(**options: Any) -> nn.Module:
    return Forward2(lambda s, x, y: s.layer(x, y), layer=nn.Bilinear(4, 5, 3, **options))


@pytest.mark.parametrize("bias", [True, False])
def test_a_bilinear_layer_is_a_linear_and_a_product_of_activations(bias: bool) -> None:
    inputs = noise(2, 6, 4), noise(2, 6, 5)
    result = run_pass(CanonicaliseContraction(), lambda: bilinear(bias=bias), *inputs, before=BEFORE)
    targets = [str(n.target) for n in result.graph_module.graph.nodes if n.op == "call_function"]
    assert targets == [LINEAR, "aten.unflatten.int", EINSUM, *["aten.add.Tensor"] * bias]
    torch.manual_seed(0)
    expected = bilinear(bias=bias)(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_matrix_that_others_read_is_transposed_once() -> None:
    model = lambda: Forward(  # noqa: E731
        lambda s, x: torch.einsum("bi,ij->bj", x, s.w) + x @ s.w, w=nn.Parameter(noise(5, 5))
    )
    result = run_pass(CanonicaliseLinear(), model, noise(3, 5), before=until(CanonicaliseLinear))
    assert len(result.rewritten) == 2
    assert storages(result.graph_module) == 1


def test_a_constant_that_is_read_alike_is_arranged_once() -> None:
    def function(s: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bd,dhk->bhk", x, s.w) + torch.einsum("nc,cij->nij", x * 2, s.w)

    model = lambda: Forward(function, w=nn.Parameter(noise(6, 2, 4)))  # noqa: E731
    result = run_pass(CanonicaliseContraction(), model, noise(3, 6), before=BEFORE)
    assert len(result.rewritten) == 2
    assert storages(result.graph_module) == 1
