"""The products that armopt plans for, one TOML each, and this machine as one of them."""

from armopt.targets.host import CpuInfo, hwcap_names, load, machine, parse_cpuinfo, this_host
from armopt.targets.products import HOST, Product, clock_of, names, parse_product, product, table

__all__ = [
    "HOST",
    "CpuInfo",
    "Product",
    "clock_of",
    "hwcap_names",
    "load",
    "machine",
    "names",
    "parse_cpuinfo",
    "parse_product",
    "product",
    "table",
    "this_host",
]
