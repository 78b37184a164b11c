"""The closed list of operations against what torch has and what captured models call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armopt
from armopt import capture
from armopt.bundle import codec, dry_run, operations
from armopt.bundle.program import describe_program
from armopt.compiler.captured_model import capture_model
from armopt.compiler.recipe import Recipe
from armopt.errors import CaptureError
from armopt.ir.records import Signature
from armopt.models import torchvision_ops
from tests import zoo_models
from tests.sampling import sampled

#: What the graphs of tests.zoo_models and of torchvision's models for classification, segmentation, video and
#: detection call: python -m tests.zoo_operations --write.
ZOO = (Path(__file__).parents[1] / "data" / "zoo_operations.txt").read_text().split()
#: Core ATen that a bundle does without: gradients, random numbers, and memory as it is found.
NOT_FOR_BUNDLES = {"rand", "randn", "randperm", "native_dropout", "empty", "empty_strided"}


@pytest.mark.parametrize("name", ZOO)
def test_what_the_zoo_calls_is_on_it(name: str) -> None:
    torchvision_ops.ensure_torchvision()
    assert operations.name_of(operations.find(name)) == name


@pytest.mark.parametrize(
    "name", sampled(["residual", "matmul_forms", "llama", "conv_transpose2d", "linear_norm", "t5_encoder"], 3)
)
def test_what_is_captured_now_is_on_it(name: str) -> None:
    """And the arguments are what the operations take."""
    model = zoo_models.MODELS[name]()
    captured = capture.module(model, (), zoo_models.EXAMPLES[name](), source=name)
    recipe = Recipe.of("graviton3")
    planned = recipe.plan_part(capture_model(captured).parts[0])
    for program in (*recipe.lower_part(planned), describe_program(planned.prepared.graph_module, {}, {})):
        signature = Signature(captured.inputs, captured.outputs, captured.input_specs, captured.symbols)
        dry_run.check(program, signature, program.bucket, 1 << 40, name)
        stored = codec.encode(program)
        again = codec.decode(stored, dict(program.graph_module.named_buffers()), name)
        assert codec.encode(again) == stored
        assert {call.target for call in stored.nodes if hasattr(call, "args")} <= {*ZOO}


def _core() -> Iterator[Any]:
    for full in torch._C._dispatch_get_all_op_names():  # type: ignore[attr-defined]
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if found is not None and torch.Tag.core in found.tags and not found._schema.is_mutable:
                yield found


def test_all_of_core_aten_for_inference_is_on_it() -> None:
    found = {op._schema.name.removeprefix("aten::") for op in _core()}
    assert len(found) > 100
    unlisted = {name for name in found - operations.ATEN if not name.endswith("_backward")}
    assert unlisted <= NOT_FOR_BUNDLES


def test_nothing_on_it_is_random_or_writes() -> None:
    for packet in (getattr(torch.ops.aten, name) for name in operations.ATEN if hasattr(torch.ops.aten, name)):
        for operation in (getattr(packet, overload) for overload in packet.overloads()):
            if operation._schema.is_mutable:
                with pytest.raises(operations.UnlistedError):
                    operations.find(str(operation))
            elif torch.Tag.nondeterministic_seeded in operation.tags:  # unless it is told to be none
                assert {"train", "dropout_p"} & {each.name for each in operation._schema.arguments}, operation


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(-1, 8, 2))


#: What no other test calls.
RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "conj": lambda y: _complex(y).conj(),
    "adjoint": lambda y: (_complex(y).unsqueeze(1).mH @ _complex(y).unsqueeze(1)).abs(),
    "imaginary part": lambda y: _complex(y).conj().imag,
    "fake_quantize": lambda y: torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -128, 127),
    "fake_quantize by a tensor": lambda y: torch.fake_quantize_per_tensor_affine(
        *(y, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -128, 127)
    ),
    "fake_quantize by channels": lambda y: torch.fake_quantize_per_channel_affine(
        *(y, torch.full((16,), 0.1), torch.zeros(16, dtype=torch.int32), 1, -128, 127)
    ),
    "nms": lambda y: torch.ops.torchvision.nms(y[:, :4].cumsum(1), y[:, 4], 0.5),
    "empty, filled": lambda y: torch.empty_like(y.t()).fill_(2) + y.new_empty(3, 16, 16).zero_().sum(0),
    "put": lambda y: y.put(torch.tensor([1, 2]), torch.ones(2)),
    "tensorinv": lambda y: torch.linalg.tensorinv((y @ y.T + torch.eye(16)).reshape(4, 4, 16)),
}


class _Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


@pytest.mark.filterwarnings("ignore:the bundle is for")
@pytest.mark.parametrize("name", sampled(RARE, 3))
def test_what_models_rarely_call_runs_in_a_bundle(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torchvision_ops.ensure_torchvision()
    model, x = _Calling(RARE[name]).eval(), torch.randn(16, 16)
    armopt.optimize(model, (x,), target="graviton2", output=tmp_path / "bundle").require()
    with torch.no_grad():
        expected, found = model(x), armopt.load(tmp_path / "bundle")(x)
    assert (found.stride(), found.is_conj()) == (expected.stride(), expected.is_conj())
    # FP32 sums in another order; one step of rounding to integers
    torch.testing.assert_close(found, expected, atol=0.11 if "fake" in name else 1e-4, rtol=1e-4)


def test_what_is_not_on_it_is_said_before_what_else_is_wrong_with_it(tmp_path: Path) -> None:
    model = _Calling(lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8).dequantize())
    with pytest.raises(CaptureError, match=r"the model calls aten\.quantize_per_tensor\.default, which is not on the"):
        armopt.optimize(model.eval(), (torch.randn(16, 16),), target="graviton2", output=tmp_path / "bundle")
