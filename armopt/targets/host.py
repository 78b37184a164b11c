"""This machine as a target: what /proc/cpuinfo and the kernel say of it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from armopt.files import read_or_empty
from armopt.ir.records import Target
from armopt.targets.products import HOST, names, product

#: Bit -> name of AT_HWCAP and AT_HWCAP2: Linux, arch/arm64/include/uapi/asm/hwcap.h, in order from bit 0.
_HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop "
    "sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
_HWCAP2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 "
    "i8mm bf16 dgh rng bti mte ecv afp rpres mte3 sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 "
    "smef32f32 smefa64 wfxt ebf16 sveebf16 cssc rprfm sve2p1 sme2"
)
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_PR_SVE_GET_VL = 51


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """What /proc/cpuinfo says, whichever the architecture; empty or zero where it doesn't say it.

    Attributes:
        architecture: ``aarch64`` or ``x86_64``.
        implementer: Arm only, e.g. ``0x41``.
        part: Arm only, e.g. ``0xd40``.
        model: x86 only: the marketing name.
        features: As listed.
        processors: How many are listed.
    """

    architecture: str = ""
    implementer: str = ""
    part: str = ""
    model: str = ""
    features: frozenset[str] = frozenset()
    processors: int = 0

    @property
    def midr(self) -> str:
        """``implementer:part``, or empty."""
        return f"{self.implementer}:{self.part}" if self.implementer and self.part else ""


def load(name: str) -> Target:
    """The target called `name`: a product, or ``host`` for this machine.

    Raises:
        InputError: No such target; the message names those that come close, and all there are.
    """
    return this_host() if name == HOST else product(name).target


def machine(target: Target) -> str:
    """The architecture that kernels for a target are for, as ``platform.machine()`` has it."""
    return platform.machine() if target.name == HOST else "aarch64"


def parse_cpuinfo(text: str) -> CpuInfo:
    """Reads the text of /proc/cpuinfo; never raises, whatever `text` holds."""
    fields: dict[str, str] = {}
    processors = 0
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            processors += key.strip() == "processor"
            # Where cores differ (big.LITTLE, not a server) the first one stands for all.
            fields.setdefault(key.strip(), value.strip())
    arm = "CPU implementer" in fields or "Features" in fields
    x86 = "flags" in fields and not arm
    return CpuInfo(
        architecture="aarch64" if arm else "x86_64" if x86 else "",
        implementer=fields.get("CPU implementer", "").lower(),
        part=fields.get("CPU part", "").lower(),
        model=fields.get("model name", "") if x86 else "",
        features=frozenset(fields.get("Features" if arm else "flags", "").split()),
        processors=processors,
    )


def this_host(cpuinfo: str | None = None) -> Target:
    """This machine as a target named ``host``.

    Features come from the machine itself, never from the table, since a kernel or hypervisor may hide some;
    the table adds what can't be asked for. On x86, AVX512-BF16 and AMX-BF16 count as ``bf16``: the same logic
    holds there. ``provenance["product"]`` lists the products with this core, separated by commas, if any.

    Args:
        cpuinfo: Text of a /proc/cpuinfo to take the machine for; None reads this machine's own, plus the
            kernel's HWCAP, which is right also where /proc is missing or shows another CPU.
    """
    if cpuinfo is not None:
        return _as_target(parse_cpuinfo(cpuinfo), "/proc/cpuinfo")
    info = _ask_machine()
    found = _as_target(info, "HWCAP of this kernel" if info.architecture == "aarch64" else "/proc/cpuinfo")
    sve_bits = _sve_bits() if "sve" in found.isa_features else 0
    return replace(
        found,
        vector_bits=sve_bits or found.vector_bits,
        l2_kib=_sysfs_l2_kib() or found.l2_kib,
        cores=info.processors or os.cpu_count() or 1,
    )


def _ask_machine() -> CpuInfo:
    """What this machine says of its CPU, in /proc and otherwise."""
    info = parse_cpuinfo(read_or_empty("/proc/cpuinfo"))
    machine = platform.machine().lower()
    architecture = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    if architecture != "aarch64":
        return replace(info, architecture=architecture)
    # Apple's kernel has no auxiliary vector, but every aarch64 has Advanced SIMD.
    features = _hwcap_features() or info.features or frozenset({"asimd"})
    implementer, _, part = (info.midr or _sysfs_midr()).partition(":")
    return replace(info, architecture=architecture, features=features, implementer=implementer, part=part)


def _as_target(info: CpuInfo, source: str) -> Target:
    """A machine as a target, with the figures of a product of the same core where one is known."""
    features = info.features
    if info.architecture != "aarch64" and features & {"avx512_bf16", "amx_bf16"}:
        features |= {"bf16"}
    same = [product(name) for name in names() if info.midr in product(name).midr]
    provenance = {"isa_features": source}
    if same:
        provenance |= {"product": ", ".join(each.target.name for each in same), "core": f"MIDR {info.midr}"}
    known = same[0].target if same else _unknown(info)
    return replace(known, name=HOST, isa_features=features, cores=info.processors or 1, provenance=provenance)


def _unknown(info: CpuInfo) -> Target:
    """A core that is in no product's file; on x86 its vectors are known from its features."""
    bits = 512 if "avx512f" in info.features else 256 if "avx2" in info.features else 128
    core = info.model or (f"arm-{info.midr}" if info.midr else info.architecture or "unknown")
    return Target(HOST, core, info.features, vector_bits=bits, simd_pipes=2, l2_kib=1024, cores=1)


def hwcap_names(hwcap: int, hwcap2: int) -> frozenset[str]:
    """The names in /proc/cpuinfo for the bits of AT_HWCAP and AT_HWCAP2 on aarch64."""
    return frozenset(
        name
        for word, bits in ((hwcap, _HWCAP), (hwcap2, _HWCAP2))
        for bit, name in enumerate(bits.split())
        if word >> bit & 1
    )


def _hwcap_features() -> frozenset[str]:
    with suppress(OSError, AttributeError, TypeError):
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
        return hwcap_names(getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2))
    return frozenset()


def _sve_bits() -> int:
    with suppress(OSError, AttributeError, TypeError):
        length = int(ctypes.CDLL(None).prctl(_PR_SVE_GET_VL))
        return (length & 0xFFFF) * 8 if length > 0 else 0
    return 0


def _sysfs_midr() -> str:
    text = read_or_empty("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1").strip()
    if not re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return ""
    # MIDR_EL1, Arm Architecture Reference Manual: implementer in bits 31-24, part number in bits 15-4.
    midr = int(text, 16)
    return f"0x{midr >> 24 & 0xFF:02x}:0x{midr >> 4 & 0xFFF:03x}"


def _sysfs_l2_kib() -> int:
    cache_folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in range(5):
        if read_or_empty(f"{cache_folder}/index{index}/level").strip() == "2":
            size = re.fullmatch(r"(\d+)([KM])", read_or_empty(f"{cache_folder}/index{index}/size").strip())
            return int(size[1]) * (1024 if size[2] == "M" else 1) if size else 0
    return 0
