"""`armopt package`, `armopt env` and `armopt run`: the folder of an image, its server on loopback, and the commands."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt import environment
from armopt.bundle import files, reader
from armopt.cli import app
from armopt.deploy import package
from armopt.errors import BundleError, HostError, InputError
from tests.serving import Running, running

SHA = "0123456789abcdef" * 4
INSTRUCTIONS = [
    "FROM",
    "WORKDIR",
    "COPY",
    "RUN",
    "ENV",
    "USER",
    "EXPOSE",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "ENTRYPOINT",
    "CMD",
]


class Two(nn.Module):
    """Two inputs, a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, Any]:
        y = self.linear(x) * scale
        return {"y": y, "parts": [y.relu(), y.sum()]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture(scope="module")
def bundle(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bundle"
    armopt.optimize(model, (torch.randn(4, 8), torch.ones(1)), output=path, target="graviton3")
    return path


def item(name: str, version: str, *needs: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "version": version, "requires_dist": list(needs)},
        "download_info": {"url": f"https://x/{name}.whl", "archive_info": {"hashes": {"sha256": SHA}}},
    }


class Pip:
    """Stands in for pip: two reports, one after the other."""

    def __init__(self, *reports: list[dict[str, Any]]) -> None:
        self.reports, self.calls = list(reports), list[list[str]]()

    def __call__(self, arguments: Sequence[str]) -> str:
        self.calls.append(list(arguments))
        report = Path(arguments[arguments.index("--report") + 1])
        report.write_text(json.dumps({"install": self.reports[len(self.calls) - 1]}))
        return ""


def pip() -> Pip:
    torch_needs = (
        "filelock",
        "sympy>=1.13.3",
        'setuptools; python_version >= "3.12"',
        'nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux" and platform_machine == "x86_64"',
        'optree>=0.13.0; extra == "optree"',
    )
    return Pip([item("torch", "2.10.0", *torch_needs)], [item("filelock", "4.2"), item("Sym_Py", "1.14")])


@pytest.fixture(scope="module")
def written(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> package.Package:
    return package.write(bundle, tmp_path_factory.mktemp("packages") / "image", run=pip())


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_written(written: package.Package, bundle: Path) -> None:
    assert written.files == (".dockerignore", "Dockerfile", "bundle", "lib", "requirements.txt", "sbom.json")
    assert (written.torch, written.hashes, written.remarks) == ("2.10.0", True, ())
    assert written.platform == "linux/arm64"
    assert reader.read(written.path / "bundle").manifest == files.read_manifest(bundle)
    assert not (written.path / "lib/armopt/passes").is_symlink()
    assert not list(written.path.rglob("__pycache__"))
    assert [p.name for p in written.path.parent.iterdir()] == ["image"]
    code = "import armopt, sys; print(armopt.__file__); import armopt.runtime, armopt.passes"
    env = {**os.environ, "PYTHONPATH": str(written.path / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=written.path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(written.path / "lib"))


def parse(dockerfile: str) -> list[tuple[str, str]]:
    """Instruction and rest of each line; linting only: no Docker daemon is needed."""
    found = []
    for line in dockerfile.splitlines():
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        assert word in INSTRUCTIONS, line
        assert not rest.endswith("\\")
        found.append((word, rest))
    return found


def test_the_dockerfile(written: package.Package) -> None:
    lines = parse((written.path / "Dockerfile").read_text())
    assert lines[0] == ("FROM", "python:3.11-slim")
    for word, rest in lines:
        if word == "COPY":
            assert (written.path / rest.split()[0]).exists()
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(part, str) for part in json.loads(rest))
        if word == "HEALTHCHECK":
            compile(json.loads(rest.partition(" CMD ")[2])[2], "healthcheck", "exec")
    env = dict(part.split("=", 1) for word, rest in lines if word == "ENV" for part in shlex.split(rest))
    assert env["DNNL_DEFAULT_FPMATH_MODE"] == "BF16"
    assert "OMP_NUM_THREADS" not in env  # the entry point counts the CPUs of the container
    assert json.loads(dict(lines)["ENTRYPOINT"])[2:6] == ["armopt", "serve", "/app/bundle", "--name"]
    assert dict(lines)["USER"] == "10001:10001"
    assert any("--require-hashes" in rest for word, rest in lines if word == "RUN")
    (allocator,) = (rest for word, rest in lines if word == "RUN" and "apt-get install" in rest)
    assert allocator.startswith("apt-get update && ")
    assert "-y --no-install-recommends libtcmalloc-minimal4 " in allocator
    assert allocator.endswith("&& rm -rf /var/lib/apt/lists/*")
    assert "LD_PRELOAD" not in env  # the entry point finds it
    words = [word for word, _ in lines]
    assert words.count("ENTRYPOINT") == words.count("CMD") == words.count("HEALTHCHECK") == 1


def test_the_image_is_for_the_machine_of_its_kernels(bundle: Path) -> None:
    """Unless another is asked for."""
    from dataclasses import replace

    described = files.read_manifest(bundle)
    for target, made, machine, platform_name in (
        ("graviton3", "x86_64", "aarch64", "linux/arm64"),
        ("host", "x86_64", "x86_64", "linux/amd64"),
        ("host", "aarch64", "aarch64", "linux/arm64"),
    ):
        of_it = replace(
            described, target=target, versions={"machine": made, "torch": "2.11.0+cpu", "torch_build": "cpu"}
        )
        assert package.machine(of_it) == machine
        assert package.torch_version(of_it) == ("2.11.0" if made == machine else "2.10.0")
        text = package.dockerfile(of_it, "model", [machine], hashes=True)
        assert f"docker build --platform {platform_name} " in text
        (check,) = (rest for word, rest in parse(text) if word == "RUN" and "uname" in rest)
        for here, code in ((machine, 0), ("riscv64", 1)):
            done = subprocess.run(
                ["sh", "-c", check.replace("$(uname -m)", here)], capture_output=True, text=True, check=False
            )
            assert done.returncode == code
            assert (f"this image is for {platform_name}" in done.stderr) == bool(code)
    run = pip()
    package.resolve("2.10.0", run, "x86_64")
    assert "--platform=manylinux_2_28_x86_64" in run.calls[1]
    assert "nvidia-cublas-cu12==12.8.4.1" in run.calls[1]


def test_an_image_for_both_kinds_of_machine(bundle: Path, tmp_path: Path) -> None:
    """One Dockerfile: what differs are the wheels, and pip chooses those by their conditions."""
    arm, x86 = (
        [item("torch", "2.10.0", 'nvidia-nccl; platform_machine == "x86_64"')],
        [item("nvidia-nccl", "2.27"), item("numpy", "2.4"), item("orjson", "3.13")],
    )
    other = item("numpy", "2.4")
    other["download_info"]["archive_info"]["hashes"]["sha256"] = SHA[::-1]
    run = Pip(arm, [other, item("orjson", "3.12")], arm, x86)
    made = package.write(bundle, tmp_path / "image", platforms=["linux/amd64", "linux/arm64"], run=run)
    assert made.platform == "linux/arm64,linux/amd64"
    assert any("linux/amd64 portable twins run" in remark for remark in made.remarks)
    lines = (made.path / "requirements.txt").read_text().replace(" \\\n   ", "").splitlines()
    assert sorted(lines[1:]) == [
        f"numpy==2.4 --hash=sha256:{SHA} --hash=sha256:{SHA[::-1]}",
        f'nvidia-nccl==2.27 ; platform_machine == "x86_64" --hash=sha256:{SHA}',
        f'orjson==3.12 ; platform_machine == "aarch64" --hash=sha256:{SHA}',
        f'orjson==3.13 ; platform_machine == "x86_64" --hash=sha256:{SHA}',
        f"torch==2.10.0 --hash=sha256:{SHA}",
    ]
    text = (made.path / "Dockerfile").read_text()
    assert "docker buildx build --platform linux/arm64,linux/amd64 " in text
    (check,) = (rest for word, rest in parse(text) if word == "RUN" and "uname" in rest)
    for here, code in (("aarch64", 0), ("x86_64", 0), ("riscv64", 1)):
        assert subprocess.run(["sh", "-c", check.replace("$(uname -m)", here)], check=False).returncode == code
    parts = json.loads((made.path / "sbom.json").read_text())["components"]
    of = [(each["name"], [at["value"] for at in each.get("properties", ())]) for each in parts]
    assert ("nvidia-nccl", ["linux/amd64"]) in of
    assert ("torch", ["linux/arm64", "linux/amd64"]) in of
    assert sorted(platforms for name, platforms in of if name == "numpy") == [["linux/amd64"], ["linux/arm64"]]
    with pytest.raises(InputError, match="--platform linux/riscv64: is no platform that has wheels"):
        package.write(bundle, tmp_path / "other", platforms=["linux/arm64,linux/riscv64"], run=run)


def test_the_images_user_can_read_it_whatever_the_umask(bundle: Path, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        made = package.write(bundle, tmp_path / "image", hashes=False)
    finally:
        os.umask(mask)
    assert made.path.stat().st_mode & 0o777 == 0o700
    modes = {path: path.stat().st_mode & 0o777 for path in made.path.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


def test_requirements_hold_every_hash_and_nothing_for_another_machine(bundle: Path) -> None:
    run = pip()
    pinned = package.resolve("2.10.0", run)
    assert [p.name for p in pinned] == ["torch", "filelock", "sym-py"]
    text = package.requirements("2.10.0", pinned)
    assert f"torch==2.10.0 \\\n    --hash=sha256:{SHA}\n" in text
    first, second = run.calls
    assert "--no-deps" in first
    assert {"filelock", "sympy>=1.13.3", "numpy", "safetensors", "typer", "gunicorn", "uvicorn"} <= set(second)
    assert not [word for word in second if word.startswith(("nvidia", "setuptools", "optree"))]
    assert "--platform=manylinux_2_28_aarch64" in second


def test_without_a_registry_nothing_is_written(bundle: Path, tmp_path: Path) -> None:
    """A file without hashes is written only where that is asked for."""

    def offline(arguments: Sequence[str]) -> str:
        found = f"(from versions: {', '.join(map(str, range(200)))})"
        said = f"WARNING: retrying\nERROR: No version that fits {found}\nERROR: No matching distribution\n"
        raise subprocess.CalledProcessError(1, "pip", "", said)

    with pytest.raises(
        HostError, match=r"wheels: ERROR: No version that fits ERROR: No matching distribution\. .*--no-hashes"
    ):
        package.write(bundle, tmp_path / "image", run=offline)
    assert not list(tmp_path.iterdir())


def test_without_hashes_the_file_says_so(bundle: Path, tmp_path: Path) -> None:
    made = package.write(bundle, tmp_path / "image", hashes=False)
    assert not made.hashes
    text = (made.path / "requirements.txt").read_text()
    assert "NO HASHES" in text
    assert "armopt package BUNDLE -o DIR" in text
    assert "torch==2.10.0\n" in text
    assert "--require-hashes" not in (made.path / "Dockerfile").read_text()


def test_a_registry_without_hashes_is_refused() -> None:
    broken = item("torch", "2.10.0")
    broken["download_info"] = {"url": "git+https://x", "vcs_info": {}}
    with pytest.raises(HostError, match="no sha256"):
        package.resolve("2.10.0", Pip([broken], []))


@pytest.mark.slow
def test_hashes_are_what_pip_itself_accepts(tmp_path: Path) -> None:
    try:
        pinned = [
            wheel
            for kind in ("aarch64", "x86_64")
            for wheel in package.pins(package.choose(package.pip, ["safetensors==0.8.0"], kind, "--no-deps"), kind)
        ]
    except HostError as error:
        warnings.warn(f"NOT TESTED against a package registry: {error}", stacklevel=2)
        pytest.skip(str(error))
    wanted = tmp_path / "requirements.txt"
    wanted.write_text(package.requirements("2.10.0", pinned))
    options = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    options += ["--python-version=3.11", f"--target={tmp_path / 'x'}"]
    package.pip([*options, "--platform=manylinux2014_x86_64", "--require-hashes", "-r", str(wanted)])
    options += ["--platform=manylinux2014_aarch64"]
    package.pip([*options, "--require-hashes", "-r", str(wanted)])
    wanted.write_text(wanted.read_text().replace(pinned[0].sha256, SHA))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        package.pip([*options, "--require-hashes", "-r", str(wanted)])
    assert "HASH" in refused.value.stderr.upper()


def test_nothing_is_left_where_it_fails(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "put", full)
    with pytest.raises(InputError, match="No space left"):
        package.write(bundle, tmp_path / "image", hashes=False)
    assert list(tmp_path.iterdir()) == []


def test_places_that_do_not_do(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        package.write(bundle, tmp_path, hashes=False)
    with pytest.raises(InputError, match="does not exist"):
        package.write(bundle, tmp_path / "a" / "b", hashes=False)
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="changed or damaged"):
        package.write(broken, tmp_path / "image", hashes=False)
    assert not (tmp_path / "image").exists()


def test_a_zipped_bundle(model: nn.Module, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.zip"
    armopt.optimize(model, (torch.randn(4, 8), torch.ones(1)), output=archive, target="graviton2")
    made = package.write(archive, tmp_path / "image", hashes=False)
    assert reader.read(made.path / "bundle").manifest.target == "graviton2"
    assert "DNNL_DEFAULT_FPMATH_MODE" not in (made.path / "Dockerfile").read_text()


def test_the_torch_of_an_arm_machine_is_kept(bundle: Path) -> None:
    from dataclasses import replace

    described = files.read_manifest(bundle)
    arm = {"machine": "aarch64", "torch": "2.11.0+cpu", "torch_build": "cpu"}
    assert package.torch_version(replace(described, versions=arm)) == "2.11.0"
    assert package.torch_version(replace(described, versions={**arm, "torch_build": "cuda 13.0"})) == "2.10.0"
    assert package.torch_version(replace(described, versions={**arm, "machine": "x86_64"})) == "2.10.0"


def test_the_bill_of_materials(written: package.Package) -> None:
    found = json.loads((written.path / "sbom.json").read_text())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.5")
    parts = {each["name"]: each for each in found["components"]}
    assert parts.keys() == {"armopt", "torch", "filelock", "sym-py"}
    assert parts["torch"]["purl"] == "pkg:pypi/torch@2.10.0"
    assert parts["torch"]["hashes"] == [{"alg": "SHA-256", "content": SHA}]
    described = files.read_manifest(written.path / "bundle")
    assert found["metadata"]["component"]["hashes"][0]["content"] == described.digest


@pytest.mark.full
def test_the_bill_of_materials_follows_its_schema(written: package.Package) -> None:
    validators = pytest.importorskip(
        "cyclonedx.validation.json", reason="pip install 'cyclonedx-python-lib[json-validation]'"
    )
    from cyclonedx.schema import SchemaVersion

    validator = validators.JsonStrictValidator(SchemaVersion.V1_5)
    text = (written.path / "sbom.json").read_text()
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace("SHA-256", "SHA-257")) is not None


def test_the_manifest_for_kserve_fits_the_image(written: package.Package) -> None:
    manifest = yaml.safe_load((Path(__file__).parents[2] / "examples/kserve.yaml").read_text())
    (container,) = manifest["spec"]["predictor"]["containers"]
    lines = dict(parse((written.path / "Dockerfile").read_text()))
    assert container["ports"][0]["containerPort"] == int(lines["EXPOSE"])
    assert str(container["securityContext"]["runAsUser"]) == lines["USER"].split(":")[0]
    for probe in ("readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == int(lines["EXPOSE"])
        assert asked["path"].startswith("/v2/health/")
    assert container["readinessProbe"]["httpGet"]["path"] in lines["HEALTHCHECK"]


# --- its server, on loopback ----------------------------------------------------------------------

#: Runs a command with a read-only root file system but /dev/shm and /run, as user 10001, without rights.
READ_ONLY = "mount -o remount,ro,bind / && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs /run && exec "
AS_USER = "setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all"
BASE, TOP = sys.base_prefix, Path(*Path(sys.base_prefix).parts[:2])
#: Where Python itself lies in a folder that is closed to others, as /root is, it alone is shown in that folder.
SHOWN = (
    f"mount --bind {BASE} /mnt && mount -t tmpfs -o mode=755 tmpfs {TOP} && mkdir -p {BASE} && mount --move /mnt {BASE}"
)
OPENED = "" if TOP.stat().st_mode & 1 else f"{SHOWN} && "
#: The second reads files with the rights of whoever runs the tests.
CONFINED = [
    ["unshare", *options, "sh", "-c", f'{before}{READ_ONLY}{last} -- "$@"', "sh"]
    for options, before, last in (
        (["--mount"], OPENED, AS_USER),
        (["--user", "--map-root-user", "--mount"], "", "unshare --user --map-user=10001 --map-group=10001"),
    )
]


def clean_python(folder: Path) -> Path:
    """A virtual environment that has what requirements.txt names, and what that needs: links to what is here."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    lines = package.requirements(torch.__version__, ()).splitlines()
    wanted, seen = [line for line in lines if not line.startswith("#")], set[str]()
    while wanted:
        need = Requirement(wanted.pop())
        if need.name in seen or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        seen.add(need.name)
        found = metadata.distribution(need.name)
        wanted += found.requires or []
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(found.locate_file(name))
    return folder / "bin/python"


@pytest.fixture(scope="module")
def image_server(written: package.Package) -> Iterator[Running]:
    """The image's entry point and command, run as they stand, in a place of which the image's user may read all."""
    lines = parse((written.path / "Dockerfile").read_text())
    env = dict(part.split("=", 1) for word, rest in lines if word == "ENV" for part in shlex.split(rest))
    words = [*json.loads(dict(lines)["ENTRYPOINT"]), *json.loads(dict(lines)["CMD"])]
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        image = shutil.copytree(written.path, Path(place) / "app")
        python = clean_python(Path(place) / "python")
        env |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(image / "lib")}
        here = {"python": str(python), "/app/bundle": str(image / "bundle"), "0.0.0.0": "127.0.0.1", "8080": "0"}
        command, confined = [here.get(word, word) for word in words], list[str]()
        for confined in [*CONFINED, []]:
            # by a shell: what setpriv itself starts is found with the rights from before
            check = [*confined, "sh", "-c", 'exec "$0" -c "import torch, armopt"', str(python)]
            if not subprocess.run(check, env=env, cwd="/", capture_output=True, check=False).returncode:
                break
        if confined is not CONFINED[0]:
            what = "NOT TESTED as user 10001" + ("" if confined else " and with a read-only root file system")
            warnings.warn(f"{what}: this machine has no such rights, or keeps its files from other users", stacklevel=2)
        with running([*confined, *command], env, image) as server:
            server.wait_until_ready()
            yield server
            status = Path(f"/proc/{server.workers()[0]}/status").read_text()
            assert not confined or "CapEff:\t0000000000000000" in status
            assert confined is not CONFINED[0] or "Uid:\t10001\t10001\t10001\t10001" in status
    assert server.process.returncode == 0


@pytest.mark.slow
def test_the_image_serves_from_its_own_files(image_server: Running, written: package.Package, model: nn.Module) -> None:
    assert image_server.name == "bundle"
    x = torch.randn(4, 8)
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [4, 8], "data": x.tolist()},
        {"name": "scale", "datatype": "FP32", "shape": [1], "data": [2.0]},
    ]
    status, found = image_server.ask("POST", "/v2/models/bundle/infer", json.dumps({"inputs": inputs}).encode())
    assert status == 200, found
    with torch.no_grad():
        wanted = model(x, torch.tensor([2.0]))
    outputs = {each["name"]: torch.tensor(each["data"]).reshape(each["shape"]) for each in found["outputs"]}
    assert outputs.keys() == {"y", "parts.0", "parts.1"}
    # products of BF16 operands: 8 bits of mantissa, 8 terms
    torch.testing.assert_close(outputs["y"], wanted["y"], rtol=0.02, atol=0.05)
    (loaded,) = image_server.said("^loaded ")
    assert "/app/bundle, version" in loaded["event"]


@pytest.mark.slow
def test_the_images_health_check(image_server: Running, written: package.Package) -> None:
    lines = parse((written.path / "Dockerfile").read_text())
    command = json.loads(dict(lines)["HEALTHCHECK"].partition(" CMD ")[2])
    for port, good in ((image_server.port, True), (1, False)):
        code = command[2].replace(":8080/", f":{port}/")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert (done.returncode == 0) == good


# --- the commands ---------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app.app, list(arguments))


def test_the_package_command(bundle: Path, tmp_path: Path) -> None:
    done = invoke("package", str(bundle), "-o", str(tmp_path / "image"), "--no-hashes", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["hashes"], found["torch"]) == (False, "2.10.0")
    assert "no hashes, as asked for" in done.stderr


@pytest.mark.parametrize("form", ["shell", "docker", "systemd", "k8s", "json"])
def test_env_of_a_bundle_and_of_a_framework(bundle: Path, form: str) -> None:
    of_bundle = invoke("env", str(bundle), "--format", form)
    assert of_bundle.exit_code == 0, of_bundle.output
    assert "DNNL_DEFAULT_FPMATH_MODE" in of_bundle.stdout
    tensorflow = invoke("env", "--framework", "tensorflow", "--target", "graviton3", "--threads", "4", "--format", form)
    assert "TF_ENABLE_ONEDNN_OPTS" in tensorflow.stdout
    assert "OMP_NUM_THREADS" in tensorflow.stdout
    assert "TF_" not in invoke("env", "--target", "graviton3", "--format", form).stdout


@pytest.mark.parametrize("form", ["shell", "docker", "systemd", "k8s", "json"])
def test_env_names_this_hosts_allocator_where_this_host_runs_the_command(
    bundle: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "allocator_library", lambda: "/usr/lib/liballocator.so.4")
    assert "LD_PRELOAD" not in invoke("env", str(bundle), "--format", form).stdout  # the bundle is for another machine
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    # an image has files of its own
    for words in ([str(bundle)], ["--target", "graviton3"]):
        said = invoke("env", *words, "--format", form).stdout
        assert ("/usr/lib/liballocator.so.4" in said) == (form not in ("docker", "k8s"))
    assert "LD_PRELOAD" not in invoke("env", "--framework", "tensorflow", "--format", form).stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("env",), "no bundle given"),
        (("env", "BUNDLE", "--target", "graviton3"), "has its own framework and target"),
        (("env", "--framework", "jax"), "unknown framework"),
        (("env", "--target", "gravitron3"), "Did you mean"),
        (("run", "BUNDLE"), "no command"),
        (("run", "BUNDLE", "--", "no-such-command"), "there is no such command"),
        (("run", "--target", "graviton3", "BUNDLE", "--", "true"), "there is no BUNDLE"),
    ],
)
def test_wrong_usage(bundle: Path, arguments: Sequence[str], text: str) -> None:
    words = [str(bundle) if word == "BUNDLE" else word for word in arguments]
    done = subprocess.run([sys.executable, "-m", "armopt", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stdout == ""


SHOW = "import os, json; print(json.dumps(dict(os.environ)))"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "DNNL_", "ONEDNN_", "TF_", "LRU_"))}
    command = [sys.executable, "-m", "armopt", "run", *arguments]
    return subprocess.run(command, env={**clean, **environ}, capture_output=True, text=True, check=False)


def test_run_sets_the_environment_of_a_bundle(bundle: Path) -> None:
    done = run(str(bundle), "--threads", "1", "--", sys.executable, "-c", SHOW, MINE="kept")
    found = json.loads(done.stdout)
    assert found["DNNL_DEFAULT_FPMATH_MODE"] == "BF16"
    assert found["OMP_NUM_THREADS"] == "1"
    assert found["MINE"] == "kept"
    assert done.stderr == ""


def test_run_for_tensorflow(bundle: Path) -> None:
    words = ("--framework", "tensorflow", "--target", "graviton3", "--threads", "1")
    found = json.loads(run(*words, "--", sys.executable, "-c", SHOW).stdout)
    assert found["TF_ENABLE_ONEDNN_OPTS"] == found["TF_NUM_INTRAOP_THREADS"] == "1"
    assert "LRU_CACHE_CAPACITY" not in found


def test_run_shares_the_host_among_workers(bundle: Path) -> None:
    cpus = len(os.sched_getaffinity(0))
    words = ("--target", "graviton3", "--workers", str(cpus), "--", sys.executable, "-c", SHOW)
    assert json.loads(run(*words).stdout)["OMP_NUM_THREADS"] == "1"
    # what was chosen before counts as long as it fits
    assert json.loads(run(*words, OMP_NUM_THREADS="1000").stdout)["OMP_NUM_THREADS"] == "1"
    many = run("--target", "graviton3", "--threads", "1000", "--", sys.executable, "-c", SHOW)
    assert json.loads(many.stdout)["OMP_NUM_THREADS"] == "1000"
    assert "OMP_NUM_THREADS=1000 on" in many.stderr


def test_run_removes_what_would_win(bundle: Path) -> None:
    done = run("--target", "graviton3", "--", sys.executable, "-c", SHOW, ONEDNN_DEFAULT_FPMATH_MODE="strict")
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in json.loads(done.stdout)
    assert "ONEDNN_DEFAULT_FPMATH_MODE=strict would win" in done.stderr


def test_the_commands_own_options_and_exit_code_pass_through() -> None:
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = run("--target", "graviton3", "--", sys.executable, "-c", code, "--threads", "x", "--", "-h")
    assert (done.returncode, done.stdout.strip()) == (7, "['--threads', 'x', '--', '-h']")


def test_signals_reach_the_command_because_it_has_the_process() -> None:
    code = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print(os.getpid(), flush=True)\nwhile True: time.sleep(0.05)"
    )
    command = [sys.executable, "-m", "armopt", "run", "--target", "graviton3", "--", sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert int(process.stdout.readline()) == process.pid
    time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=30) == 9
