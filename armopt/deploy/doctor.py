"""What this host's PyTorch really does: which backends answer, with which numbers, and what a bundle gets of them.

Findings come from two sources: the facts of :mod:`armopt.environment`, compared with what is wanted, and smoke tests
that run one small layer per backend with oneDNN's log on. Where they disagree, the smoke test is right.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armopt import environment, targets
from armopt._version import TORCH_REQUIREMENT
from armopt.environment.compare import Difference
from armopt.environment.fpmath import FPMATH
from armopt.environment.process import is_arm
from armopt.errors import HostError
from armopt.ir.records import Target

if TYPE_CHECKING:
    from armopt.bundle.reader import Bundle
    from armopt.runtime.bind import Bound
from armopt.deploy.smoke_tests import OWN, Backends, Check, smoke_tests

_WHERE_FEATURES = ("asimd", "asimddp", "sve", "sve2", "i8mm", "svei8mm", "bf16", "svebf16")
_RESTART = "Start the process with: armopt run BUNDLE -- CMD"
#: The smoke tests of layers by PyTorch's calls of oneDNN.
_LAYERS = ("oneDNN BF16", "oneDNN FP32")


@dataclass(frozen=True, slots=True)
class Proof:
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
        facts: See :func:`armopt.environment.build.record`.
        checks: The smoke tests.
        findings: What is wrong, the worst first, with what mends it.
        verdicts: With a bundle, for each distinct kernel and shape.
        bundle: Its target, or empty.
    """

    host: Mapping[str, Any]
    facts: Mapping[str, str]
    checks: tuple[Check, ...]
    findings: tuple[Difference, ...]
    verdicts: tuple[Proof, ...] = ()
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
    backends: Backends | None = None,
) -> Report:
    """Examines this process on this host.

    Args:
        bundle: What it is to run; None asks for nothing but what any bundle for this host would.
        strict: Whether a soft difference counts as a hard one.
        environ: Variables of this process; None takes os.environ.
        host: This machine; None detects it.
        facts: Of this process; None records them, looking into all of torch's libraries.
        backends: What runs the smoke tests; this process's own by default.

    Raises:
        BundleError: The bundle is damaged.
    """
    environ = os.environ if environ is None else environ
    host = host or targets.this_host()
    facts = environment.record(deep=True) if facts is None else facts
    opened = _open(bundle)
    wanted, required, versions = _wanted(opened, host, facts)
    late = environment.late_variables(wanted, environ=environ)
    differences = environment.differences(wanted, required, versions, host, environ, record=facts, late=late)
    checks = smoke_tests(host, facts, backends)
    findings = [*_unprobed(differences, checks, late), *_broken(checks, host, environ, late, facts)]
    if opened is None and not host.bf16 and is_arm(host):
        findings.append(_no_bf16(host))
    verdicts: tuple[Proof, ...] = ()
    if opened is not None and bundle is not None:
        verdicts, more = _prove(opened, findings)
        findings = [*proved(findings, verdicts), *more]
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


# --- findings -------------------------------------------------------------------------------------


def _open(bundle: str | Path | None) -> Bundle | None:
    if bundle is None:
        return None
    from armopt.bundle import reader

    return reader.read(bundle)


def _wanted(
    opened: Bundle | None, host: Target, facts: Mapping[str, str]
) -> tuple[Mapping[str, environment.Variable], tuple[str, ...], Mapping[str, str]]:
    if opened is not None:
        described = opened.manifest
        # versions of a machine of another kind say nothing about this one
        same = described.versions.get("machine") == platform.machine()
        return described.environment, described.required_features, described.versions if same else {}
    if not is_arm(host):
        return {}, (), {}
    return environment.wanted(host, build=facts), (), {}


def _unprobed(differences: Sequence[Difference], checks: Sequence[Check], late: Sequence[str]) -> list[Difference]:
    """The differences, without what a smoke test disproves or says better."""
    status = {check.name: check.status for check in checks}
    drop = {"BF16 in BLAS"} if status.get("BLAS BF16") == "failed" else set()
    if status.get(OWN) == "ok":
        differences = [_left_to_aten(d) if d.what == FPMATH else d for d in differences]
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
    found = [*_no_torch(failed), *_only_references(failed)]
    if not any(name in failed for name in _LAYERS):
        slow = list(_no_fast_math(failed, environ, late))
        if OWN in failed:
            found += slow
        elif FPMATH in late:
            found += map(_left_to_aten, slow)
    return [*found, *_no_own_primitives(failed), *_no_bf16_in_blas(failed, facts), *_wrong_numbers(failed)]


