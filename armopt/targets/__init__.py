"""The products that armopt plans for, and the machine it runs on.

One TOML per product: figures and, in ``[provenance]``, where each comes from. No logic depends on a name.
"""

from __future__ import annotations

import ctypes
import difflib
import os
import platform
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from armopt.errors import InputError
from armopt.ir import Target

HOST = "host"

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

_SCHEMA: Mapping[str, type] = {
    "name": str,
    "core": str,
    "midr": list,
    "isa_features": list,
    "vector_bits": int,
    "simd_pipes": int,
    "l2_kib": int,
    "cores": int,
    "qemu_cpu": str,
    "provenance": dict,
}
_KINDS: Mapping[type, str] = {
    str: "a string",
    int: "a positive whole number",
    list: "a list of strings",
    dict: "a table of strings",
}


@dataclass(frozen=True, slots=True)
class Product:
    """One file of the table.

    Attributes:
        target: The figures.
        midr: ``implementer:part`` as in /proc/cpuinfo, e.g. ``0x41:0xd40``; several products may share one.
        qemu_cpu: Name of the core in QEMU 10.0 (``-cpu``), empty where it emulates none.
    """

    target: Target
    midr: tuple[str, ...]
    qemu_cpu: str = ""


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


def names() -> tuple[str, ...]:
    """All products, sorted; :func:`load` takes these and ``host``."""
    folder = resources.files(__name__)
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load(name: str) -> Target:
    """The target called `name`: a product, or ``host`` for this machine.

    Raises:
        InputError: No such target; the message names those that come close, and all there are.
    """
    return host() if name == HOST else product(name).target


def machine(target: Target) -> str:
    """The architecture that kernels for a target are for, as ``platform.machine()`` has it."""
    return platform.machine() if target.name == HOST else "aarch64"


