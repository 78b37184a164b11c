"""What multiplies in a graph, and what of it is not in BF16."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planning import plan
from torch import Tensor, nn
from torch.nn import functional

import armopt
from armopt.accuracy.report import page
from armopt.bundle import manifest as manifests
from armopt.cli import inspect as cli_inspect
from armopt.cli import plan as cli_plan
from armopt.compiler import plan_page
from armopt.ir.records import Remainder
from armopt.plan import remainder
from tests.hashed_manifest import hashed


class Product(nn.Module):
    """A function of an input and of weights by number."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def left(model: nn.Module, *inputs: Tensor, target: str = "graviton3") -> Remainder:
    _, planned = plan(model.eval(), *inputs, target=target)
    return remainder.find(planned.plans[0])


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


#: Model, inputs, and of the one product that stays: operation, multiplications, bytes of weights.
ON_WEIGHTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], tuple[str, int, int]]] = {
    "vector": (lambda: Product(lambda x, w: torch.mv(x, w), (4,)), (x(5, 4),), ("aten.mv", 20, 16)),
    "chosen_by_data": (
        lambda: Product(lambda x, i, w: torch.bmm(x.double(), w.double()[i]), (4, 6, 8)),
        (x(3, 1, 6), torch.tensor([0, 3, 0])),
        ("aten.bmm", 144, 1536),
    ),
    "of_double": (
        lambda: Product(lambda x, w: x.double() @ w.double(), (6, 8)),
        (x(3, 6),),
        ("aten.matmul", 144, 384),
    ),
    "chain": (
        lambda: Product(lambda x, a, b: torch.linalg.multi_dot([x, a, b]), (6, 2), (2, 4)),
        (x(3, 6),),
        ("aten.linalg_multi_dot", 60, 80),
    ),
}


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_a_product_on_weights_that_is_no_layer_is_listed(name: str) -> None:
    build, inputs, (op, multiplications, size) = ON_WEIGHTS[name]
    found = left(build(), *inputs)
    (row,) = found.products
    assert (row.op, row.multiplications, row.weight_bytes) == (op, multiplications, size)
    assert found.share(row.multiplications) == 1
    assert row.reason
    assert found.activations == 0


def test_products_of_two_activations_are_one_figure() -> None:
    found = left(Product(lambda x, w: (x @ x.mT) @ functional.linear(x, w), (8, 6)), x(2, 4, 6))
    assert (found.products, found.activations) == ((), 2)
    assert found.activation_multiplications == 2 * 4 * 4 * 6 + 2 * 4 * 4 * 8
    assert found.multiplications == found.activation_multiplications + 2 * 4 * 6 * 8


def test_a_bias_is_no_factor() -> None:
    found = left(Product(lambda x, b: torch.addmm(b, x, x.T), (5,)), x(5, 6))
    assert (found.products, found.activations) == ((), 1)


def test_a_weight_made_by_the_input_is_none() -> None:
    found = left(Product(lambda x, w: functional.linear(x, functional.linear(x, w)), (6, 6)), x(5, 6))
    assert (found.products, found.activations) == ((), 1)


@torch.library.custom_op("armopt_tests::secret", mutates_args=())
def secret(x: Tensor, weight: Tensor) -> Tensor:
    """A product that nothing is known of."""
    return x @ weight


@secret.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def test_an_unknown_operation_on_a_weight_is_listed_without_a_count() -> None:
    found = left(Product(lambda x, w, b: secret(x, w) + b, (6, 8), (3, 8)), x(3, 6))
    (row,) = found.products
    assert (row.op, row.multiplications, row.weight_bytes) == ("armopt_tests.secret", 0, 192)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Product(lambda i, table: functional.embedding(i.long(), table) * 2, (9, 4)),
        lambda: nn.EmbeddingBag(9, 4),
        lambda: Product(lambda i, a: torch.cat([a[i.flatten()], a + 1]), (9, 4)),
    ],
)
def test_what_multiplies_no_matrices_is_not_listed(model: Callable[[], nn.Module]) -> None:
    assert left(model(), torch.tensor([[1, 2], [3, 4]])).products == ()


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))


