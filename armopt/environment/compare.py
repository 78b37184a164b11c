"""How a host and process differ from what a bundle wants: features, variables, threads, versions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from armopt.environment.fpmath import FPMATH
from armopt.environment.process import agree, effective, is_arm
from armopt.environment.variables import COSTS, PRELOAD, Variable
from armopt.ir.records import Target


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a host differs from what a bundle wants.

    Attributes:
        severity: ``hard`` (refuse), ``soft`` (probe again and warn), ``info``.
        what: The feature, variable or version concerned.
        expected: By the bundle.
        found: On the host.
        cost: What is lost.
        remedy: The next step; empty where there is none.
    """

    severity: Literal["hard", "soft", "info"]
    what: str
    expected: str
    found: str
    cost: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.what}: expected {self.expected}, found {self.found}: {self.cost}"
        return f"{text}. {self.remedy}" if self.remedy else text


def differences(
    manifest_environment: Mapping[str, Variable],
    required_features: Collection[str],
    recorded_versions: Mapping[str, str],
    host: Target,
    environ: Mapping[str, str],
    *,
    record: Mapping[str, str],
    late: Collection[str] = (),
) -> tuple[Difference, ...]:
    """How this host differs from what the bundle wants, hard differences first.

    Args:
        manifest_environment: By name, as in the manifest.
        required_features: CPU features that the plan relies on.
        recorded_versions: :func:`record` of the machine that made the bundle.
        host: This machine, see :func:`armopt.targets.host.this_host`.
        environ: Of this process.
        record: :func:`record` of this process.
        late: Variables set after the process started, see :func:`late_variables`.
    """
    found = [
        *_features(required_features, host),
        *_variables(manifest_environment, environ, host, record, late),
        *_threads(environ, record),
        *_versions(recorded_versions, record),
        *_backends(required_features, host, record),
        *_huge_pages(record, environ),
        *_small_objects(host, record),
    ]
    return tuple(sorted(found, key=lambda d: ("hard", "soft", "info").index(d.severity)))


def _features(required: Collection[str], host: Target) -> list[Difference]:
    missing = sorted(set(required) - host.isa_features)
    if not missing:
        return []
    expected, found = " ".join(sorted(required)), f"no {' '.join(missing)}"
    if not is_arm(host):
        cost = "the portable twins run: the target's rounding, but not its speed"
        return [Difference("info", "CPU", "an Arm server", host.core, cost, "")]
    products = host.provenance.get("product", host.name).split(", ")
    remedy = f"Re-export with --target {' or '.join(products)}"
    cost = "the kernels of this bundle would stop with an illegal instruction, or run as reference code"
    return [Difference("hard", "CPU features", expected, f"{host.core} with {found}", cost, remedy)]


def _variables(
    manifest: Mapping[str, Variable],
    environ: Mapping[str, str],
    host: Target,
    record: Mapping[str, str],
    late: Collection[str],
) -> list[Difference]:
    differences = []
    for name, entry in sorted(manifest.items()):
        expected, found = entry.value, effective(name, environ, host)
        cost = COSTS.get(name) or entry.why
        remedy = "Start with: armopt run BUNDLE -- CMD"
        if name == "OMP_NUM_THREADS" or (name == FPMATH and not host.bf16):
            continue  # the first is judged by this host's CPUs; without BF16 the second changes nothing
        if name == "THP_MEM_ALLOC_ENABLE" and record.get("allocator") == "mimalloc":
            continue
        if not agree(name, expected, found):
            differences.append(Difference("soft", name, expected, found or "unset", cost, remedy))
        elif name in late and name in environ:
            reason = f"if torch was imported before, it has no effect: {cost}"
            differences.append(
                Difference("soft", name, f"{expected} from the start", "set by the process itself", reason, remedy)
            )
    return differences


def _threads(environ: Mapping[str, str], record: Mapping[str, str]) -> list[Difference]:
    cpus, threads = record.get("threads_for_host", ""), record.get("threads", "")
    if not (cpus.isdecimal() and threads.isdecimal()) or int(threads) == int(cpus):
        return []
    few = int(threads) < int(cpus)
    if few and environ.get("OMP_NUM_THREADS"):
        return []  # someone shares the host out among several workers
    return [
        Difference(
            "info" if few else "soft",
            "OMP_NUM_THREADS",
            cpus,
            f"{threads} threads",
            f"{cpus} CPUs for {threads} threads: {COSTS['OMP_NUM_THREADS']}",
            f"Set OMP_NUM_THREADS={cpus}, or start with: armopt run BUNDLE -- CMD",
        )
    ]


def _versions(recorded: Mapping[str, str], record: Mapping[str, str]) -> list[Difference]:
    # The bundle is mostly made on another architecture, whose libraries say nothing about this one's.
    same_machine = recorded.get("machine") == record.get("machine")
    differences = []
    for name in ("torch", "torch_build", "onednn", "acl", "blas"):
        expected, found = recorded.get(name, ""), record.get(name, "")
        if not expected or expected == found or not (same_machine or name == "torch"):
            continue
        if name == "torch" and expected.partition("+")[0] == found.partition("+")[0]:
            continue  # the flavour is compared on its own
        cost = "kernels may answer differently, so each is probed again at load"
        remedy = f"Install torch {expected.partition('+')[0]}" if name == "torch" else ""
        differences.append(Difference("soft", name, expected, found or "unknown", cost, remedy))
    return differences


def _backends(required: Collection[str], host: Target, record: Mapping[str, str]) -> list[Difference]:
    if not is_arm(host) or not record.get("torch"):
        return []
    differences = []
    if "bf16" in required and record.get("sbgemm") == "no":
        differences.append(
            Difference(
                "info",
                "BF16 in BLAS",
                "sbgemm",
                f"none in {record.get('blas', 'this BLAS')}",
                "a BF16 product left to BLAS takes up to 13 times the instructions of OpenBLAS's, at M = 256",
                "",
            )
        )
    return differences


def _huge_pages(record: Mapping[str, str], environ: Mapping[str, str]) -> list[Difference]:
    cost = COSTS["THP_MEM_ALLOC_ENABLE"]
    if record.get("thp") == "never":
        remedy = "As root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return [Difference("info", "transparent huge pages", "madvise or always", "never", cost, remedy)]
    switch = "MIMALLOC_ALLOW_THP"
    if record.get("thp_switch") == switch and environ.get(switch, "1").lower() in ("0", "false", "no", "off"):
        return [Difference("soft", switch, "1 or unset", environ[switch], cost, f"unset {switch}")]
    return []


def _small_objects(host: Target, record: Mapping[str, str]) -> list[Difference]:
    found = record.get("malloc", "")
    if not is_arm(host) or not found.startswith("glibc"):
        return []
    remedy = (
        "Install libtcmalloc-minimal4 (Debian, Ubuntu) or gperftools-libs (Amazon Linux, Fedora), "
        "then start with: armopt run BUNDLE -- CMD"
    )
    return [Difference("info", "malloc", "tcmalloc, jemalloc or mimalloc", found, COSTS[PRELOAD], remedy)]
