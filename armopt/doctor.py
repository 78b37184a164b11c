"""What this host's PyTorch really does: which backends answer, with which numbers, and what a bundle gets of them.

Findings come from two sources: the facts of :mod:`armopt.environment`, compared with what is wanted, and smoke tests
that run one small layer per backend with oneDNN's log on. Where they disagree, the smoke test is right.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from armopt import environment, targets
from armopt.environment import FPMATH, Difference
from armopt.errors import HostError
from armopt.ir import Target

if TYPE_CHECKING:
    import torch

    from armopt.bind import Bound
    from armopt.bundle.reader import Bundle

#: Rows, terms and columns of the smoke tests: large enough for every backend, small enough for an emulated core.
_SHAPE = (32, 64, 96)
#: Least cosine similarity to FP64 of a product of BF16 operands: 8 bits of mantissa leave 5 nines, zeros leave none.
_MIN_COSINE = 0.9999
_WHERE_FEATURES = ("asimd", "asimddp", "sve", "sve2", "i8mm", "svei8mm", "bf16", "svebf16")
_RESTART = "Start the process with: armopt run BUNDLE -- CMD"


@dataclass(frozen=True, slots=True)
class Check:
    """One smoke test.

    Attributes:
        name: The backend.
        status: ``ok``, ``failed``, or ``skipped`` where this host or build can't have it.
        found: What answered: the implementation and the dtype of its weights, or why not.
    """

    name: str
    status: Literal["ok", "failed", "skipped"]
    found: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a bundle's layers of one kernel and shape run here.

    Attributes:
        planned: The kernel planned.
        kernel: The one that runs.
        shape: Of the input.
        layers: How many such layers there are.
        reason: Why it is another one; empty where it is not.
    """

    planned: str
    kernel: str
    shape: tuple[int, ...]
    layers: int
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found; ``healthy`` is False where something makes bundles slow or refused.

    Attributes:
        host: Core, products, features and vector width.
        facts: See :func:`armopt.environment.record`.
        checks: The smoke tests.
        findings: What is wrong, the worst first, with what mends it.
        verdicts: With a bundle, for each distinct kernel and shape.
        bundle: Its target, or empty.
    """

    host: Mapping[str, Any]
    facts: Mapping[str, str]
    checks: tuple[Check, ...]
    findings: tuple[Difference, ...]
    verdicts: tuple[Verdict, ...] = ()
    bundle: str = ""

    @property
    def healthy(self) -> bool:
        """Whether nothing is hard or soft."""
        return all(finding.severity == "info" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As one object."""
        return {
            "healthy": self.healthy,
            "host": dict(self.host),
            "facts": dict(self.facts),
            "checks": [asdict(check) for check in self.checks],
            "findings": [asdict(finding) for finding in self.findings],
            "bundle": self.bundle,
            "kernels": [asdict(verdict) | {"shape": list(verdict.shape)} for verdict in self.verdicts],
        }


def examine(
    bundle: str | Path | None = None,
    *,
    strict: bool = False,
    environ: Mapping[str, str] | None = None,
    host: Target | None = None,
    facts: Mapping[str, str] | None = None,
) -> Report:
    """Examines this process on this host.

    Args:
        bundle: What it is to run; None asks for nothing but what any bundle for this host would.
        strict: Whether a soft difference counts as a hard one.
        environ: Variables of this process; None takes os.environ.
        host: This machine; None detects it.
        facts: Of this process; None records them, looking into all of torch's libraries.

    Raises:
        BundleError: The bundle is damaged.
    """
    environ = os.environ if environ is None else environ
    host = host or targets.host()
    facts = environment.record(deep=True) if facts is None else facts
    opened = _open(bundle)
    wanted, required, versions = _wanted(opened, host, facts)
    late = environment.late_variables(wanted, environ=environ)
    differences = environment.compare(wanted, required, versions, host, environ, record=facts, late=late)
    checks = smoke_tests(host, facts)
    findings = [*_unprobed(differences, checks, late), *_broken(checks, host, environ, late, facts)]
    if opened is None and not host.bf16 and _is_arm(host):
        findings.append(_no_bf16(host))
    verdicts: tuple[Verdict, ...] = ()
    if opened is not None and bundle is not None:
        verdicts, more = _prove(opened, findings)
        findings = [*_proved(findings, verdicts), *more]
    if strict:
        findings = [replace(f, severity="hard") if f.severity == "soft" else f for f in findings]
    findings.sort(key=lambda finding: ("hard", "soft", "info").index(finding.severity))
    return Report(
        host={
            "core": host.core,
            "machine": platform.machine(),
            "products": host.provenance.get("product", ""),
            "features": [name for name in _WHERE_FEATURES if name in host.isa_features],
            "vector_bits": host.vector_bits,
            "cpus": host.cores,
        },
        facts=facts,
        checks=checks,
        findings=tuple(findings),
        verdicts=verdicts,
        bundle=opened.manifest.target if opened else "",
    )


