from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from armopt import environment as env
from armopt import targets
from armopt.environment import build
from armopt.errors import InputError
from armopt.ir.records import Target
from tests.library_names import variables_read

CPUINFO = Path(__file__).parents[1] / "data" / "cpuinfo"
#: What `record` gave on the emulated Graviton3 with torch 2.10.0 from PyPI.
RECORD = {
    "machine": "aarch64",
    "torch": "2.10.0+cpu",
    "torch_build": "cpu",
    "acl": "52.6.0",
    "allocator": "mimalloc",
    "blas": "OpenBLAS 0.3.30",
    "blas_core": "neoversev1",
    "sbgemm": "yes",
    "onednn": "3.7.1",
    "threads": "2",
    "threads_for_host": "2",
    "thp": "madvise",
}
FEATURES = ("asimd", "bf16")
GOOD = {"DNNL_DEFAULT_FPMATH_MODE": "BF16", "LRU_CACHE_CAPACITY": "1024", "OMP_PROC_BIND": "false"}


def host(name: str = "graviton3") -> Target:
    return targets.this_host((CPUINFO / f"{name}.txt").read_text())


def manifest(target: str = "graviton3") -> dict[str, env.Variable]:
    return env.wanted(targets.load(target))


def compare(
    environ: Mapping[str, str] = GOOD,
    *,
    on: str = "graviton3",
    versions: Mapping[str, str] | None = None,
    late: tuple[str, ...] = (),
    **record: str,
) -> dict[str, env.Difference]:
    facts = {k: v for k, v in (RECORD | record).items() if v}
    found = env.differences(manifest(), FEATURES, versions or RECORD, host(on), environ, record=facts, late=late)
    assert len({d.what for d in found}) == len(found)
    return {d.what: d for d in found}


GLIBC = {"allocator": "posix_memalign", "thp_switch": "THP_MEM_ALLOC_ENABLE"}


def test_variables_follow_target_and_build() -> None:
    assert {n: v.value for n, v in env.wanted(targets.load("graviton3")).items()} == GOOD
    assert "DNNL_DEFAULT_FPMATH_MODE" not in env.wanted(targets.load("graviton2"))
    arm = env.wanted(targets.load("graviton3"), threads=4, build=RECORD)
    assert arm["OMP_NUM_THREADS"].value == "4"
    assert arm["TORCH_MKLDNN_MATMUL_MIN_DIM"].value == "64"
    assert "THP_MEM_ALLOC_ENABLE" not in arm
    nvpl = env.wanted(targets.load("graviton3"), build={"blas": "NVPL", **GLIBC})
    assert "TORCH_MKLDNN_MATMUL_MIN_DIM" not in nvpl
    assert nvpl["THP_MEM_ALLOC_ENABLE"].value == "1"
    assert "THP_MEM_ALLOC_ENABLE" not in env.wanted(targets.load("graviton3"), build={**GLIBC, "thp_switch": "none"})


def test_variables_for_tensorflow() -> None:
    chosen = {n: v.value for n, v in env.wanted(targets.load("graviton3"), framework="tensorflow").items()}
    assert chosen == {
        "DNNL_DEFAULT_FPMATH_MODE": "BF16",
        "TF_ENABLE_ONEDNN_OPTS": "1",
        "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "1",
    }
    assert "DNNL_DEFAULT_FPMATH_MODE" not in env.wanted(targets.load("altra"), framework="tensorflow")
    threads = env.wanted(targets.load("altra"), framework="tensorflow", threads=3)
    assert {n for n, v in threads.items() if v.value == "3"} == {"OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"}
    with pytest.raises(InputError, match=r"unknown framework 'jax'.*Known are pytorch, tensorflow"):
        env.wanted(targets.load("altra"), framework="jax")


def test_an_allocator_is_preloaded_for_pytorch_unless_the_user_chose() -> None:
    wanted = env.wanted(targets.load("altra"), allocator="/usr/lib/x.so.4")
    assert wanted["LD_PRELOAD"].value == "/usr/lib/x.so.4"
    assert "LD_PRELOAD" not in env.wanted(targets.load("altra"))
    assert "LD_PRELOAD" not in env.wanted(targets.load("altra"), framework="tensorflow", allocator="/usr/lib/x.so.4")
    for chosen in ("", "/mine.so"):
        assert env.for_process(wanted, {"LD_PRELOAD": chosen}, limit=1)[0]["LD_PRELOAD"] == chosen
    assert env.for_process(wanted, {}, limit=1)[0]["LD_PRELOAD"] == "/usr/lib/x.so.4"