@cache
def product(name: str) -> Product:
    """The product called `name`, with what is needed to detect and to emulate it.

    Raises:
        InputError: No such product.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name.lower().replace("-", "").replace(" ", ""), known, n=3)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        raise InputError(f"unknown target {name!r}", hint=f"{meant}Known are {', '.join((*known, HOST))}")
    file = resources.files(__name__) / f"{name}.toml"
    return parse_product(file.read_text(encoding="utf-8"), f"{name}.toml")


def parse_product(text: str, where: str) -> Product:
    """A product from its TOML.

    Args:
        text: The TOML.
        where: Its file name, for messages; its stem must be the product's name.

    Raises:
        InputError: A field is unknown, missing, of the wrong type, or without provenance.
    """

    def fail(what: str) -> InputError:
        return InputError(what, where=where, hint="See armopt/targets/graviton3.toml for a complete example")

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise fail(f"not valid TOML: {error}") from error
    if missing := sorted(_SCHEMA.keys() - {"qemu_cpu"} - data.keys()):
        raise fail(f"missing {', '.join(missing)}")
    if unknown := sorted(data.keys() - _SCHEMA.keys()):
        raise fail(f"unknown {', '.join(unknown)}")
    for key, value in data.items():
        if not _fits(value, _SCHEMA[key]):
            raise fail(f"{key} must be {_KINDS[_SCHEMA[key]]}, not {value!r}")
    if data["name"] != where.removesuffix(".toml"):
        raise fail(f"name is {data['name']!r}")
    if bad := [m for m in data["midr"] if not re.fullmatch(r"0x[0-9a-f]{2}:0x[0-9a-f]{3}", m)]:
        raise fail(f"midr must look like 0x41:0xd40, not {bad[0]}")
    provenance: dict[str, str] = data.pop("provenance")
    if provenance.keys() != (expected := data.keys() - {"name"}):
        raise fail(f"provenance must have exactly {', '.join(sorted(expected))}")
    midr, qemu_cpu = data.pop("midr"), data.pop("qemu_cpu", "")
    data["isa_features"] = frozenset(data["isa_features"])
    return Product(Target(**data, provenance=provenance), tuple(midr), qemu_cpu)


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


def host(cpuinfo: str | None = None) -> Target:
    """This machine as a target named ``host``.

    Features come from the machine itself, never from the table, since a kernel or hypervisor may hide some;
    the table adds what can't be asked for. On x86, AVX512-BF16 and AMX-BF16 count as ``bf16``: the same logic
    holds there. ``provenance["product"]`` lists the products with this core, separated by commas, if any.

    Args:
        cpuinfo: Text of a /proc/cpuinfo to take the machine for; None reads this machine's own, plus the
            kernel's HWCAP, which is right also where /proc is missing or shows another CPU.
    """
    live = cpuinfo is None
    info = parse_cpuinfo(_read("/proc/cpuinfo") if cpuinfo is None else cpuinfo)
    machine = info.architecture
    features = info.features
    if live:
        machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(m := platform.machine().lower(), m)
        if machine == "aarch64":
            # Apple's kernel has no auxiliary vector, but every aarch64 has Advanced SIMD.
            features = _hwcap_features() or features or frozenset({"asimd"})
    if machine != "aarch64" and features & {"avx512_bf16", "amx_bf16"}:
        features |= {"bf16"}
    midr = info.midr or (_sysfs_midr() if live and machine == "aarch64" else "")
    same = [p for n in names() if midr in (p := product(n)).midr]
    known = same[0].target if same else None
    source = "HWCAP of this kernel" if live and machine == "aarch64" else "/proc/cpuinfo"
    provenance = {"isa_features": source}
    if same:
        provenance["product"] = ", ".join(p.target.name for p in same)
        provenance["core"] = f"MIDR {midr}"
    return Target(
        name=HOST,
        core=known.core if known else info.model or (f"arm-{midr}" if midr else machine or "unknown"),
        isa_features=features,
        vector_bits=(_sve_bits() if live and "sve" in features else 0) or _vector_bits(features, known),
        simd_pipes=known.simd_pipes if known else 2,
        l2_kib=(_sysfs_l2_kib() if live else 0) or (known.l2_kib if known else 1024),
        cores=info.processors or (live and os.cpu_count()) or 1,
        provenance=provenance,
    )


def hwcap_names(hwcap: int, hwcap2: int) -> frozenset[str]:
    """The names in /proc/cpuinfo for the bits of AT_HWCAP and AT_HWCAP2 on aarch64."""
    return frozenset(
        name
        for word, bits in ((hwcap, _HWCAP), (hwcap2, _HWCAP2))
        for bit, name in enumerate(bits.split())
        if word >> bit & 1
    )


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    if isinstance(value, int):
        return value > 0
    if isinstance(value, str):
        return bool(value)
    items: list[Any] = []
    if isinstance(value, dict):
        items = [*value.values()]
    elif isinstance(value, list):
        items = value
    return bool(items) and all(isinstance(item, str) and item for item in items)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


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


def _vector_bits(features: frozenset[str], known: Target | None) -> int:
    if known:
        return known.vector_bits
    return 512 if "avx512f" in features else 256 if "avx2" in features else 128


def _sysfs_midr() -> str:
    text = _read("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1").strip()
    if not re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return ""
    # MIDR_EL1, Arm Architecture Reference Manual: implementer in bits 31-24, part number in bits 15-4.
    midr = int(text, 16)
    return f"0x{midr >> 24 & 0xFF:02x}:0x{midr >> 4 & 0xFFF:03x}"


def _sysfs_l2_kib() -> int:
    cache_folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in range(5):
        if _read(f"{cache_folder}/index{index}/level").strip() == "2":
            size = re.fullmatch(r"(\d+)([KM])", _read(f"{cache_folder}/index{index}/size").strip())
            return int(size[1]) * (1024 if size[2] == "M" else 1) if size else 0
    return 0