# --- the smoke tests ------------------------------------------------------------------------------


def smoke_tests(host: Target, facts: Mapping[str, str]) -> tuple[Check, ...]:
    """Runs one small layer on each backend: does it answer, under its own name, with right numbers?"""
    if not facts.get("torch"):
        return (Check("torch", "failed", "none is installed"),)
    if not _is_arm(host):
        names = ("ACL BF16", "fast math", "ACL FP32", "BLAS BF16", "BLAS BF16, one row")
        skipped = tuple(Check(name, "skipped", "not an Arm server: portable twins run") for name in names)
        return (*skipped, _run("BLAS FP32", _blas_fp32))
    half: dict[str, Callable[[], str]] = {
        "ACL BF16": lambda: _kernel("conv1x1_bf16"),
        "fast math": lambda: _kernel("conv1x1_fastmath"),
        "BLAS BF16": lambda: _blas_bf16(_SHAPE[0]),
        "BLAS BF16, one row": lambda: _blas_bf16(1),
    }
    whole: dict[str, Callable[[], str]] = {"ACL FP32": lambda: _kernel("conv1x1_fp32"), "BLAS FP32": _blas_fp32}
    found = []
    for name, test in half.items():
        if not host.bf16:
            found.append(Check(name, "skipped", f"{host.core} has no BF16"))
        elif name == "BLAS BF16" and facts.get("sbgemm") == "no":
            found.append(Check(name, "failed", f"{facts.get('blas', 'this BLAS')} has no sbgemm"))
        else:
            found.append(_run(name, test))
    return (*found, *(_run(name, test) for name, test in whole.items()))


class _WrongError(Exception):
    """A smoke test's own verdict."""


