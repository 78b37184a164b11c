from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armopt import targets
from armopt.errors import InputError
from armopt.ir.records import Target
from armopt.plan import costs
from armopt.targets import products
from armopt.targets.clock import Clock
from armopt.targets.emulated import core_named

CPUINFO = Path(__file__).parents[1] / "data" / "cpuinfo"
PRODUCTS = targets.names()


def replay(name: str) -> Target:
    return targets.this_host((CPUINFO / f"{name}.txt").read_text())


def toml(name: str = "graviton3") -> str:
    return (Path(products.__file__).parent / f"{name}.toml").read_text()


def test_the_table_is_complete() -> None:
    assert set(PRODUCTS) == {
        *("graviton2", "graviton3", "graviton4", "graviton5", "yitian710"),
        *("cobalt100", "axion", "grace", "altra", "ampereone"),
    }


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_figure_of_a_product_names_its_source(name: str) -> None:
    product = targets.product(name)
    figures = {"core", "midr", "isa_features", "vector_bits", "simd_pipes", "l2_kib", "cores"}
    optional = {"qemu_cpu": product.qemu_cpu, "cost_table": product.target.cost_table}
    figures |= {name for name, value in optional.items() if value}
    figures |= {f"clock.{field.name}" for field in fields(Clock)} if product.clock else set()
    assert product.target.provenance.keys() == figures
    assert targets.load(name) == product.target


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_detected_from_its_cpuinfo(name: str) -> None:
    host, table = replay(name), targets.load(name)
    assert host.name == "host"
    assert host.core == table.core
    assert name in host.provenance["product"].split(", ")
    assert table.isa_features <= host.isa_features
    assert host.vector_bits == table.vector_bits
    assert host.cores == 2


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_has_a_cost_table_and_qemus_name_is_one_that_qemu_has(name: str) -> None:
    """A core has a table of its own, or names the one that is assumed; those that QEMU emulates have their own."""
    product = targets.product(name)
    assert costs.find(product.target) is not None
    has_its_own = costs.find(replace(product.target, cost_table="")) is not None
    assert has_its_own != bool(product.target.cost_table)
    assert has_its_own or not product.qemu_cpu
    assert product.qemu_cpu in ("", product.target.core)
    if product.qemu_cpu:
        assert core_named(name).name == product.qemu_cpu


def test_only_neoverse_n1_lacks_bf16() -> None:
    assert {n for n in PRODUCTS if not targets.load(n).bf16} == {"graviton2", "altra"}


def test_cobalt_is_told_from_yitian_by_its_implementer() -> None:
    assert replay("cobalt100").provenance["product"] == "cobalt100"
    assert replay("yitian710").provenance["product"] == "yitian710"


def test_features_come_from_the_host_and_not_from_the_table() -> None:
    text = (CPUINFO / "graviton3.txt").read_text().replace(" bf16", "")
    host = targets.this_host(text)
    assert host.core == "neoverse-v1"
    assert not host.bf16
    assert "svebf16" in host.isa_features


def test_the_emulated_core_is_a_graviton3() -> None:
    host = replay("qemu-10.0-neoverse-v1")
    assert host.provenance["product"] == "graviton3"
    assert host.bf16


def test_x86_bf16_counts_as_bf16() -> None:
    host = replay("x86-avx512-bf16")
    assert host.bf16
    assert host.vector_bits == 512
    assert "asimd" not in host.isa_features
    assert "product" not in host.provenance


def test_an_unknown_arm_core_keeps_its_identity() -> None:
    host = targets.this_host("processor : 0\nFeatures : fp asimd bf16\nCPU implementer : 0x99\nCPU part : 0x123\n")
    assert host.core == "arm-0x99:0x123"
    assert host.bf16


def test_this_machine() -> None:
    host = targets.load("host")
    assert host.name == "host"
    assert host.cores >= 1
    assert host.isa_features


def test_hwcap_of_an_emulated_neoverse_v1() -> None:
    """The words are getauxval's under qemu-aarch64 10.0, whose /proc/cpuinfo lists the same names."""
    text = (CPUINFO / "qemu-10.0-neoverse-v1.txt").read_text()
    assert targets.hwcap_names(0xCFFFFFFB, 0x17201) == targets.parse_cpuinfo(text).features


def test_an_unknown_target_names_those_that_come_close() -> None:
    with pytest.raises(InputError) as caught:
        targets.load("Graviton-3")
    assert "Did you mean graviton3" in str(caught.value)
    assert "yitian710" in str(caught.value)
    with pytest.raises(InputError, match=r"unknown target '\.\./ir'"):
        targets.load("../ir")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("vector_bits = 256\n", "", "missing vector_bits"),
        ("vector_bits = 256\n", "vector_bits = 256\nturbo = 1\n", "unknown turbo"),
        (
            "vector_bits = 256\n",
            'vector_bits = "256"\n',
            "vector_bits must be a positive whole number, not '256'",
        ),
        ("vector_bits = 256\n", "vector_bits = true\n", "vector_bits must be a positive"),
        ("cores = 64\n", "cores = -1\n", "cores must be a positive"),
        ("cores = 64\n", "cores = [\n", "not valid TOML"),
        ('"0x41:0xd40"', '"0xd40"', "midr must look like 0x41:0xd40"),
        ('"0x41:0xd40"', "65", "midr must be a list of strings"),
        ('name = "graviton3"', 'name = "graviton9"', "name is 'graviton9'"),
        (
            'cores = "AWS Graviton Technical Guide: 64 cores in one socket"\n',
            "",
            "provenance must have exactly",
        ),
    ],
)
def test_a_broken_table_says_what_is_wrong(old: str, new: str, message: str) -> None:
    text = toml()
    assert old in text
    with pytest.raises(InputError) as caught:
        targets.parse_product(text.replace(old, new), "graviton3.toml")
    assert str(caught.value).startswith("graviton3.toml: ")
    assert message in str(caught.value)


@given(st.text())
def test_any_cpuinfo_can_be_read(text: str) -> None:
    assert targets.this_host(text).name == "host"
