"""Models that can't be captured whole, and a generate loop, on the emulated Graviton3, judged by oneDNN's log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import armopt
from armopt import accuracy
from armopt.models import torchvision_ops
from armopt.runtime import onednn_log
from tests import detection
from tests.arm64.jobs_compile import Branches
from tests.arm64.test_bundles import LEAST_COSINE

JOBS = "tests.arm64.jobs_compile"
_COMPUTE = ("convolution", "deconvolution", "matmul", "inner_product")


def computed(text: str) -> list[onednn_log.Execution]:
    return [e for e in onednn_log.parse(text).executions if e.primitive in _COMPUTE]


def check_planned(buckets: list[list[tuple[str, str, str, str]]]) -> None:
    """Every node runs the kernel that was planned for it."""
    for bucket in buckets:
        assert [(node, kernel) for node, _, kernel, _ in bucket] == [(node, planned) for node, planned, _, _ in bucket]


def test_parts_of_a_module_run_acl_in_bf16_whichever_way_it_goes(server: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branches().eval()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = [image, image - 1]
    assert [model.way(each) for each in images] == ["left", "right"]
    with torch.no_grad():
        expected = [model(each) for each in images]
    armopt.optimize(model, [(each,) for each in images], kind="module", output=tmp_path / "b", target="graviton3")
    arguments = {"bundle": str(tmp_path / "b"), "images": images}
    value = server("graviton3").call(f"{JOBS}:branches", **arguments).value
    executions = computed(value["log"])
    assert not onednn_log.references(executions)
    convolutions = [e for e in executions if e.primitive == "convolution" and e.weight_dtype == "bf16"]
    direct = [e for e in executions if e.primitive == "convolution" and e.implementation.startswith("brgconv")]
    # the trunk's two, for each image: the first, of three channels, is in FP32
    assert (len(direct), len(convolutions)) == (2, 2)
    assert all(not e.is_reference for e in convolutions)
    check_planned(value["kernels"])
    for found, exact in zip(value["found"], expected, strict=True):
        assert accuracy.compare("y", exact, found).cosine > LEAST_COSINE


@pytest.fixture(scope="module")
def mask_rcnn_on_graviton3(server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = detection.mask_rcnn(SIZE)
    bundle = tmp_path_factory.mktemp("module") / "mask_rcnn"
    image = detection.images((3, SIZE, SIZE), seed=SEED)
    calls = [(image,), (detection.images((3, SIZE, SIZE * 5 // 4)),)]
    armopt.optimize(model, calls, kind="module", output=bundle, target="graviton3")
    with torch.no_grad():
        expected = model(image)
    arguments = {"bundle": str(bundle), "images": image, "size": SIZE}
    value = server("graviton3").call(f"{JOBS}:detect", **arguments).value
    return {**value, "expected": expected, "found": value["found"][0]}


#: Of an image with detections above 0.5 whose boxes no other overlaps as closely in score as BF16 rounds.
SEED = 4
SIZE = 64


@pytest.mark.full
def test_mask_rcnn_runs_acl_in_bf16_and_nothing_by_reference(mask_rcnn_on_graviton3: dict[str, Any]) -> None:
    executions = computed(mask_rcnn_on_graviton3["log"])
    assert not onednn_log.references(executions)
    half = [e for e in executions if e.weight_dtype == "bf16"]
    assert all(not e.is_reference for e in half)
    planned = {kernel for bucket in mask_rcnn_on_graviton3["kernels"] for _, kernel, _, _ in bucket}
    assert planned & {"conv_bf16", "conv1x1_bf16", "conv_fastmath"}
    assert len(half) >= 20  # the backbone alone has that many convolutions
    check_planned(mask_rcnn_on_graviton3["kernels"])


@pytest.mark.full
def test_mask_rcnn_finds_there_what_fp32_finds_here(mask_rcnn_on_graviton3: dict[str, Any]) -> None:
    above, alike = detection.found_again(mask_rcnn_on_graviton3["expected"], mask_rcnn_on_graviton3["found"])
    assert above > 0
    assert alike == above


@pytest.fixture(scope="module")
def gpt2_on_graviton3(server: Any) -> dict[str, Any]:
    torchvision_ops.ensure_torchvision_if_installed()
    import transformers

    config = {"n_layer": 1, "n_head": 4, "n_embd": 128, "vocab_size": 211, "n_positions": 64}
    config |= {"bos_token_id": 0, "eos_token_id": 210, "pad_token_id": 210}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    state = {name: 4 * tensor if tensor.dim() > 1 else tensor for name, tensor in model.state_dict().items()}
    prompt = torch.randint(1, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    call = {"config": config, "state": state, "prompt": prompt, "tokens": 2}
    found: dict[str, Any] = server("graviton3").call(f"{JOBS}:generate", **call).value
    return found


@pytest.mark.full
def test_generate_runs_acl_in_bf16_and_nothing_by_reference(gpt2_on_graviton3: dict[str, Any]) -> None:
    executions = computed(gpt2_on_graviton3["log"])
    assert not onednn_log.references(executions)
    half = [e for e in executions if e.weight_dtype == "bf16"]
    assert half
    assert all(not e.is_reference for e in half)
    layers = gpt2_on_graviton3["layers"]
    assert all(planned == kernel for _, _, planned, kernel in layers)
    rows = {math.prod(shape[:-1]) for _, shape, _, _ in layers}
    assert {1, 24} <= rows  # decode and prefill, each with plans of its own


@pytest.mark.full
def test_generate_gives_the_tokens_of_fp32(gpt2_on_graviton3: dict[str, Any]) -> None:
    assert gpt2_on_graviton3["expected"].shape == (1, 26)
    assert torch.equal(gpt2_on_graviton3["found"], gpt2_on_graviton3["expected"])
    assert torch.equal(gpt2_on_graviton3["again"], gpt2_on_graviton3["expected"])
