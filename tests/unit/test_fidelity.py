"""The judge is the module as its user calls it: what a capture makes of it is compared with it, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt import accuracy, capture
from armopt.accuracy import fidelity, gates
from armopt.bundle.program import Program
from armopt.capture.calls import unchanged
from armopt.compiler.checks import Checks, Judge
from armopt.errors import AccuracyError, CaptureError, InputError


class Encoder(nn.TransformerEncoder):
    """PyTorch's fast path writes zeros into padded rows; a capture of a forward of its own computes them."""

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(src, src_key_padding_mask=src_key_padding_mask)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = Encoder(layer, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()


class Compiling(Net):
    def between(self, y: Tensor) -> Tensor:
        return y + 1 if torch.compiler.is_compiling() else y.relu()


class Exporting(Net):
    def between(self, y: Tensor) -> Tensor:
        return y + 1 if torch.compiler.is_exporting() else y.relu()


class Counting(Net):
    """Every call scales by one more than the last."""

    calls = 0

    def between(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * self.calls


class Constant(Net):
    """A number from outside, which a capture holds as it was."""

    scale = 1.0

    def between(self, y: Tensor) -> Tensor:
        return y * self.scale


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


class Running(Net):
    """A mean over calls in a buffer, written into or put in its place."""

    def __init__(self, assign: bool = False) -> None:
        super().__init__()
        self.assign = assign
        self.register_buffer("mean", torch.zeros(16))

    def between(self, y: Tensor) -> Tensor:
        if self.assign:
            self.mean = self.mean * 0.5 + y.mean(0)
        else:
            self.mean.mul_(0.5).add_(y.mean(0))
        return y + self.mean


@pytest.fixture(scope="module")
def padded() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True
    return Padded().eval(), (torch.randn(2, 6, 32), mask)


def difference(model: nn.Module, *inputs: Tensor, change: Any = None) -> str:
    """What is said of a model whose capture is judged, changed in between."""
    captured = capture.module(model, inputs)
    if change is not None:
        change(model)
    return judged(captured)


def judged(captured: capture.Captured, times: int = 1) -> str:
    """What is said of a capture that is run as it is."""
    judge, program = Judge(captured, gates.standard(), Checks()), Program({}, captured.graph_module, {}, {})
    return [judge.validate([program]).difference for _ in range(times)][-1]


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
def test_what_the_capture_makes_otherwise_fails(
    padded: tuple[nn.Module, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    model, inputs = padded
    result = armopt.optimize(model, inputs, output=tmp_path / "bundle")
    assert not result.passed
    assert result.verdict.to_json()["cosine"] < 0.95
    assert result.manifest.accuracy.repair is None
    with pytest.raises(AccuracyError, match=r"output output differs by .* first in encoder \(Encoder\).*fast"):
        result.require()
    assert "fast path" in result.manifest.accuracy.difference
    assert accuracy.validate(tmp_path / "bundle")["passed"] is False
    chosen = armopt.optimize(
        model, inputs, output=armopt.Output(str(tmp_path / "bundle"), force=True), checks=Checks(against="capture")
    )
    assert chosen.passed
    assert chosen.manifest.accuracy.reference == "the captured graph in FP32"


@pytest.mark.filterwarnings("ignore")
def test_validate_against_the_module_never_exports(
    padded: tuple[nn.Module, tuple[Tensor, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, mask) = padded
    armopt.optimize(model, (x, mask), output=tmp_path / "bundle", checks=Checks(against="capture"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr(torch.export, "export", refuse)
    found = accuracy.validate(tmp_path / "bundle", against=model, inputs={"x": x, "mask": mask})
    assert found["passed"] is False
    assert found["cosine"] < 0.95


@pytest.mark.parametrize(
    ("kind", "layer", "reason"),
    [
        (Compiling, "second (Linear)", "is_compiling()"),
        (Exporting, "second (Linear)", "is_exporting()"),
        (Counting, "", "state that a call leaves in Python's attributes"),
    ],
)
def test_why_a_capture_differs(kind: type[nn.Module], layer: str, reason: str) -> None:
    torch.manual_seed(0)
    said = difference(kind().eval(), X)
    assert layer in said
    assert reason in said


def test_a_part_in_training_mode_is_named() -> None:
    model = Normed().eval()
    model.norm.train()
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    said = difference(model, X)
    assert "first in norm (BatchNorm1d)" in said
    assert "norm is in training mode" in said
    assert torch.equal(model.norm.running_mean, before)  # type: ignore[arg-type]
    assert difference(Normed(), X) == ""  # all of it is: then eval mode is meant


def test_state_outside_of_tensors_is_named() -> None:
    said = difference(Constant().eval(), X, change=lambda model: setattr(model, "scale", 2.0))
    assert "Python that decides on data or on state" in said


@pytest.mark.parametrize("assign", [False, True])
def test_buffers_start_alike_and_stay_as_they_were(assign: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Running(assign).eval()
    model(X)
    before = model.mean.clone()
    captured = capture.module(model, (X,))
    assert judged(captured, times=2) == ""
    assert torch.equal(model.mean, before)


def test_what_calls_change_is_undone() -> None:
    model = Counting().eval()
    model.register_buffer("late", torch.zeros(2))
    with unchanged(model) as changed:
        assert not changed()
        model(X)
        model.late.add_(1)  # type: ignore[operator]
        model.more = 3
        assert changed()
    assert (model.calls, "more" in model.__dict__, float(model.late.sum())) == (0, False, 0.0)  # type: ignore[operator]


def test_another_constant_among_the_results_is_named() -> None:
    class Numbered(Net):
        number = 3

        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x), "n": self.number, "s": "text", "none": None}

    assert difference(Numbered().eval(), X) == ""
    with pytest.raises(AccuracyError, match=r"returns something else than was captured: outputs\.n: .* 3, not 4"):
        difference(Numbered().eval(), X, change=lambda model: setattr(model, "number", 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp32s_own_rounding_is_no_difference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 8, generator=generator, dtype=torch.float64) + 100
    a = exact.to(dtype)
    noise = torch.finfo(dtype).eps * 100 * torch.randn(64, 8, generator=generator)
    assert fidelity.compare({"y": a}, {"y": (a.double() + noise).to(dtype)}) is None
    assert fidelity.compare({"y": a}, {"y": (a.double() + 2000 * noise).to(dtype)}) is not None
    one = a.clone()
    one[0, 0] = 0.0
    assert fidelity.compare({"y": a}, {"y": one}) is not None


def test_what_fp64_shows_to_be_rounding_is_no_difference() -> None:
    """What is left of numbers that cancel may be all rounding."""
    a, b, exact = torch.tensor([1e-3, -2e-3]), torch.tensor([-1e-3, 1e-3]), torch.tensor([0.0, 0.0]).double()
    assert fidelity.compare({"y": a}, {"y": b}, {"y": exact}) is None
    assert fidelity.compare({"y": a}, {"y": b}) is not None
    i, j = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 3])
    assert fidelity.compare({"i": i}, {"i": j}, {"i": i}) is None  # FP64 has them the other way round too
    assert fidelity.compare({"i": i}, {"i": j}, {"i": j}) == ("i", "differs in 2 of 3 values")


@pytest.mark.parametrize(
    ("captured", "what"),
    [
        (torch.ones(3), "has shape [3] instead of [2]"),
        (torch.ones(2).double(), "is float64 instead of float32"),
        (torch.tensor([1.0, float("nan")]), "has values that are not finite elsewhere"),
    ],
)
def test_other_differences(captured: Tensor, what: str) -> None:
    assert fidelity.compare({"y": torch.ones(2)}, {"y": captured}) == ("y", what)
    assert fidelity.compare({"y": torch.empty(0)}, {"y": torch.empty(0)}) is None


@pytest.mark.parametrize("kind", ["pt2", "torchscript", "module"])
def test_originals_of_every_kind(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    against: Any = model
    if kind == "pt2":
        against = tmp_path / "model.pt2"
        torch.export.save(torch.export.export(model, (X,)), against)
    elif kind == "torchscript":
        against = tmp_path / "model.pt"
        torch.jit.save(torch.jit.script(model), against)  # type: ignore[no-untyped-call]
    armopt.optimize(model, (X,), output=tmp_path / "bundle")
    monkeypatch.setattr(torch.export, "export", None)
    found = accuracy.validate(tmp_path / "bundle", against=against)
    assert found["passed"] is True
    assert 0.999 < found["cosine"] < 1
    assert (found["no_anchor"] == "") is (kind == "module")
    if kind == "pt2":
        assert armopt.optimize(against, output=tmp_path / "again").passed


def test_an_original_that_fails_is_an_error(tmp_path: Path) -> None:
    armopt.optimize(Net().eval(), (X,), output=tmp_path / "bundle")
    with pytest.raises(InputError, match=r"Linear: the model fails on these inputs: RuntimeError"):
        accuracy.validate(tmp_path / "bundle", against=nn.Linear(3, 3).eval())


def test_an_original_that_takes_other_inputs_is_an_error(tmp_path: Path) -> None:
    class Named(Net):
        def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(y)

    class Both(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    armopt.optimize(Net().eval(), (X,), output=tmp_path / "bundle")
    for model, inputs, said in (
        (Named(), (X,), "takes no input 'x'"),
        (Both(), (X, X), "takes 2 inputs, the bundle 1"),
    ):
        torch.export.save(torch.export.export(model.eval(), inputs), tmp_path / "other.pt2")
        with pytest.raises(InputError, match=rf"other\.pt2: {said}\. Its inputs are: .*Is the bundle made from it\?"):
            accuracy.validate(tmp_path / "bundle", against=tmp_path / "other.pt2")


def test_an_original_that_lacks_a_part_is_an_error(tmp_path: Path) -> None:
    class Deciding(Net):
        def between(self, y: Tensor) -> Tensor:
            return y if y.sum() < 1e9 else -y

    armopt.optimize(Deciding().eval(), [(X,)], kind="module", output=tmp_path / "bundle")
    with pytest.raises(InputError, match=r"Linear: has no part first\. Is it the original\?"):
        accuracy.validate(tmp_path / "bundle", against=nn.Linear(16, 8).eval())


class Noisy(Net):
    def between(self, y: Tensor) -> Tensor:
        return nn.functional.dropout(y) + torch.randn_like(y) + torch.rand(16)


def test_both_sides_draw_the_same_random_numbers() -> None:
    captured = capture.module(Noisy().eval(), (X,))
    before = torch.get_rng_state()
    assert judged(captured) == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bundle_draws_no_random_numbers(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"Noisy: native_dropout .*test_fidelity\.py.* draws random numbers"):
        armopt.optimize(Noisy().eval(), (X,), output=tmp_path / "bundle")

    class Attending(Net):
        def between(self, y: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.2)

    with pytest.raises(CaptureError, match="draws random numbers"):
        armopt.optimize(Attending().eval(), (X,), output=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_what_to_compare_with_is_one_of_two() -> None:
    with pytest.raises(InputError, match="against: can't compare with 'graph'"):
        Checks(against="graph")


class Pixels(nn.Module):
    """Attention over the pixels of one image: the layout of its result is ambiguous, and torch.export takes another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 144, 1), nn.Conv2d(48, 144, 1), nn.Conv2d(48, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attend(self.second(self.attend(self.first(x), 1)), 3))

    def attend(self, x: Tensor, heads: int) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = x.reshape(n, heads, -1, h * w).permute(0, 1, 3, 2).chunk(3, dim=3)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.permute(0, 1, 3, 2).reshape(n, 48, h, w)


def test_a_view_of_what_lies_otherwise_than_torch_export_took_it_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pixels().eval(), torch.randn(1, 3, 7, 7)
    result = armopt.optimize(model, (x,), output=tmp_path / "b", target="graviton2")
    assert result.passed
    assert result.verdict.difference == ""
    with pytest.warns(armopt.ArmoptWarning, match="portable twins"):
        found = armopt.load(tmp_path / "b")(x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)
