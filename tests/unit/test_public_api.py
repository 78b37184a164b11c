from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import armopt
from armopt._version import TORCH_REQUIREMENT
from armopt.emulation.folder import NEWEST_TORCH, TORCH_VERSIONS

ROOT = Path(__file__).resolve().parents[2]


def test_the_public_names_are_these() -> None:
    """Adding or removing one is a decision: change this list and CHANGELOG.md together."""
    assert set(armopt.__all__) == {
        "AccuracyError",
        "ArmoptError",
        "ArmoptWarning",
        "BundleError",
        "CaptureError",
        "Checks",
        "CostPolicy",
        "Dimension",
        "Example",
        "Explanation",
        "HostError",
        "InputError",
        "Model",
        "ModuleModel",
        "OnnxOptions",
        "Output",
        "PassError",
        "Result",
        "Target",
        "ThresholdPolicy",
        "TrustedFile",
        "__version__",
        "compile",
        "explain",
        "load",
        "optimize",
        "validate",
    }
    assert armopt.__all__ == sorted(armopt.__all__, key=lambda name: (name.islower() or name.startswith("_"), name))


@pytest.mark.parametrize("name", armopt.__all__)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(armopt, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(armopt)


@pytest.mark.slow
def test_public_names_stay_after_the_submodules_are_imported() -> None:
    """A submodule of the same name would hide the function."""
    code = """
import armopt, armopt.compiler, armopt.runtime, armopt.cli.app
print(all(callable(getattr(armopt, name)) for name in ("load", "optimize", "validate")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_range_of_torch_is_the_packages() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [each for each in declared if re.match(r"torch\b", each)] == [TORCH_REQUIREMENT]
    taken = Requirement(TORCH_REQUIREMENT).specifier
    assert all(taken.contains(release) for release in (*TORCH_VERSIONS, NEWEST_TORCH))
    newest = Version(NEWEST_TORCH)
    assert not taken.contains(f"{newest.major}.{newest.minor + 1}.0")


def test_make_installs_one_release_of_that_range() -> None:
    """pip would take the newest one, a CUDA build of 5 GB."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (pinned,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (chosen,) = pinned.specifier
    assert (pinned.name, chosen.operator) == ("torch", "==")
    assert Requirement(TORCH_REQUIREMENT).specifier.contains(chosen.version)
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint $(CONSTRAINTS)" in line for line in installs)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        armopt.nothing  # noqa: B018


def test_importing_armopt_does_not_import_torch() -> None:
    code = """
import sys, armopt, armopt.cli.app, armopt.errors, armopt.ir.records
import armopt.environment, armopt.targets, armopt.runtime.onednn_log
print([name for name in ("torch", "numpy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_passes_are_reached_through_the_symlink() -> None:
    link = ROOT / "armopt" / "passes"
    assert link.is_symlink() or link.is_dir(), (
        "armopt/passes is a file: this checkout has no symlinks. "
        "Run: git config core.symlinks true && rm armopt/passes && git checkout armopt/passes"
    )
    assert link.resolve() == ROOT / "passes"
    from armopt import passes

    assert passes.__name__ == "armopt.passes"
