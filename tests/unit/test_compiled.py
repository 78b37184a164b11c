"""armopt.compile: the module that it gives back is the module that it was."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import armopt
from armopt.dynamo import graphs as dynamo_graphs
from armopt.errors import ArmoptWarning, InputError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Classifier(torch.nn.Module):
    """Two layers, an embedding, a norm, dropout, and a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.body = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(128, 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.kind = "classifier"

    def forward(self, tokens: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        self.calls += 1
        hidden = self.body(self.norm(self.embed(tokens)))
        return {"logits": self.head(hidden).mean(1) * scale}


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def logits(model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*args, **kwargs)["logits"]
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """BF16 has 8 bits; three layers' rounding stays within 2 % of the largest value."""
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


def test_it_is_the_module_that_it_was(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3")
    assert type(made) is Classifier
    assert made is not model
    assert made.kind == "classifier"
    assert list(made.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(made.buffers(), model.buffers(), strict=True))
    assert [name for name, _ in made.named_modules()] == [name for name, _ in model.named_modules()]
    assert inspect.signature(made.forward) == inspect.signature(model.forward)
    assert isinstance(made.get_submodule("body.0"), torch.nn.Linear)
    assert "forward" not in model.__dict__
    assert not any("forward" in part.__dict__ for part in model.modules())


@pytest.mark.slow
def test_it_computes_in_bf16_what_the_model_does(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3")
    for args in ((tokens(),), (tokens(5, 9),), (tokens(1, 4), 2.0)):
        found, expected = logits(made, *args), logits(model, *args)
        assert_close(found, expected)
        assert not torch.equal(found, expected)
    assert_close(logits(made, scale=3.0, tokens=tokens()), logits(model, tokens(), 3.0))
    assert {layer.node for layer in made.forward.explain().layers} == {"body_0", "head"}


def test_with_inputs_it_is_compiled_at_once_and_buffers_stay(model: Classifier) -> None:
    made = armopt.compile(model, (tokens(),), target="graviton3")
    assert made.forward.explain().layers
    assert model.calls == 0
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    assert_close(logits(made, tokens()), logits(model, tokens()))
    assert counters["stats"]["unique_graphs"] == graphs
    named = armopt.compile(model, {"tokens": tokens()}, target="graviton3")
    assert named.forward.explain().layers


def test_the_result_has_no_gradient_even_outside_no_grad(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3")
    assert not made(tokens())["logits"].requires_grad


def test_hooks_run_on_the_module_and_inside_it(model: Classifier) -> None:
    model.register_forward_hook(lambda module, args, result: {"logits": result["logits"] + 1})
    model.norm.register_forward_hook(lambda module, args, result: result * 2)
    made = armopt.compile(model, target="graviton3")
    assert_close(logits(made, tokens()), logits(model, tokens()))
    seen = []
    made.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    logits(made, tokens())
    assert seen == [torch.Size([3, 7])]


def test_train_and_eval_keep_their_meaning(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3")
    expected = logits(made, tokens())
    made.train()
    assert made.body[2].training
    assert not model.body[2].training
    with pytest.warns(ArmoptWarning, match="Classifier: the model is in training mode.*eval") as said:
        losses = [made(tokens())["logits"].sum() for _ in range(2)]
    assert len(said) == 1
    losses[0].backward()
    assert model.head.weight.grad is not None
    made.eval()
    assert torch.equal(logits(made, tokens()), expected)


def test_a_step_of_training_is_seen_by_the_compiled_model(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3")
    before = logits(made, tokens())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(tokens())["logits"].square().sum().backward()
    optimizer.step()
    after = logits(made, tokens())
    assert not torch.allclose(before, after)
    assert_close(after, logits(model, tokens()))


class Branches(torch.nn.Module):
    """Two parts, one of which the input does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(torch.ones(1, 8))


def test_parts_fall_back_with_the_whole() -> None:
    model = Branches().eval()
    made = armopt.compile(model, target="graviton3")
    with pytest.warns(ArmoptWarning, match="an input requires a gradient") as said:
        made(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert len(said) == 1
    assert model.two.weight.grad is not None


def test_an_input_that_requires_a_gradient_falls_back() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval()
    made = armopt.compile(layer, target="graviton3")
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.warns(ArmoptWarning, match="an input requires a gradient"):
        made(x).sum().backward()
    torch.testing.assert_close(x.grad, layer[0].weight.sum(0).expand(2, 8))


def test_deepcopy_has_weights_of_its_own(model: Classifier) -> None:
    made = armopt.compile(model, (tokens(),), target="graviton3")
    other = copy.deepcopy(made)
    assert type(other) is Classifier
    with torch.no_grad():
        other.head.weight.mul_(0).add_(0.01)
    assert_close(logits(made, tokens()), logits(model, tokens()))
    plain = copy.deepcopy(model)
    plain.load_state_dict(other.state_dict())
    assert_close(logits(other, tokens()), logits(plain, tokens()))
    assert {layer.node for layer in other.forward.explain().layers} == {"body_0", "head"}


def test_pickle_of_the_model_and_of_the_compiled_one(model: Classifier) -> None:
    made = armopt.compile(model, (tokens(),), target="graviton3")
    plain = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(plain, tokens()), logits(model, tokens()))
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(logits(again, tokens()), logits(made, tokens()))
    assert again.forward.explain().layers


def test_load_state_dict_counts_at_once(model: Classifier) -> None:
    made = armopt.compile(model, (tokens(),), target="graviton3")
    torch.manual_seed(1)
    other = Classifier().eval()
    made.load_state_dict(other.state_dict())
    assert_close(logits(made, tokens()), logits(other, tokens()))


@pytest.mark.slow
def test_more_models_of_one_class_than_dynamo_compiles_for_one_function() -> None:
    limit = torch._dynamo.config.recompile_limit
    for i in range(limit + 2):
        torch.manual_seed(i)
        layer = torch.nn.Sequential(torch.nn.Linear(8 + i, 16)).eval()
        made = armopt.compile(layer, target="graviton3")
        x = torch.randn(4, 8 + i)
        with torch.no_grad():
            assert not torch.equal(made(x), layer(x))
        assert len(made.forward.explain().layers) == 1


class Ranks(torch.nn.Module):
    """Takes inputs of any rank: each is another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


@torch._dynamo.config.patch(recompile_limit=2)
def test_past_dynamos_limit_it_still_compiles() -> None:
    torch.manual_seed(0)
    layer = Ranks().eval()
    made = armopt.compile(layer, target="graviton3")
    with torch.no_grad():
        for rank in range(1, torch._dynamo.config.recompile_limit + 3):
            x = torch.randn(*[2] * (rank - 1), 16)
            found = made(x)
            assert_close(found, layer(x))
            assert not torch.equal(found, layer(x))


def test_compiled_again_it_takes_the_new_target(model: Classifier) -> None:
    made = armopt.compile(armopt.compile(model, target="graviton3"), target="graviton2")
    torch.testing.assert_close(logits(made, tokens()), logits(model, tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: armopt.compile(lambda x: x), "expected an nn.Module, found a function.*torch.compile"),
        (lambda m: armopt.compile(m.double()), "parameter embed.weight is float64"),
        (lambda m: armopt.compile(m, target="nothing"), "unknown target 'nothing'"),
        (lambda m: armopt.compile(m, policy="nothing"), "unknown policy 'nothing'"),
        (lambda m: armopt.compile(m, plans=-1), "plans is -1"),
        (lambda m: armopt.compile(m, {"wrong": tokens()}), "don't fit forward"),
        (lambda m: armopt.compile(m, (torch.zeros(2, 3),)), "fails on the example inputs"),
    ],
)
def test_errors_are_clear(model: Classifier, call: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(model)


# --- memory ---


@pytest.mark.slow
def test_released_weights_are_gone_and_the_model_still_runs(model: Classifier) -> None:
    plain = copy.deepcopy(model)
    kept = armopt.compile(copy.deepcopy(model), (tokens(),), target="graviton3").forward.explain()
    made = armopt.compile(model, (tokens(),), target="graviton3", release_original=True)
    found = made.forward.explain()
    matrices = sum(t.numel() * t.element_size() for t in (plain.body[0].weight, plain.head.weight))
    assert found.original_bytes <= kept.original_bytes - matrices + 64
    assert found.original_bytes + found.program_bytes < kept.original_bytes + kept.program_bytes
    assert made.head.weight.isnan().all()
    assert made.head.weight.shape == plain.head.weight.shape
    assert not made.embed.weight.isnan().any()
    for batch, length in ((3, 7), (1, 7), (6, 30), (40, 2)):
        assert_close(logits(made, tokens(batch, length)), logits(plain, tokens(batch, length)))


class Attention(torch.nn.Module):
    """One head: query, key and value read the same input; `mix` has their size, and is used by a function of it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.mix = torch.nn.Parameter(torch.randn(width, width) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v) @ (self.mix * 2).tanh())


def test_merged_projections_are_released_and_weights_of_their_size_are_not() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 9, 64)
    made = armopt.compile(model, (x,), target="graviton3", policy="threshold=1", release_original=True)
    (query, *_) = made.forward.explain().layers
    assert query.node == "query_merged"
    assert all(getattr(made, name).weight.isnan().all() for name in ("query", "key", "value", "out"))
    assert not made.mix.isnan().any()
    with torch.no_grad():
        for rows in (9, 200):
            x = torch.randn(2, rows, 64)
            assert_close(made(x), plain(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda made: made.state_dict(),
        copy.deepcopy,
        pickle.dumps,
        lambda made: made.train()(tokens()),
    ],
)
def test_what_needs_released_weights_is_an_error(model: Classifier, use: Any) -> None:
    made = armopt.compile(model, (tokens(),), target="graviton3", release_original=True)
    with pytest.raises(InputError, match="weights were released"):
        use(made)


def test_where_kernels_work_in_fp32_nothing_is_released(model: Classifier) -> None:
    expected = logits(model, tokens())
    made = armopt.compile(model, (tokens(),), target="graviton2", release_original=True)
    assert not made.head.weight.isnan().any()
    torch.testing.assert_close(logits(made, tokens()), expected, atol=1e-5, rtol=0)
    made.state_dict()


def test_graphs_of_one_model_share_their_packed_weights(model: Classifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmoptWarning)
        # BLAS: oneDNN's layout of a weight depends on the rows on some x86 hosts
        made = armopt.compile(model, (tokens(64, 8),), target="host", policy="threshold=1000000")
        once = made.forward.explain()
        logits(made, tokens(70, 9))
        logits(made, tokens(200, 11))
    more = made.forward.explain()
    assert len(more.layers) > len(once.layers)
    assert more.program_bytes < 1.1 * once.program_bytes


class Scaled(torch.nn.Module):
    """Two constants of the same values, which the pool holds once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.layer(x * torch.tensor([2.0, 3.0] * 8)) * torch.tensor([2.0, 3.0] * 8)
        return scaled


def test_constants_of_equal_values() -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    x = torch.randn(3, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ArmoptWarning)
        assert_close(armopt.compile(model, (x,), target="host")(x), model(x))


@pytest.mark.slow
@pytest.mark.full
def test_memory_stays_flat_over_a_thousand_shapes(model: Classifier) -> None:
    made = armopt.compile(model, target="graviton3", policy="cost=2.10")
    shapes = [(batch, length) for batch in range(2, 42) for length in range(2, 27)]
    random.Random(0).shuffle(shapes)
    assert len(shapes) == 1000
    for shape in shapes:  # PyTorch itself caches oneDNN's primitives for each shape, up to a limit
        logits(model, tokens(*shape))
    for shape in shapes[:300]:  # by then every bucket was met
        logits(made, tokens(*shape))
    gc.collect()
    before = _resident()
    for shape in shapes[300:]:
        logits(made, tokens(*shape))
    gc.collect()
    assert counters["stats"]["unique_graphs"] <= 4
    assert _resident() - before < 8e6


def test_a_model_that_is_gone_leaves_nothing() -> None:
    model = Classifier().eval()  # no fixture's, which would keep it
    made = armopt.compile(model, (tokens(),), target="graviton3")
    before = {id(tensor) for tensor in made.parameters()}
    graphs = [g for g in dynamo_graphs.graphs() if any(before & {id(t) for t in w.tensors} for w in g.held)]
    assert graphs
    del made, model
    gc.collect()
    assert [graph.held for graph in graphs] == [()] * len(graphs)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_weights_that_a_hook_computes_are_no_obstacle() -> None:
    """The older weight_norm keeps a tensor with a history on the module, which refuses to be copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = torch.nn.utils.weight_norm(torch.nn.Linear(64, 64))
    model = torch.nn.Sequential(normed, torch.nn.ReLU(), torch.nn.utils.spectral_norm(torch.nn.Linear(64, 64))).eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    compiled = armopt.compile(model)
    assert torch.nn.functional.cosine_similarity(compiled(x), model(x), dim=1).min() > 0.999
    assert {layer.op for layer in armopt.explain(compiled).layers} == {"linear"}
    assert len(armopt.explain(compiled).layers) == 2