def test_a_layer_in_fp32_is_listed_with_the_reason_of_its_plan() -> None:
    _, planned = plan(grouped().eval(), x(1, 8, 9, 9))
    decided, _ = planned.plans[0].decisions
    (row,) = remainder.find(planned.plans[0]).products
    assert (row.node, row.op, row.reason) == (decided.node, "conv", decided.reason)
    assert row.multiplications == 49 * 8 * 4 * 9
    assert row.weight_bytes == 8 * 4 * 9 * 4


def test_without_bf16_only_what_is_no_layer_is_listed() -> None:
    found = left(grouped(), x(1, 8, 9, 9), target="graviton2")
    assert found.products == ()
    assert found.multiplications == 49 * 8 * 4 * 9 + 25 * 8 * 8 * 9
    chain, inputs, _ = ON_WEIGHTS["chain"]
    assert len(left(chain(), *inputs, target="graviton2").products) == 1


class Mixed(nn.Module):
    """One of each: in BF16, a layer in FP32, a product that is no layer, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(64, 64)
        self.chain = nn.ParameterList(nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.conv(x))
        return (y @ y.mT) @ torch.einsum("bsi,ij,jo->bso", y, self.chain[0], self.chain[1])


SAMPLE = x(2, 8, 64)


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture(scope="module")
def bundled(mixed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> manifests.Manifest:
    folder = tmp_path_factory.mktemp("mixed")
    checks = armopt.Checks(task="none")
    return armopt.optimize(mixed, (SAMPLE,), output=folder / "b", policy="threshold=1", checks=checks).manifest


def test_plan_inspect_report_and_explain_say_the_same(mixed: nn.Module, bundled: manifests.Manifest) -> None:
    _, planned = plan(mixed, SAMPLE)
    (said,) = bundled.not_in_bf16
    assert {row.op for row in said.products} == {"conv", "aten.einsum"}
    assert said.activations == 2
    assert remainder.find(planned.plans[0]).products == said.products
    read = manifests.from_bytes(manifests.to_bytes(bundled), "m")
    assert read.not_in_bf16 == bundled.not_in_bf16

    by_json = [cli_inspect.to_json(bundled, (0, 0))["not_in_bf16"], cli_plan.to_json(planned)["not_in_bf16"]]
    assert by_json[0] == by_json[1]
    assert by_json[0][0]["products"][0]["share"] == said.share(said.products[0].multiplications)
    report = page.About.of(bundled, "b").not_in_bf16
    assert report == bundled.not_in_bf16
    texts = [
        cli_inspect.text(bundled, (0, 0), every=True),
        cli_plan.as_text(planned, every=True),
        plan_page.render(planned),
    ]
    for text in texts:
        assert "Not in BF16" in text
        assert "Products of two activations: 2" in text
        assert all(row.node in text and row.reason.split("`")[0] in text for row in said.products)
        assert "Plain ATen" not in text


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_says_it_too(mixed: nn.Module, bundled: manifests.Manifest) -> None:
    run = torch.compile(mixed, backend="armopt", options={"target": "graviton3", "policy": "threshold=1"})
    with torch.no_grad():
        run(SAMPLE)
    (said,) = armopt.explain(mixed).not_in_bf16
    (wanted,) = bundled.not_in_bf16
    figures = [[(row.op, row.multiplications, row.weight_bytes) for row in each.products] for each in (said, wanted)]
    assert figures[0] == figures[1]
    assert said.activations == wanted.activations


def test_a_manifest_from_before_still_loads(bundled: manifests.Manifest) -> None:
    content = json.loads(manifests.to_bytes(bundled))
    del content["not_in_bf16"]
    assert manifests.from_bytes(hashed(content), "m").not_in_bf16 == ()