ELF = b"\x7fELF\2\1\1" + bytes(9) + b"\3\0"
AARCH64, X86_64 = ELF + b"\xb7\0", ELF + b"\x3e\0"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ""),
        # Debian, Amazon Linux, one's own
        ({"usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4": AARCH64}, "libtcmalloc_minimal.so.4"),
        ({"usr/lib64/libtcmalloc_minimal.so.4": AARCH64}, "libtcmalloc_minimal.so.4"),
        ({"usr/local/lib/libmimalloc.so.2": AARCH64, "usr/lib64/libc.so.6": AARCH64}, "libmimalloc.so.2"),
        # the best first, wherever it is, by the name that programs use
        (
            {"usr/lib64/libjemalloc.so.2": AARCH64, "usr/local/lib/libtcmalloc.so.4": AARCH64},
            "libtcmalloc.so.4",
        ),
        ({f"usr/lib64/libjemalloc.so{end}": AARCH64 for end in (".2.1", ".2", "")}, "libjemalloc.so.2"),
        # another machine's, a linker script, a debugging build
        (
            {"usr/lib/libtcmalloc_minimal.so.4": X86_64, "usr/lib64/libjemalloc.so.2": AARCH64},
            "libjemalloc.so.2",
        ),
        ({"usr/lib64/libjemalloc.so.2": b"INPUT(-lx)", "usr/lib64/libtcmalloc_minimal_debug.so.4": AARCH64}, ""),
    ],
)
def test_the_allocator_of_a_host(
    files: Mapping[str, bytes], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    library = env.allocator_library(root=tmp_path)
    assert Path(library).name == found
    assert not found or Path(library).is_relative_to(tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert env.allocator_library(root=tmp_path) == ""


def test_a_link_to_nowhere_is_no_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    folder = tmp_path / "usr/lib64"
    folder.mkdir(parents=True)
    (folder / "libjemalloc.so.2").symlink_to("nowhere")
    assert env.allocator_library(root=tmp_path) == ""


@pytest.mark.parametrize(
    ("maps", "malloc"),
    [
        ("", os.confstr("CS_GNU_LIBC_VERSION")),
        ("/usr/lib/aarch64-linux-gnu/libc.so.6", os.confstr("CS_GNU_LIBC_VERSION")),
        ("/usr/lib64/libtcmalloc_minimal.so.4.5.10", "libtcmalloc_minimal.so.4.5.10"),
    ],
)
def test_which_allocator_is_loaded(maps: str, malloc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "read_or_empty", lambda path: f"7f00-7f01 r-xp 00000000 08:01 42 {maps}\n")
    assert env.record()["malloc"] == malloc


def test_glibcs_malloc_costs_each_call_of_a_packed_layer() -> None:
    found = compare(malloc="glibc 2.36")["malloc"]
    assert (found.severity, found.found) == ("info", "glibc 2.36")
    assert "50 to 80 thousand instructions" in found.cost
    assert "libtcmalloc-minimal4" in found.remedy
    assert compare(malloc="libjemalloc.so.2") == compare(malloc="") == {}
    assert "malloc" not in compare(on="x86-avx512-bf16", malloc="glibc 2.36")


def test_the_threshold_is_left_out_where_no_product_is_left_to_aten() -> None:
    build = {"blas": "OpenBLAS 0.3.30"}
    assert "TORCH_MKLDNN_MATMUL_MIN_DIM" in env.wanted(targets.load("graviton3"), build=build)
    assert "TORCH_MKLDNN_MATMUL_MIN_DIM" not in env.wanted(targets.load("graviton3"), build=build, left_to_aten=False)


def test_a_variable_that_no_library_reads_is_not_emitted(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    write(package, {"lib/libtorch_cpu.so": "x\0DEFAULT_FPMATH_MODE\0NOT_LRU_CACHE_CAPACITY\0"})
    names = ("DNNL_DEFAULT_FPMATH_MODE", "LRU_CACHE_CAPACITY", "OMP_NUM_THREADS", "LD_PRELOAD")
    wanted = {name: env.Variable("1", "why") for name in names}
    # the OpenMP runtime may be the system's, the dynamic loader is
    assert list(env.only_read(wanted, package)) == ["DNNL_DEFAULT_FPMATH_MODE", "OMP_NUM_THREADS", "LD_PRELOAD"]
    assert env.only_read(wanted, None) == wanted
    assert env.only_read(wanted, tmp_path / "nothing") == wanted


def test_the_environment_of_a_process() -> None:
    wanted = env.wanted(targets.load("graviton3"), threads=4)
    before = {"HOME": "/h", "ONEDNN_DEFAULT_FPMATH_MODE": "strict", "LRU_CACHE_CAPACITY": "1"}
    found, remarks = env.for_process(wanted, before, limit=2)
    assert found == {"HOME": "/h", "OMP_NUM_THREADS": "4", **GOOD}
    assert ["ONEDNN_DEFAULT_FPMATH_MODE=strict" in r for r in remarks] == [True, False]
    assert remarks[1].startswith("OMP_NUM_THREADS=4 on 2 CPUs")
    same = {"ONEDNN_DEFAULT_FPMATH_MODE": "bf16"}
    assert env.for_process(wanted, same, limit=4) == ({**same, "OMP_NUM_THREADS": "4", **GOOD}, ())


def test_what_is_lost_where_torch_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401

    on = host("graviton3")
    assert "was not set: oneDNN multiplies in FP32" in env.import_remark(on, {}, started={})
    late = env.import_remark(on, GOOD, started={})
    assert "was set after the process started" in late
    assert late.endswith("armopt run BUNDLE -- CMD")
    assert env.import_remark(on, GOOD, started=GOOD) == ""
    assert env.import_remark(host("altra"), {}, started={}) == ""
    assert env.import_remark(host("x86-avx512-bf16"), {}, started={}) == ""
    monkeypatch.delitem(sys.modules, "torch")
    assert env.import_remark(on, {}, started={}) == ""


def test_every_variable_is_read_by_the_installed_libraries() -> None:
    emitted = env.wanted(targets.load("graviton3"), threads=1, build=env.installed())
    torch = env.package_folder()
    assert torch
    readers = variables_read([*emitted, "ARMOPT_NO_SUCH_VARIABLE"], torch)
    assert readers.pop("ARMOPT_NO_SUCH_VARIABLE") == ()
    assert all(readers.values()), readers
    assert "libtorch_cpu.so" in readers["DNNL_DEFAULT_FPMATH_MODE"]


def test_the_same_host_does_not_differ() -> None:
    assert compare() == {}
    assert compare({**GOOD, "DNNL_DEFAULT_FPMATH_MODE": "any", "LRU_CACHE_CAPACITY": "4096"}) == {}


def test_a_missing_feature_is_hard_and_names_a_target_that_fits() -> None:
    found = compare(on="altra")["CPU features"]
    assert (found.severity, found.found) == ("hard", "neoverse-n1 with no bf16")
    assert found.remedy == "Re-export with --target altra or graviton2"


def test_a_laptop_is_told_of_the_twins_only() -> None:
    found = compare({"DNNL_DEFAULT_FPMATH_MODE": "BF16"}, on="x86-avx512-bf16")
    assert {d.severity for d in found.values()} == {"info"}
    assert "twins" in found["CPU"].cost


def test_variables_unset_or_different_are_soft_and_say_what_they_cost() -> None:
    found = compare({"DNNL_DEFAULT_FPMATH_MODE": "STRICT", "OMP_PLACES": "cores"})
    assert {n: d.found for n, d in found.items()} == {
        "DNNL_DEFAULT_FPMATH_MODE": "STRICT",
        "LRU_CACHE_CAPACITY": "unset",
        "OMP_PROC_BIND": "true",
    }
    assert {d.severity for d in found.values()} == {"soft"}
    assert "2.2 times" in str(found["DNNL_DEFAULT_FPMATH_MODE"])


def test_onednns_own_prefix_wins() -> None:
    assert "DNNL_DEFAULT_FPMATH_MODE" in compare({**GOOD, "ONEDNN_DEFAULT_FPMATH_MODE": "strict"})
    rest = {k: v for k, v in GOOD.items() if k != env.FPMATH}
    assert compare({**rest, "ONEDNN_DEFAULT_FPMATH_MODE": "bf16"}) == {}


def test_a_variable_set_late() -> None:
    assert env.late_variables(GOOD, environ=GOOD, initial={"LRU_CACHE_CAPACITY": "1024"}) == (
        "DNNL_DEFAULT_FPMATH_MODE",
        "OMP_PROC_BIND",
    )
    found = compare(late=("DNNL_DEFAULT_FPMATH_MODE",))["DNNL_DEFAULT_FPMATH_MODE"]
    assert found.found == "set by the process itself"
    assert "no effect" in found.cost


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the initial environment")
def test_late_variables_of_a_real_process() -> None:
    code = (
        "import os; from armopt.environment import late_variables as late\n"
        "os.environ['B'] = '2'; os.environ['A'] = '1'\n"
        "print(late(['A', 'B', 'C', 'D']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "A": "1", "D": "4"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "('B',)"


def test_another_build() -> None:
    found = compare(torch="2.13.0+cu130", torch_build="cuda 13.0", onednn="3.12.0", blas="NVPL", sbgemm="no")
    assert {n: d.severity for n, d in found.items()} == {
        **dict.fromkeys(("torch", "torch_build", "onednn", "blas"), "soft"),
        "BF16 in BLAS": "info",
    }
    x86 = {"machine": "x86_64", "torch": "2.13.0+cpu", "onednn": "3.12.0", "blas": "MKL 2024.2"}
    assert set(compare(versions=x86)) == {"torch"}
    assert compare(versions={**x86, "torch": "2.10.0"}) == {}


def test_a_wheel_without_acl() -> None:
    """Whose code answers is told by running it; which library a build holds says nothing."""
    assert compare(acl="", versions={"machine": "aarch64"}) == {}


def test_threads_and_huge_pages() -> None:
    many = compare(threads="64")["OMP_NUM_THREADS"]
    assert (many.severity, many.remedy[:21]) == ("soft", "Set OMP_NUM_THREADS=2")
    assert compare(threads="1")["OMP_NUM_THREADS"].severity == "info"
    assert compare({**GOOD, "OMP_NUM_THREADS": "1"}, threads="1") == {}
    assert compare(thp="never")["transparent huge pages"].severity == "info"


def test_mimallocs_own_switch() -> None:
    off = {**GOOD, "MIMALLOC_ALLOW_THP": "0"}
    found = compare(off, thp_switch="MIMALLOC_ALLOW_THP")["MIMALLOC_ALLOW_THP"]
    assert (found.severity, found.found, found.remedy) == ("soft", "0", "unset MIMALLOC_ALLOW_THP")
    assert compare(off, thp_switch="none") == {}
    assert compare({**GOOD, "MIMALLOC_ALLOW_THP": "1"}, thp_switch="MIMALLOC_ALLOW_THP") == {}


def test_hard_comes_first() -> None:
    found = env.differences(manifest(), FEATURES, RECORD, host("graviton2"), {}, record=RECORD | {"thp": "never"})
    assert [d.severity for d in found] == sorted((d.severity for d in found), key=("hard", "soft", "info").index)
    assert found[0].severity == "hard"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "workers", "threads"),
    [
        ({}, 1, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 1, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 1, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1, 1),
        (
            {
                "proc/self/cgroup": "0::/pod/main\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pod/main/cpu.max": "max 100000\n",
            },
            1,
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
            2,
        ),
        ({}, 100, 1),
    ],
)
def test_threads_for_host(
    files: Mapping[str, str], workers: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert env.threads_for_host(workers, root=write(tmp_path, files)) == threads


def test_of_two_hyperthreads_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = write(tmp_path, {topology.format(i): f"{i % 4},{i % 4 + 4}\n" for i in range(8)})
    assert env.threads_for_host(root=root) == 4


def test_record_of_this_process() -> None:
    import torch

    start = time.perf_counter()
    facts = env.record()
    assert time.perf_counter() - start < 0.5
    assert all(isinstance(v, str) and v for v in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts["torch_build"] == ("cpu" if torch.version.cuda is None else f"cuda {torch.version.cuda}")
    assert facts["onednn"].startswith("3.")
    assert facts["threads"] == str(torch.get_num_threads())
    assert "gomp" in facts["openmp"]
    assert re.match(r"glibc 2\.|lib(tc|je|mi)malloc", facts["malloc"])
    assert facts.items() >= env.installed().items()


def test_installed_does_not_import_torch() -> None:
    code = "import sys; from armopt.environment import installed; installed(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("libraries", "facts"),
    [
        (
            {
                "libarm_compute.so": b"..arm_compute_version=v52.6.0 Build options: {}\0",
                "libopenblas-24fd393f.so.0": b"\0OpenBLAS 0.3.30 DYNAMIC_ARCH USE_OPENMP \0\0sbgemm_\0",
                "libc10.so": b"\0mimalloc_verbose\0",
            },
            {
                "acl": "52.6.0",
                "blas": "OpenBLAS 0.3.30",
                "sbgemm": "yes",
                "allocator": "mimalloc",
                "thp_switch": "none",
            },
        ),
        (
            {"libopenblas.so": b"OpenBLAS 0.3.20 \0sgemm_\0", "libc10.so": b"\0THP_MEM_ALLOC_ENABLE\0"},
            {
                "blas": "OpenBLAS 0.3.20",
                "sbgemm": "no",
                "allocator": "posix_memalign",
                "thp_switch": "THP_MEM_ALLOC_ENABLE",
            },
        ),
        (
            {"libc10.so": b"\0mimalloc_verbose\0allow_thp\0", "libnvpl_blas_lp64_gomp.so.0": b"x"},
            {"blas": "NVPL", "sbgemm": "no", "allocator": "mimalloc", "thp_switch": "MIMALLOC_ALLOW_THP"},
        ),
        ({"libmkl_core.so.2": b"x"}, {"blas": "MKL"}),
        # torch 2.15 on x86
        ({"libc10.so": b"x"}, {"allocator": "posix_memalign", "thp_switch": "none"}),
        (
            {"libnvpl_blas_core.so.0": b"x", "libnvpl_blas_lp64_gomp.so.0": b"\0sbgemm_\0"},
            {"blas": "NVPL", "sbgemm": "yes"},
        ),
        ({"libnvpl_blas_core.so.0": b"x"}, {"blas": "NVPL", "sbgemm": "no"}),
        ({"libarm_compute.so": b""}, {}),
    ],
)
def test_libraries_of_each_build(
    libraries: Mapping[str, bytes], facts: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings as found in the wheels of torch 2.10.0 and 2.13.0 for aarch64."""
    torch = tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "version.py").write_text(
        "__version__ = '2.10.0+cpu'\ndebug = False\ncuda: Optional[str] = None\ngit_version = 'abc'\n"
    )
    for name, content in libraries.items():
        (torch / "lib" / name).write_bytes(content)
    expected = {"torch": "2.10.0+cpu", "torch_git": "abc", "torch_build": "cpu", **facts}
    monkeypatch.setattr(build, "package_folder", lambda: torch)
    assert env.installed() == expected


AWKWARD = {
    "A": env.Variable("plain", "one\nline"),
    "B": env.Variable("a b\"c'd$e\\f%h`g`#", "all that needs quoting"),
    "C": env.Variable("", "empty"),
    "D": env.Variable("false", "not a boolean"),
}
WANTED = {name: v.value for name, v in AWKWARD.items()}


def test_shell_text_can_be_sourced() -> None:
    script = env.render(AWKWARD, "shell") + 'printf "%s\\n" "$A" "$B" "$C" "$D"'
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:4] == list(WANTED.values())
    assert "# one line\n" in script


def test_k8s_text_is_yaml() -> None:
    assert {e["name"]: e["value"] for e in yaml.safe_load(env.render(AWKWARD, "k8s"))} == WANTED


def test_json_text() -> None:
    assert {n: v["value"] for n, v in json.loads(env.render(AWKWARD, "json")).items()} == WANTED


def test_docker_and_systemd_text() -> None:
    docker, systemd = env.render(AWKWARD, "docker"), env.render(AWKWARD, "systemd")
    assert r'ENV B="a b\"c' + "'" + r"d\$e\\f%h`g`#" + '"' in docker.splitlines()
    assert r'Environment="B=a b\"c' + "'" + r"d$e\\f%%h`g`#" + '"' in systemd.splitlines()
    assert 'ENV C=""' in docker.splitlines()


@pytest.mark.parametrize("format", env.FORMATS)
def test_what_no_format_can_carry(format: str) -> None:
    with pytest.raises(InputError, match="line break"):
        env.render({"A": env.Variable("x\nRUN evil", "")}, format)
    with pytest.raises(InputError, match="not a name"):
        env.render({"A; evil": env.Variable("x", "")}, format)


def test_an_unknown_format() -> None:
    with pytest.raises(InputError, match="unknown format 'toml'"):
        env.render(AWKWARD, "toml")


@given(st.text(st.characters(exclude_categories=["Cc", "Cn", "Cs", "Zl", "Zp"])))
def test_any_value_survives_quoting(value: str) -> None:
    chosen = {"A": env.Variable(value, "why")}
    assert yaml.safe_load(env.render(chosen, "k8s"))[0]["value"] == value
    assert shlex.split(env.render(chosen, "shell").splitlines()[-1]) == ["export", f"A={value}"]


@pytest.mark.parametrize(
    ("environ", "on"),
    [
        ({}, False),
        ({"DNNL_DEFAULT_FPMATH_MODE": "BF16"}, True),
        ({"DNNL_DEFAULT_FPMATH_MODE": "bf16"}, True),
        ({"DNNL_DEFAULT_FPMATH_MODE": "STRICT"}, False),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "DNNL_DEFAULT_FPMATH_MODE": "BF16"}, False),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "", "DNNL_DEFAULT_FPMATH_MODE": "BF16"}, True),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "ANY"}, True),
    ],
)
def test_fast_math_follows_onednns_variables(environ: dict[str, str], on: bool) -> None:
    assert env.fast_math(environ) is on
