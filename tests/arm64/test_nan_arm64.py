"""NaN in, NaN out, of either sign: every kernel and what stands between them, on the real builds."""

import math

import pytest
import torch
from torch import nn

import armopt
from tests import nan_cases
from tests.arm64.bundles import Prefer
from tests.sampling import sampled

JOBS = "tests.arm64.jobs_nan"
IN_BF16 = Prefer(("conv1x1_bf16", "conv_bf16"))


class _Residual(nn.Module):
    """The input's NaN reach the addition as they are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.pools = nn.ModuleList([nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)])

    def forward(self, x):
        y = torch.relu(self.conv(x) + x)
        return torch.cat([pool(y).flatten(1) for pool in self.pools], 1)


class _Masked(nn.Module):
    """Attention written out, with a mask as an input."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) / 4 + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("host", sampled(["graviton3", "graviton3-torch2.13", "graviton3-newest"], 3))
def test_kernels_lose_no_nan(server, host):
    cases = nan_cases.CASES
    if host != "graviton3":  # of another build the relu
        cases = [case for case in cases if "relu" in case.layer.post_op]
    found = server(host).call(f"{JOBS}:kernels", cases=cases, target="graviton3").value
    wrong = []
    for case, (kernel, reason, lost, made) in zip(cases, found, strict=True):
        # linear_fastmath from 2.11 on; fast math of narrow layers from 2.15 on
        refused = kernel != case.kernel and not any(said in reason for said in ("gemm:ref", "f32 weights"))
        merged = case.kernel == "conv_merged_fp32"  # its zeros are multiplied too
        if lost or (made and not merged) or refused:
            wrong.append(f"{case}: {kernel} {reason}: lost {lost}, made {made}")
    assert not wrong


def test_bundles_lose_no_nan(server, tmp_path):
    image = nan_cases.special((len(nan_cases.SPECIAL), 32, 16, 16), torch.float32)
    rows = nan_cases.special((16, 16, 64), torch.float32)
    mask = torch.zeros(16, 1, 16, 16)
    mask[0, 0, 3] = mask[1, 0, :, 5] = -math.inf
    calls, wanted = [], []
    for name, model, arguments in (("residual", _Residual(), (image,)), ("masked", _Masked(), (rows, mask))):
        examples = tuple(torch.zeros_like(x) + 0.5 for x in arguments)
        armopt.optimize(model.eval(), examples, output=tmp_path / name, target="graviton3", policy=IN_BF16)
        calls.append((tmp_path / name, arguments))
        wanted.append(model(*arguments))
    for expected, found in zip(wanted, server("graviton3").call(f"{JOBS}:bundles", calls=calls).value, strict=True):
        assert expected.isnan().any()
        assert not expected.isnan().all()
        assert nan_cases.apart(expected, found) == (0, 0)
