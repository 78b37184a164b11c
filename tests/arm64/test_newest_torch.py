"""The newest torch on emulated cores: who answers for every kernel, with own primitives and with PyTorch's calls, and
how each rounds. `--newest-torch VERSION` takes another release."""

import pytest
import torch

from armopt.ir.onednn_names import is_reference
from armopt.kernels import table
from tests.arm64 import kernel_cases
from tests.arm64.test_rounding import FP32_ERROR

pytestmark = pytest.mark.full

#: Each with the target whose examples run there.
HOSTS = {"graviton3-newest": "graviton3", "yitian710-newest": "yitian710", "graviton2-newest": "graviton2"}
#: What oneDNN does not multiply in BF16 for FP32 activations: a packed Linear since 3.10, narrow layers since 3.13.
#: There the next kernel runs, and the load says so.
REFUSED = ("reference implementation", "f32 weights")

every_host = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture(scope="module")
def results(server):
    """results(host, own): what each case gave, with the layer's own primitive or by PyTorch's call."""
    queued = {}

    def result(host, own):
        if (host, own) not in queued:
            cases, target = kernel_cases.examples()[HOSTS[host]], HOSTS[host]
            arguments = {"cases": cases, "target": target, "own": own, "fast_math": target != "graviton2"}
            queued[host, own] = (cases, server(host).submit("tests.arm64.jobs_own:run", **arguments))
        cases, future = queued[host, own]
        return list(zip(cases, future.result().value, strict=True))

    return result


@every_host
def test_it_is_that_release(pytestconfig, server, host):
    facts = server(host).call("tests.arm64.jobs_emulation:torch_facts").value
    assert facts["version"] == pytestconfig.getoption("--newest-torch")
    assert (facts["cuda"], facts["gpus"], facts["nms"], facts["inverse"]) == (False, 0, [1], 0.25)


@every_host
@pytest.mark.parametrize("own", [True, False], ids=["own", "called"])
def test_every_kernel_answers(results, figure, host, own):
    wrong, seen = [], {}
    for case, (_, bound) in results(host, own):
        seen.setdefault(f"{case.kernel}: {bound.kernel} {bound.implementation}", []).append(case)
        planned, ran = table.get(case.kernel), table.get(bound.kernel)
        if ran is planned:
            good = not is_reference(bound.implementation)
        else:
            good = planned.fast_math and ran.steps_out_of_bf16 >= planned.steps_out_of_bf16
            good = good and any(said in bound.reason for said in REFUSED)
        if not good:
            wrong.append(f"{case}: {bound.kernel} {bound.implementation} {bound.reason}")
    for line, cases in sorted(seen.items()):
        figure(f"{host}: {line} ({len(cases)})")
    assert not wrong


@every_host
@pytest.mark.parametrize("own", [True, False], ids=["own", "called"])
def test_it_rounds_as_the_twin(results, host, own):
    """The measure of test_rounding.py. The Compute Library up to 52 rounds a result in BF16 after every block of terms,
    and so does the twin; later ones keep the sum in FP32, so there the twin is the same without blocks. Where oneDNN's
    own code multiplies in BF16 it takes the post-op as well, before it rounds."""
    wrong = []
    for case, (found, bound) in results(host, own):
        if bound.kernel != case.kernel:
            continue
        exact = kernel_cases.exact(case)
        twins = [kernel_cases.twin(case, HOSTS[host], in_blocks=in_blocks) for in_blocks in (True, False)]
        if own and table.get(case.kernel).activations == torch.bfloat16:
            twins.append(kernel_cases.joined(case))
        real = float((found.double() - exact).norm() / exact.norm())
        apart = min(float((found.double() - twin.double()).norm() / exact.norm()) for twin in twins)
        if table.get(case.kernel).rounding.weights == torch.bfloat16:
            good = apart <= real / 10
        else:
            good = max(real, apart) <= FP32_ERROR
        if not good:
            wrong.append(f"{case}: {bound.implementation}: error {real:.2e}, twin apart {apart:.2e}")
    assert not wrong


@every_host
def test_doctor(server, host):
    report = server(host).call("tests.arm64.jobs_bundles:examine").value
    failed = {check.name: check.found for check in report.checks if check.status == "failed"}
    assert set(failed) <= {"BLAS BF16"}, failed
    assert {finding.what: str(finding) for finding in report.findings if finding.severity == "hard"} == {}
