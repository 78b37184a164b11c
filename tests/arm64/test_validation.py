"""What validation on a laptop says of a bundle holds where it runs: repaired networks pass there, broken ones fail."""

from collections import Counter

import pytest

import armopt
from armopt.compiler.checks import Checks
from armopt.errors import AccuracyError
from armopt.kernels import table
from armopt.plan.threshold_policy import ThresholdPolicy
from armopt.runtime import onednn_log
from tests.sampling import only
from tests.unit.broken_networks import GATES, CancelledBias, CancelledBiasConv, Exponential, build

JOBS = "tests.arm64.jobs_validation"


@pytest.mark.parametrize("repaired", [True, False], ids=["repaired", "as it was"])
@pytest.mark.parametrize("kind", only([CancelledBias, Exponential, CancelledBiasConv], [CancelledBias]))
def test_the_verdict_is_that_of_the_twins(server, tmp_path, figure, kind, repaired):
    model, x = build(kind)
    checks = Checks(gates=GATES[kind], repair=repaired)
    output = armopt.Output(tmp_path / "bundle", keep_reference=True)
    try:
        armopt.optimize(model, (x,), output=output, policy=ThresholdPolicy(), checks=checks).require()
    except AccuracyError:
        assert not repaired
    twin = armopt.validate(tmp_path / "bundle", inputs={"x": x}, gates=GATES[kind])
    real = server("graviton3").call(
        f"{JOBS}:validate", bundle=str(tmp_path / "bundle"), inputs={"x": x}, gates=GATES[kind]
    )
    real = real.value
    figure(f"{kind.__name__}, {'repaired' if repaired else 'as it was'}: cosine {real['cosine']:.6f}")
    assert real["ran"] == "the kernels of this host"
    assert twin["passed"] is real["passed"] is repaired
    # sums in another order: what is left of the error is the same, a tenth of it may not be
    assert abs(real["cosine"] - twin["cosine"]) <= 0.1 * (1 - twin["cosine"]) + 1e-6
    assert [gate["passed"] for gate in real["gates"]] == [gate["passed"] for gate in twin["gates"]]


@pytest.mark.parametrize(
    "host", ["graviton3", "graviton3-torch2.13", pytest.param("graviton3-newest", marks=pytest.mark.full)]
)
def test_a_repaired_convolution_does_not_reach_onednn(server, tmp_path, host):
    model, x = build(CancelledBiasConv)
    written = armopt.optimize(model, (x,), output=tmp_path / "bundle", policy=ThresholdPolicy()).manifest
    changed = {change.node: change.after for change in written.accuracy.repair.changes}
    arguments = {"bundle": str(tmp_path / "bundle"), "inputs": {"x": x}}
    text, kernels = server(host).call(f"{JOBS}:log_of_one_call", **arguments).value
    bound = {node: kernel for node, kernel, _ in kernels}
    # another build may have no such kernel; then the one that runs rounds no more than what was validated
    steps = {node: table.get(kernel).steps_out_of_bf16 for node, kernel in changed.items()}
    assert all(table.get(bound[node]).steps_out_of_bf16 >= least for node, least in steps.items())
    assert host != "graviton3" or {node: bound[node] for node in changed} == changed
    through_blas = [node for node in changed if table.get(bound[node]).backend == "blas"]
    primitives = Counter(execution.primitive for execution in onednn_log.parse(text).executions)
    assert primitives["convolution"] == len(bound) - len(through_blas) > 0
    assert primitives["matmul"] == 0
    assert through_blas
