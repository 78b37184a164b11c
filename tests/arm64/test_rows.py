"""Rows on the emulated core: what comes of one beside others, and where results are written."""

import warnings

import pytest
import torch

import armopt
from tests.arm64 import bundles

JOBS = "tests.arm64.jobs_bundles"
SIZES = (1, 2, 5, 8, 13)
X = torch.randn(max(SIZES), 512, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """By whether rows are to be independent: what each row gave alone and beside others."""
    torch.manual_seed(0)
    model = bundles.mlp(512, 344, 512, 10).eval()
    queued = {}
    for invariant in (True, False):
        path = tmp_path_factory.mktemp("rows") / "bundle"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checks = armopt.Checks(batch_invariant=invariant)
            armopt.optimize(model, (X,), output=path, target="graviton3", batch=(1, 8), checks=checks)
        queued[invariant] = server("graviton3").submit(f"{JOBS}:rows", bundle=str(path), x=X, sizes=SIZES)
    return {invariant: job.result().value for invariant, job in queued.items()}


def same(found):
    return [torch.equal(y, found["alone"][: len(y)]) for y in found["together"]]


def test_a_row_depends_on_no_other_to_the_bit(runs):
    assert all(same(runs[True]))
    assert not all(same(runs[False]))  # the kernels of 1 and of 8 rows round otherwise


def test_results_are_written_where_the_caller_says(runs):
    for found in runs.values():
        assert all(torch.equal(*pair) for pair in zip(found["written"], found["together"], strict=True))
