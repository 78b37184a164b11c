"""The command line and environment of an emulated process."""

import os
from pathlib import Path

import pytest

import armopt
from armopt.emulation import PreparedFolder, emulated_command, runner
from armopt.emulation.folder import write_stamp
from armopt.errors import HostError, InputError
from armopt.targets.emulated import core_named

CHECKOUT = str(Path(armopt.__file__).parents[1])


@pytest.fixture
def folder(tmp_path):
    prepared = PreparedFolder(tmp_path)
    for part in prepared.parts("2.10.0"):
        (tmp_path / part.name).mkdir(parents=True)
        write_stamp(tmp_path / part.name, part.recipe)
    return prepared


def test_python_becomes_the_emulated_one_on_that_core(folder):
    argv, env = emulated_command("neoverse-v1", ["python", "x.py", "-v"], env={"PATH": "/bin"}, folder=folder)
    assert argv == [str(folder.wrappers / "python"), "x.py", "-v"]
    assert env["ARMOPT_EMULATED_CPU"] == "neoverse-v1"
    assert env["ARMOPT_ARM64_CACHE"] == str(folder.path)
    assert env["PATH"] == f"{folder.wrappers}{os.pathsep}/bin"


def test_the_callers_settings_pass_and_its_packages_come_last(folder):
    given = {
        "DNNL_DEFAULT_FPMATH_MODE": "BF16",
        "PYTHONPATH": "/mine",
        "PYTHONHOME": "/x86",
        "VIRTUAL_ENV": "/x86",
    }
    _, env = emulated_command("neoverse-n1", ["python3"], env=given, folder=folder)
    assert env["DNNL_DEFAULT_FPMATH_MODE"] == "BF16"
    sites = [str(folder.site("2.10.0")), str(folder.base_site)]
    assert env["PYTHONPATH"].split(os.pathsep) == [CHECKOUT, *sites, "/mine"]
    assert "PYTHONHOME" not in env
    assert "VIRTUAL_ENV" not in env
    assert env["PYTHONNOUSERSITE"] == "1"


def test_what_is_preloaded_is_the_emulated_programs_alone(folder):
    _, env = emulated_command("neoverse-n1", ["python"], env={"LD_PRELOAD": "/usr/lib/a.so:/b.so"}, folder=folder)
    assert "LD_PRELOAD" not in env
    assert env["QEMU_SET_ENV"] == "LD_PRELOAD=/usr/lib/a.so:/b.so"
    assert set(env["QEMU_UNSET_ENV"].split(",")) == {"QEMU_SET_ENV", "QEMU_UNSET_ENV"}
    _, switched_off = emulated_command("neoverse-n1", ["python"], env={"LD_PRELOAD": ""}, folder=folder)
    assert switched_off["QEMU_SET_ENV"] == "LD_PRELOAD="
    _, without = emulated_command("neoverse-n1", ["python"], env={}, folder=folder)
    assert not [name for name in without if name.startswith("QEMU_")]
    with pytest.raises(InputError, match="comma"):
        emulated_command("neoverse-n1", ["python"], env={"LD_PRELOAD": "/a,b.so"}, folder=folder)


def test_an_installed_armopt_does_not_put_x86_packages_first(folder, monkeypatch):
    monkeypatch.setattr(runner, "__file__", "/venv/lib/site-packages/armopt/emulation/runner.py")
    _, env = emulated_command("neoverse-n1", ["python3"], env={}, folder=folder)
    assert env["PYTHONPATH"].split(os.pathsep)[-1] == "/venv/lib/site-packages"


@pytest.mark.parametrize(
    ("cpu", "core"),
    [
        ("graviton2", "neoverse-n1"),
        ("altra", "neoverse-n1"),
        ("graviton3", "neoverse-v1"),
        ("yitian710", "neoverse-n2"),
        ("cobalt100", "neoverse-n2"),
        ("neoverse-n2", "neoverse-n2"),
    ],
)
def test_products_name_their_core(cpu, core):
    assert core_named(cpu).name == core


def test_a_core_that_qemu_does_not_model_is_refused():
    with pytest.raises(InputError, match=r"no model of 'graviton4'.*graviton3"):
        core_named("graviton4")


@pytest.mark.parametrize("argv", [[], ["pytest"], ["/usr/bin/ls"]])
def test_only_what_is_emulated_runs(folder, argv):
    with pytest.raises(InputError):
        emulated_command("neoverse-v1", argv, folder=folder)


def test_tools_that_start_python_run_on_the_host(folder):
    argv, _ = emulated_command("neoverse-v1", ["env", "A=1", "python", "x.py"], folder=folder)
    assert argv[0] == "env"


def test_an_unprepared_folder_says_how_to_prepare_it(folder):
    with pytest.raises(HostError, match=r"armopt\.emulation\.prepare --torch 2\.13\.0"):
        emulated_command("neoverse-v1", ["python"], torch_version="2.13.0", folder=folder)


def test_the_folder_is_the_users_or_the_one_chosen(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ARMOPT_ARM64_CACHE", raising=False)
    assert PreparedFolder.default().path == Path.home() / ".cache" / "armopt" / "arm64"
    monkeypatch.setenv("ARMOPT_ARM64_CACHE", "/somewhere")
    assert PreparedFolder.default().path == Path("/somewhere")
