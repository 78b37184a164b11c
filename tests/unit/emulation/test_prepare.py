"""Preparing the folder, without any download: what is rebuilt, kept, refused, and how failures read."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from armopt.emulation import commands, parts
from armopt.emulation.debian import MIRROR_VARIABLE, Mirror, find_mirror
from armopt.emulation.folder import PreparedFolder, torch_requirements
from armopt.emulation.prepare import main, prepare
from armopt.errors import HostError, InputError


class Builder:
    """Makes each part as one library, and keeps the names."""

    def __init__(self):
        self.names = []

    def __call__(self, part, into, folder, work):
        self.names.append(part.name)
        (into / "libpart.so").write_bytes(b"content")


@pytest.fixture
def build():
    return Builder()


PARTS = ["qemu", "root", "cores", "bin", "site/base", "site/torch-2.10.0"]


def test_everything_is_built_once(tmp_path, build):
    folder = PreparedFolder(tmp_path / "cache")
    prepare(["2.10.0"], folder, build=build)
    assert build.names == PARTS
    prepare(["2.10.0"], folder, build=build)
    assert build.names == PARTS
    folder.require("2.10.0")
    assert sorted(path.name for path in folder.path.iterdir()) == [
        ".lock",
        "bin",
        "cores",
        "qemu",
        "root",
        "site",
    ]


def test_another_pytorch_shares_the_rest(tmp_path, build):
    folder = PreparedFolder(tmp_path)
    prepare(["2.10.0"], folder, build=build)
    build.names.clear()
    prepare(["2.10.0", "2.13.0"], folder, build=build)
    assert build.names == ["site/torch-2.13.0"]


@pytest.mark.parametrize("damage", ["shorten", "delete", "unstamp", "other recipe"])
def test_a_damaged_part_is_noticed_and_only_it_is_rebuilt(tmp_path, build, damage):
    folder = PreparedFolder(tmp_path)
    prepare(["2.10.0"], folder, build=build)
    build.names.clear()
    library, stamp = folder.root / "libpart.so", folder.root / ".armopt-complete.json"
    if damage == "shorten":
        library.write_bytes(b"cont")
    elif damage == "delete":
        library.unlink()
    elif damage == "unstamp":
        stamp.unlink()
    else:
        stamp.write_text(stamp.read_text().replace("bookworm", "bullseye"))
    with pytest.raises(HostError, match=r"not prepared \(root\).*--torch 2\.10\.0"):
        folder.require("2.10.0")
    prepare(["2.10.0"], folder, build=build)
    assert build.names == ["root"]
    folder.require("2.10.0")


def test_a_library_of_other_bytes_is_rebuilt_though_its_size_is_right(tmp_path, build):
    folder = PreparedFolder(tmp_path)
    prepare(["2.10.0"], folder, build=build)
    build.names.clear()
    (folder.root / "libpart.so").write_bytes(b"CONTENT")
    folder.require("2.10.0")  # what starts a process looks at sizes alone, for it has no time
    prepare(["2.10.0"], folder, build=build)
    assert build.names == ["root"]
    assert (folder.root / "libpart.so").read_bytes() == b"content"


def test_downloads_of_another_recipe_go_once_the_part_is_made(tmp_path, build):
    folder = PreparedFolder(tmp_path)
    part = folder.parts("2.10.0")[1]
    older, kept = folder.downloads(replace(part, recipe="older")), folder.downloads(part)
    for path in (older, kept):
        path.mkdir(parents=True)
    prepare(["2.10.0"], folder, build=build)
    assert list(older.parent.iterdir()) == [kept]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, build):
    folder = PreparedFolder(tmp_path)

    def interrupted(part, into, *rest):
        if part.name == "site/base":
            (into / "half.so").touch()
            raise KeyboardInterrupt
        build(part, into, *rest)

    with pytest.raises(KeyboardInterrupt):
        prepare(["2.10.0"], folder, build=interrupted)
    assert folder.missing("2.10.0") == ["site/base", "site/torch-2.10.0"]
    assert not folder.base_site.exists()  # nothing half made is ever in place
    assert not (folder.path / ".work").exists()
    build.names.clear()
    prepare(["2.10.0"], folder, build=build)
    assert build.names == ["site/base", "site/torch-2.10.0"]
    assert not (folder.base_site / "half.so").exists()


def test_two_at_once_do_the_work_once(tmp_path, build):
    lines = []

    def slow(*arguments):
        time.sleep(0.05)
        build(*arguments)

    def run():
        prepare(["2.10.0"], PreparedFolder(tmp_path), lines.append, build=slow)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.names == PARTS
    assert any("waiting for another prepare" in line for line in lines)


def test_an_emulated_program_reads_of_its_own_core(tmp_path):
    """ACL and oneDNN look into /sys, where the host's cores are others."""
    folder = PreparedFolder(tmp_path)
    named = {part.name: part for part in folder.parts("2.10.0")}
    parts.build(named["cores"], tmp_path, folder, tmp_path / "work")
    read = lambda path: (tmp_path / "neoverse-v1/sys/devices/system/cpu" / path).read_text()  # noqa: E731
    assert read("cpu0/regs/identification/midr_el1") == read("cpu63/regs/identification/midr_el1")
    assert int(read("cpu0/regs/identification/midr_el1"), 16) >> 4 & 0xFFF == 0xD40  # Neoverse V1 TRM
    assert [read(f"cpu0/cache/index{i}/{name}") for i in (0, 1, 2, 3) for name in ("level", "type", "size")] == [
        *("1\n", "Data\n", "64K\n", "1\n", "Instruction\n", "64K\n"),
        *("2\n", "Unified\n", "1024K\n", "3\n", "Unified\n", "32768K\n"),
    ]
    assert os.readlink(tmp_path / "neoverse-v1" / "usr") == "../../root/usr"


