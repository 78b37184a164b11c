"""A server that is not as the bundle wants it: nothing is slow in silence, and nothing runs as `ref`."""

from collections import Counter

import pytest

from armopt.runtime import onednn_log

JOBS = "tests.arm64.jobs_bundles"
FPMATH = "DNNL_DEFAULT_FPMATH_MODE"


def _bf16_convolutions(value):
    """Executions of BF16 convolutions in the one captured call, none of them a reference."""
    executions = onednn_log.parse(value["runs"][0]["log"]).executions
    assert not onednn_log.references(executions)
    convolutions = [e for e in executions if e.primitive == "convolution" and e.weight_dtype == "bf16"]
    assert all(not e.is_reference for e in convolutions)
    return len(convolutions)


def _chosen(value):
    return Counter(kernel for _, _, kernel, _ in value["kernels"][0])


@pytest.fixture(scope="module", params=[None, {FPMATH: "BF16"}], ids=["unset", "set too late"])
def environ(request):
    """What the process itself sets after torch is imported."""
    return request.param


def test_own_primitives_need_no_fast_math_in_the_environment(server, made, environ):
    """They have it by themselves, or not at all: what is planned runs, and nothing is said."""
    bundle = made("fast-math", "graviton3")
    host, job = server("graviton3-no-fpmath"), f"{JOBS}:run"
    value = host.call(job, bundle=bundle.path, calls=bundle.calls, environ=environ).value
    assert value["warnings"] == []
    assert all(kernel == planned for _, planned, kernel, _ in value["kernels"][0])
    executions = onednn_log.parse(value["runs"][0]["log"]).executions
    assert not onednn_log.references(executions)
    fast = [e for e in executions if e.primitive == "convolution" and e.attributes.get("fpmath") == "bf16"]
    planned = Counter(node.kernel for node in bundle.manifest.plan[0].nodes)
    assert len(fast) == planned["conv_fastmath"] + planned["conv1x1_fastmath"] > 0
    assert host.call(f"{JOBS}:load_error", bundle=bundle.path, strict=True).value is None


def test_without_fast_math_the_load_says_so_and_the_bf16_kernels_run(server, made, environ):
    bundle = made("convnet", "graviton3")
    value = (
        server("graviton3-no-fpmath")
        .call(f"{JOBS}:run", bundle=bundle.path, calls=bundle.calls, environ=environ, own=False)
        .value
    )
    (said,) = [text for text in value["warnings"] if text.startswith(FPMATH)]
    assert "armopt run" in said
    planned = Counter(node.kernel for node in bundle.manifest.plan[0].nodes)
    bf16 = planned["conv_bf16"] + planned["conv1x1_bf16"]
    assert bf16 > 0
    assert _chosen(value)["conv_bf16"] + _chosen(value)["conv1x1_bf16"] == bf16
    assert _bf16_convolutions(value) == bf16


def test_without_fast_math_its_kernels_give_way_and_say_why(server, made, environ):
    bundle = made("fast-math", "graviton3")
    value = (
        server("graviton3-no-fpmath")
        .call(f"{JOBS}:run", bundle=bundle.path, calls=bundle.calls, environ=environ, own=False)
        .value
    )
    assert any("another kernel than planned" in text for text in value["warnings"])
    assert any(FPMATH in text for text in value["warnings"])
    for node, planned, kernel, reason in value["kernels"][0]:
        if not planned.endswith("_fastmath"):
            assert kernel == planned
            continue
        # in BF16 more would be rounded than was validated
        assert not kernel.endswith(("_fastmath", "_bf16")), node
        assert planned in reason
        # set too late, the variable is there: what oneDNN makes of it is seen in its log alone
        assert (FPMATH if environ is None else "f32 weights") in reason
    chosen = _chosen(value)
    assert _bf16_convolutions(value) == chosen["conv_bf16"] + chosen["conv1x1_bf16"]


def test_strict_refuses_to_load_without_fast_math(server, made):
    bundle = made("convnet", "graviton3")
    kind, code, text = (
        server("graviton3-no-fpmath").call(f"{JOBS}:load_error", bundle=bundle.path, strict=True, own=False).value
    )
    assert (kind, code) == ("HostError", 3)
    assert FPMATH in text


def test_a_core_without_bf16_refuses_a_bundle_for_one_that_has_it(server, made):
    bundle = made("convnet", "graviton3")
    kind, code, text = server("graviton2").call(f"{JOBS}:load_error", bundle=bundle.path).value
    assert (kind, code) == ("HostError", 3)
    assert "graviton3" in text  # what it is for
    assert "bf16" in text  # what is missing
    assert "--target" in text  # what to do
    assert "graviton2" in text


def test_the_command_line_refuses_it_too(server, made):
    bundle = made("convnet", "graviton3").path
    result = server("graviton2").submit(f"{JOBS}:command", arguments=["validate", str(bundle)]).result()
    assert result.value == 3
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("armopt: ")]
    assert "bf16" in line
    assert "--target" in line