def _run(name: str, test: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", test())
    except _WrongError as wrong:
        return Check(name, "failed", str(wrong))
    except Exception as error:  # a broken build may raise anything at all
        return Check(
            name, "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        )


def _operands(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input [rows, K], weight [N, K], rounded to BF16, and their product in FP64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    _, terms, columns = _SHAPE
    x = torch.randn(rows, terms, generator=generator).bfloat16()
    weight = torch.randn(columns, terms, generator=generator).bfloat16()
    return x, weight, x.double() @ weight.double().T


def _agrees(result: torch.Tensor, exact: torch.Tensor, what: str) -> str:
    import torch

    found = result.double().flatten()
    cosine = float(torch.nn.functional.cosine_similarity(found, exact.flatten(), 0))
    # the angle is blind to a common factor
    ratio = float(found.norm() / exact.norm())
    if not cosine >= _MIN_COSINE or abs(ratio - 1) > 0.01:
        zeros = "all zeros" if not found.any() else f"cosine similarity {cosine:.4f}, {ratio:.3g} of the length"
        raise _WrongError(f"{what} gives wrong numbers: {zeros}")
    return what


def _kernel(name: str) -> str:
    """A Linear by one of armopt's own kernels, judged by its probe; returns what answered.

    Raises:
        _WrongError: The probe refuses it, something else than ACL answers, or the numbers are wrong.
    """
    import torch

    from armopt import onednn_log, probe
    from armopt.ir import Site
    from armopt.kernels import table

    kernel = table.get(name)
    rows, terms, columns = _SHAPE
    x, weight, exact = _operands(rows)
    site = Site("smoke_test", "linear", rows, terms, columns, (rows, terms), (columns, terms))
    packed = kernel.packed_weight(weight, site)
    call = _call(kernel, site, packed)
    x = x.to(kernel.activations)
    with torch.no_grad():
        call(x)  # the first call may prepare what later calls reuse
        with onednn_log.capture_verbose() as log:
            result = call(x)
    if reason := probe.judge(kernel, site, log.executions):
        raise _WrongError(reason)
    ran = [e for e in log.executions if e.primitive == "convolution"]
    what = ", ".join(f"{e.implementation} on {e.weight_dtype} weights" for e in ran)
    if not any(e.is_acl for e in ran):
        raise _WrongError(f"{what} answers, not the Arm Compute Library")
    return _agrees(result, exact, what)


def _call(kernel: Any, site: Any, packed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The kernel's own call as a function of its input."""
    import torch
    from torch import fx

    from armopt.kernels.base import Call

    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    marker = graph.call_function(torch.ops.aten.alias.default, (x,))
    result = kernel.emit(
        Call(marker, x, weight, None, None, "none", [*site.shape[:-1], site.n], site, kernel.activations)
    )
    graph.output(result)
    graph.erase_node(marker)
    module = fx.GraphModule(torch.nn.Module(), graph)
    return lambda value: module(value, packed)


def _blas_fp32() -> str:
    import torch

    x, weight, exact = _operands(_SHAPE[0])
    bias = torch.zeros(_SHAPE[2])
    return _agrees(torch.addmm(bias, x.float(), weight.float().T.contiguous()), exact, "sgemm")


def _blas_bf16(rows: int) -> str:
    import torch

    x, weight, exact = _operands(rows)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch 2.10 warns of TF32 on GPUs here
        with torch.backends.mkldnn.flags(enabled=False):
            result = torch.nn.functional.linear(x, weight)
    return _agrees(result, exact, "sbgemm" if rows > 1 else "BF16 gemv")


# --- findings -------------------------------------------------------------------------------------


def _open(bundle: str | Path | None) -> Bundle | None:
    if bundle is None:
        return None
    from armopt.bundle import reader

    return reader.read(bundle)


def _wanted(
    opened: Bundle | None, host: Target, facts: Mapping[str, str]
) -> tuple[Mapping[str, Mapping[str, str]], tuple[str, ...], Mapping[str, str]]:
    if opened is not None:
        described = opened.manifest
        # versions of a machine of another kind say nothing about this one
        same = described.versions.get("machine") == platform.machine()
        return described.environment, described.required_features, described.versions if same else {}
    if not _is_arm(host):
        return {}, (), {}
    return {name: asdict(v) for name, v in environment.variables(host, build=facts).items()}, (), {}


def _unprobed(differences: Sequence[Difference], checks: Sequence[Check], late: Sequence[str]) -> list[Difference]:
    """The differences, without what a smoke test disproves or says better."""
    status = {check.name: check.status for check in checks}
    answers = "ok" in (status.get("ACL BF16"), status.get("ACL FP32"))
    drop = {"BF16 in BLAS"} if status.get("BLAS BF16") == "failed" else set()
    if answers:  # its library may have another name, or none of its own
        drop.add("Arm Compute Library")
    if status.get("fast math") == "ok" or (status.get("fast math") == "failed" and FPMATH in late):
        drop.add(FPMATH)
    return [d for d in differences if d.what not in drop]


def _broken(
    checks: Sequence[Check],
    host: Target,
    environ: Mapping[str, str],
    late: Sequence[str],
    facts: Mapping[str, str],
) -> list[Difference]:
    """What failed smoke tests mean."""
    failed = {check.name: check.found for check in checks if check.status == "failed"}
    found = []
    if "torch" in failed:
        found.append(
            Difference("hard", "torch", "installed", failed["torch"], "nothing runs", "pip install 'torch>=2.10,<2.14'")
        )
    acl = [failed[name] for name in ("ACL BF16", "ACL FP32") if name in failed]
    if acl and facts.get("acl"):
        cost = "Linears and convolutions run reference or FP32 kernels"
        remedy = f"Install another torch, e.g. torch=={environment.CPU_TORCH}"
        found.append(Difference("soft", "ACL BF16" if host.bf16 else "ACL FP32", "ACL answers", acl[0], cost, remedy))
    if "fast math" in failed and not acl and not _is_set(environ):
        pass  # compare says that the variable is missing, what it costs, and how to start
    elif "fast math" in failed and not acl:
        cause = f"{FPMATH} was set after torch was imported" if FPMATH in late else failed["fast math"]
        cost = "layers on FP32 activations multiply in FP32: 2.2 times the time at batch 256 (tutorial, Graviton3)"
        found.append(Difference("soft", "fast math", "BF16 weights", cause, cost, _RESTART))
    if "BLAS BF16" in failed:
        absent = facts.get("sbgemm") == "no"
        cost = "a BF16 product left to BLAS takes up to 13 times the instructions of OpenBLAS's, at M = 256"
        wrong = "results left to BLAS in BF16 are wrong"
        remedy = f"Install a CPU build of torch with OpenBLAS, e.g. torch=={environment.CPU_TORCH}"
        severity: Literal["hard", "soft", "info"] = "info" if absent else "hard"
        found.append(
            Difference(severity, "BF16 in BLAS", "sbgemm", failed["BLAS BF16"], cost if absent else wrong, remedy)
        )
    for name in ("BLAS BF16, one row", "BLAS FP32"):
        if name in failed:
            remedy = f"Install another torch, e.g. torch=={environment.CPU_TORCH}"
            found.append(Difference("hard", name, "right numbers", failed[name], "results are wrong", remedy))
    return found


def _is_set(environ: Mapping[str, str]) -> bool:
    value = environ.get("ONEDNN_DEFAULT_FPMATH_MODE") or environ.get(FPMATH, "")
    return value.upper() in ("BF16", "ANY")


def _no_bf16(host: Target) -> Difference:
    products = host.provenance.get("product", host.name).split(", ")
    cost = "bundles made for cores with BF16 are refused here; FP32 ones run"
    remedy = f"Make bundles with: armopt optimize --target {' or '.join(products)}"
    return Difference("soft", "CPU features", "bf16", f"{host.core} without it", cost, remedy)


def _prove(opened: Bundle, findings: Sequence[Difference]) -> tuple[tuple[Verdict, ...], list[Difference]]:
    """Loads the bundle, which probes every kernel and shape, unless this host can't run it."""
    from armopt import runtime

    if any(finding.severity == "hard" and finding.what in ("CPU features", "torch") for finding in findings):
        return (), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it is in the findings
        try:
            parts = runtime.load_parts(opened)
        except HostError as error:
            return (), [Difference("hard", "bundle", "loads", error.what, "it can't run here", error.hint)]
    if any(part.portable for part in parts.values()):
        return (), []
    verdicts = _verdicts(opened, [entries for part in parts.values() for entries in part.kernels])
    changed = [v for v in verdicts if v.reason]
    count, all_layers = sum(v.layers for v in changed), sum(v.layers for v in verdicts)
    if not changed:
        return verdicts, []
    first = changed[0]
    found = f"{count} run another, e.g. {first.kernel} for {first.planned} ({first.reason})"
    cost = "those layers run the next best kernel that proved itself here"
    remedy = _RESTART if FPMATH in first.reason else "Plan for this build: armopt optimize --target host, on this host"
    return verdicts, [Difference("soft", "kernels", f"{all_layers} layers as planned", found, cost, remedy)]


def _verdicts(opened: Bundle, kernels: Sequence[Sequence[Bound]]) -> tuple[Verdict, ...]:
    """One for each distinct kernel, shape and outcome."""
    counts: dict[tuple[str, str, tuple[int, ...], str], int] = {}
    for each, entries in zip(opened.manifest.plan, kernels, strict=True):
        shapes = {node["node"]: tuple(node["shape"]) for node in each["nodes"]}
        for entry in entries:
            reason = entry.reason if entry.kernel != entry.planned else ""
            key = (entry.planned, entry.kernel, shapes.get(entry.node, ()), reason)
            counts[key] = counts.get(key, 0) + 1
    return tuple(
        Verdict(planned, kernel, shape, count, reason) for (planned, kernel, shape, reason), count in counts.items()
    )


def _proved(findings: Sequence[Difference], verdicts: Sequence[Verdict]) -> list[Difference]:
    """Another build, soft because kernels may answer differently, is harmless once each was probed here."""
    if not verdicts or any(verdict.reason for verdict in verdicts):
        return list(findings)
    builds = ("torch", "torch_build", "onednn", "acl", "blas")
    return [
        replace(f, severity="info", cost="all kernels of this bundle were probed again and answer as planned")
        if f.what in builds and f.severity == "soft"
        else f
        for f in findings
    ]


def _is_arm(host: Target) -> bool:
    return "asimd" in host.isa_features