def test_what_is_started_emulated_can_be_run(tmp_path):
    """Its QEMU is missing here, and the shell says so."""
    folder = PreparedFolder(tmp_path)
    (part,) = (part for part in folder.parts("2.10.0") if part.name == "bin")
    folder.wrappers.mkdir()
    parts.build(part, folder.wrappers, folder, tmp_path / "work")
    for name in ("python3.11", "armopt"):
        done = subprocess.run([folder.wrappers / name], capture_output=True, text=True, check=False)
        assert (done.returncode, "qemu/qemu-aarch64" in done.stderr) == (127, True)


def test_requirements_pair_torchvision_with_its_pytorch():
    assert torch_requirements("2.10.0") == ["torch==2.10.0", "torchvision==0.25.0"]
    assert torch_requirements("2.9.1") == ["torch==2.9.1", "torchvision==0.24.1"]
    assert torch_requirements("2.14.1") == ["torch==2.14.1", "torchvision==0.29.1"]
    assert torch_requirements("2.15.0") == ["torch==2.15.0", "torchvision==0.29.2"]  # there is no 0.30
    for version in ("1.13.1", "2.10", "latest"):
        with pytest.raises(InputError, match=version):
            torch_requirements(version)


# --- the mirror ---

DEB822 = """\
Types: deb
# a comment
URIs: mirror://debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /keys/debian.gpg

Types: deb
URIs: mirror://debian-security
Suites: bookworm-security
Components: main
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_the_mirror_is_this_machines_in_either_format(apt):
    (apt / "sources.list.d" / "other.list").write_text("deb mirror://vendor vendor-bookworm main\n")
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    assert find_mirror(apt, apt / "keyrings") == Mirror("mirror://debian", "/keys/debian.gpg")
    (apt / "sources.list").write_text(
        "# deb mirror://no bookworm main\n"
        "deb-src mirror://no bookworm main\n"
        "deb [arch=amd64 signed-by=/x.gpg] mirror://first bookworm main contrib # here\n"
    )
    assert find_mirror(apt, apt / "keyrings").uri == "mirror://first"


def test_debians_own_keyring_is_used_where_it_is_installed(apt):
    (apt / "keyrings").mkdir()
    (apt / "keyrings" / "debian-archive-keyring.gpg").touch()
    (apt / "sources.list").write_text("deb mirror://first bookworm main\n")
    keyring = str(apt / "keyrings" / "debian-archive-keyring.gpg")
    assert (
        find_mirror(apt, apt / "keyrings").line("trixie") == f"deb [signed-by={keyring}] mirror://first trixie main\n"
    )


def test_no_mirror_says_how_to_name_one(apt, monkeypatch):
    (apt / "sources.list").write_text("deb mirror://ubuntu noble main\ndeb mirror://x bookworm-security main\n")
    with pytest.raises(HostError, match="Set ARMOPT_DEBIAN_MIRROR"):
        find_mirror(apt, apt / "keyrings")
    monkeypatch.setenv(MIRROR_VARIABLE, "mirror://chosen")
    assert find_mirror(apt, apt / "keyrings").line("trixie") == "deb mirror://chosen trixie main\n"


# --- failures ---


def test_a_failed_download_says_what_where_and_what_next(tmp_path):
    script = "import sys; sys.exit('WARNING: noise\\nERROR: No matching distribution found')"
    with pytest.raises(HostError) as caught:
        commands.run_command([sys.executable, "-c", script], "torch==2.10.0")
    said = str(caught.value)
    assert "torch==2.10.0" in said
    assert "ERROR: No matching distribution found" in said
    assert "noise" not in said
    assert "run it again" in said


def test_the_command_says_what_fails(tmp_path, monkeypatch, capsys):
    """apt itself, of a mirror that is not there; where there is no apt, that it is missing."""
    monkeypatch.setenv(MIRROR_VARIABLE, f"file:{tmp_path / 'nowhere'}")
    assert main(["--torch", "2.10.0", "--cache", str(tmp_path / "cache")]) == HostError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("preparing qemu\nerror: Debian trixie: apt-get ")


def test_a_missing_tool_is_named():
    with pytest.raises(HostError, match="apt-of-nowhere is missing"):
        commands.run_command(["apt-of-nowhere"], "qemu-user")
