"""A kernel of another package: one object and one line; it is planned, bound, repaired with, drawn and documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import fx, nn

from armopt import targets
from armopt.accuracy import compare, gates
from armopt.accuracy.gates import Figures
from armopt.bundle.program import Program
from armopt.compiler import plan_page, repair
from armopt.compiler.captured_model import capture_model
from armopt.compiler.recipe import Planned, Recipe
from armopt.errors import InputError
from armopt.ir.records import Backend, Op, Plan, Site
from armopt.kernels import table
from armopt.kernels.base import Kernel, KernelCall, Rounding, Use
from armopt.kernels.examples import linear
from armopt.kernels.onednn import primitives
from armopt.plan.cost_policy import CostPolicy
from armopt.plan.costs import TERMS, CostTable, Variant
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime.bind import Binder
from benchmarks import kernels_table
from tests.arm64 import kernel_cases

COLOUR = "#ff00aa"
GRAVITON3 = targets.load("graviton3")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def _refuses(site: Site) -> str | None:
    return "more than 64 rows" if site.m > 64 else None


def _pack(weight: torch.Tensor, site: Site) -> torch.Tensor:
    return weight.float()


def _emit(call: KernelCall) -> fx.Node:
    return call.with_post_op(call.call(torch.ops.aten.linear.default, call.x, call.weight, call.bias))


TOY = Kernel(
    name="toy",
    op=Op.LINEAR,
    backend=Backend.BLAS,
    activations=torch.float32,
    rounding=Rounding(torch.float32, torch.bfloat16),
    covers="Linear, up to 64 rows",
    summary="`linear`, as it comes",
    refuses=_refuses,
    pack=_pack,
    emit=_emit,
    uses=frozenset(Use),
    colour=COLOUR,
    examples={"graviton3": linear((8, 16, 8))},
)


@pytest.fixture
def toy() -> Iterator[Kernel]:
    before = table.kernels()
    table.register(TOY, before="blas_fp32_w16")
    yield TOY
    table.unregister(TOY)
    assert table.kernels() == before


def planned(policy: ThresholdPolicy | CostPolicy) -> Planned:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval()
    return Recipe(GRAVITON3, policy).plan_part(capture_model(model, (X,)).parts[0])


def lowered(whole: Planned) -> tuple[Program, ...]:
    return Recipe(GRAVITON3, ThresholdPolicy()).lower_part(whole)


def kernels_of(plan: Plan) -> list[str]:
    return [decision.kernel for decision in plan.decisions]


def test_it_has_its_place(toy: Kernel) -> None:
    assert table.get("toy") is toy
    names = [kernel.name for kernel in table.kernels(Op.LINEAR, Use.FALLBACK)]
    assert names.index("toy") == names.index("blas_fp32_w16") - 1
    with pytest.raises(InputError, match="there is a kernel 'toy' already"):
        table.register(toy)


def test_it_is_last_before_plain_aten_where_nothing_is_said() -> None:
    table.register(TOY)
    try:
        assert [kernel.name for kernel in table.kernels(Op.LINEAR)][-2:] == ["toy", "aten_linear"]
    finally:
        table.unregister(TOY)
    with pytest.raises(InputError, match="unknown kernel 'nothing'"):
        table.register(TOY, before="nothing")
    with pytest.raises(InputError, match="unknown kernel 'toy'"):
        table.get("toy")


def test_policies_plan_it(toy: Kernel) -> None:
    assert kernels_of(planned(ThresholdPolicy(rows=64)).plans[0]) == ["toy"]
    one_call = Variant("", 1, 1, (1.0, *[0.0] * (len(TERMS) - 1)))
    costs = CostTable("", "", {"toy": [one_call]}, {}, {})
    assert kernels_of(planned(CostPolicy(costs)).plans[0]) == ["toy"]


def test_a_load_binds_it(toy: Kernel) -> None:
    (program,) = lowered(planned(ThresholdPolicy(rows=64)))
    module, (bound,) = Binder(fast_math=False).bind(program)
    assert (bound.planned, bound.kernel, bound.reason) == ("toy", "toy", "")
    # FP32 sums of 16 terms in another order
    assert torch.allclose(module(X)[0], program.graph_module(X)[0], atol=1e-6)


def test_a_load_falls_back_to_it(toy: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("armopt.kernels.onednn_convolution.pack_weight", fail)
    monkeypatch.setattr(primitives, "api", lambda: "no symbols")  # hosts with BF16 offer one
    (program,) = lowered(planned(ThresholdPolicy(rows=1)))
    _, (bound,) = Binder(fast_math=False).bind(program)
    assert (bound.planned, bound.kernel) == ("conv1x1_bf16", "toy")


def test_repair_takes_it(toy: Kernel) -> None:
    """As the kernel that multiplies in FP32, on weights in BF16."""
    whole = planned(ThresholdPolicy(rows=1))
    sites = lowered(whole)[0].sites

    def evaluate(plan: Plan) -> Figures:
        steps = min(table.get(name).steps_out_of_bf16 for name in kernels_of(plan))
        reference = torch.ones(8)
        return Figures((compare("y", reference, reference + (0 if steps >= toy.steps_out_of_bf16 else 1)),), {})

    found = repair.search(
        whole.plans, [sites], [gates.Gate("max_abs", "<=", 0.5)], evaluate, lambda plan, node: evaluate(plan)
    )
    assert [(change.before, change.after) for change in found.changes] == [("conv1x1_bf16", "toy")]
    assert [decision.layout for decision in found.plans[0].decisions] == [toy.layout]


def test_it_is_drawn_in_its_colour(toy: Kernel) -> None:
    page = plan_page.render(planned(ThresholdPolicy(rows=64)))
    assert f'<i style="background: {COLOUR}"></i>toy: 1' in page


def test_it_is_documented_and_compared_with_its_twin(toy: Kernel) -> None:
    row = "| `toy` | Linear, up to 64 rows | FP32 | BF16, widened at load | FP32 | `linear`, as it comes |"
    assert row in kernels_table.markdown().splitlines()
    assert kernel_cases.Case("toy", linear((8, 16, 8))[0]) in kernel_cases.examples()["graviton3"]


def test_the_documentation_is_what_the_kernels_say() -> None:
    """python -m benchmarks.kernels_table --write"""
    text = kernels_table.PAGE.read_text()
    assert kernels_table.page(text) == text