_ANOTHER_TORCH = f"Install another torch, e.g. torch=={environment.CPU_TORCH}"


def _no_torch(failed: Mapping[str, str]) -> Iterator[Difference]:
    if "torch" in failed:
        remedy = f"pip install '{TORCH_REQUIREMENT}'"
        yield Difference("hard", "torch", "installed", failed["torch"], "nothing runs", remedy)


def _only_references(failed: Mapping[str, str]) -> Iterator[Difference]:
    # the log tells, not which library a build holds: which of them oneDNN calls differs by release
    for name in [name for name in _LAYERS if name in failed][:1]:
        cost = "Linears and convolutions run reference or FP32 kernels"
        yield Difference("soft", name, "a kernel for this core", failed[name], cost, _ANOTHER_TORCH)


def _no_fast_math(failed: Mapping[str, str], environ: Mapping[str, str], late: Sequence[str]) -> Iterator[Difference]:
    # where the variable is missing, the comparison says so, what it costs, and how to start
    if "fast math" in failed and environment.fast_math(environ):
        cause = f"{FPMATH} was set after torch was imported" if FPMATH in late else failed["fast math"]
        cost = "layers on FP32 activations multiply in FP32: 2.2 times the time at batch 256 (tutorial, Graviton3)"
        yield Difference("soft", "fast math", "BF16 weights", cause, cost, _RESTART)


def _left_to_aten(missing: Difference) -> Difference:
    """Fast math by the environment, where layers have it by themselves."""
    cost = "products that are no layers stay in FP32; layers and attention are told by themselves"
    return replace(missing, severity="info", cost=cost)


def _no_own_primitives(failed: Mapping[str, str]) -> Iterator[Difference]:
    if OWN in failed:
        cost = "layers run PyTorch's calls of oneDNN: about a hundred thousand instructions more each"
        yield Difference("info", OWN, "made through oneDNN's C API", failed[OWN], cost, _ANOTHER_TORCH)


def _no_bf16_in_blas(failed: Mapping[str, str], facts: Mapping[str, str]) -> Iterator[Difference]:
    if "BLAS BF16" not in failed:
        return
    seen, remedy = (
        failed["BLAS BF16"],
        f"Install a CPU build of torch with OpenBLAS, e.g. torch=={environment.CPU_TORCH}",
    )
    if facts.get("sbgemm") == "no":
        cost = "a BF16 product left to BLAS takes up to 13 times the instructions of OpenBLAS's, at M = 256"
        yield Difference("info", "BF16 in BLAS", "sbgemm", seen, cost, remedy)
    else:
        yield Difference("hard", "BF16 in BLAS", "sbgemm", seen, "results left to BLAS in BF16 are wrong", remedy)


def _wrong_numbers(failed: Mapping[str, str]) -> Iterator[Difference]:
    for name in ("BLAS BF16, one row", "BLAS FP32"):
        if name in failed:
            yield Difference("hard", name, "right numbers", failed[name], "results are wrong", _ANOTHER_TORCH)


def _no_bf16(host: Target) -> Difference:
    products = host.provenance.get("product", host.name).split(", ")
    cost = "bundles made for cores with BF16 are refused here; FP32 ones run"
    remedy = f"Make bundles with: armopt optimize --target {' or '.join(products)}"
    return Difference("soft", "CPU features", "bf16", f"{host.core} without it", cost, remedy)


def _prove(opened: Bundle, findings: Sequence[Difference]) -> tuple[tuple[Proof, ...], list[Difference]]:
    """Loads the bundle, which probes every kernel and shape, unless this host can't run it."""
    from armopt.runtime import load

    if any(finding.severity == "hard" and finding.what in ("CPU features", "torch") for finding in findings):
        return (), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it is in the findings
        try:
            parts = load.load_parts(opened)
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


def _verdicts(opened: Bundle, kernels: Sequence[Sequence[Bound]]) -> tuple[Proof, ...]:
    """One for each distinct kernel, shape and outcome."""
    counts: dict[tuple[str, str, tuple[int, ...], str], int] = {}
    for each, entries in zip(opened.manifest.plan, kernels, strict=True):
        shapes = {node.node: node.shape for node in each.nodes}
        for entry in entries:
            reason = entry.reason if entry.kernel != entry.planned else ""
            key = (entry.planned, entry.kernel, shapes.get(entry.node, ()), reason)
            counts[key] = counts.get(key, 0) + 1
    return tuple(
        Proof(planned, kernel, shape, count, reason) for (planned, kernel, shape, reason), count in counts.items()
    )


def proved(findings: Sequence[Difference], verdicts: Sequence[Proof]) -> list[Difference]:
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
