"""What an image needs: Dockerfile, requirements with hashes, bill of materials, armopt itself, the bundle.

Written whole or not at all: into a temporary folder beside its place, then renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from armopt import environment, targets
from armopt._version import __version__
from armopt.bundle import manifest, reader
from armopt.bundle.files import KEPT
from armopt.deploy.server.settings import Settings
from armopt.errors import BundleError, HostError, InputError
from armopt.files import folder_beside, follow_umask, put

DOCKERFILE, REQUIREMENTS, BUNDLE, LIBRARY, MATERIALS = "Dockerfile", "requirements.txt", "bundle", "lib", "sbom.json"
PYTHON = "3.11"
PORT = 8080
#: Debian's package of what environment.allocator_library prefers; since trixie a name that another provides.
ALLOCATOR = "libtcmalloc-minimal4"
#: What serving a bundle imports, beyond torch and armopt itself.
_NEEDED = (
    *("msgspec", "numpy", "safetensors", "typer", "packaging"),
    *("starlette", "uvicorn", "httptools", "uvloop", "gunicorn", "orjson", "prometheus-client"),
)
#: The user of the image: no user of the host has its number.
_USER = 10001
#: Docker's names of the machines that images are for.
PLATFORMS = {"aarch64": "linux/arm64", "x86_64": "linux/amd64"}
_WHEELS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_MINUTES = 10
_HASHED = "# Wheels from the package registry; pip refuses any other file (--require-hashes).\n"
#: What pip adds to a name that it has no fitting version of: hundreds of numbers.
_VERSIONS = r" ?\(from versions: [^)]*\)"

#: Runs a command and returns what it wrote; raises OSError or subprocess.SubprocessError.
Runner = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True)
class Pinned:
    """One wheel: a package, its version, the sha256 of its file, and the machine that it was chosen for."""

    name: str
    version: str
    sha256: str
    machine: str = "aarch64"


@dataclass(frozen=True, slots=True)
class Package:
    """What was written.

    Attributes:
        path: The folder.
        files: In it, at the top.
        platform: What the image can be built for, by Docker's names, with commas between.
        torch: The version that the image installs.
        hashes: Whether requirements.txt has them.
        remarks: What is worth knowing.
    """

    path: Path
    files: tuple[str, ...]
    platform: str
    torch: str
    hashes: bool
    remarks: tuple[str, ...]


def write(
    bundle: Path, output: Path, *, hashes: bool = True, platforms: Sequence[str] = (), run: Runner | None = None
) -> Package:
    """Writes the folder of an image that serves a bundle.

    Args:
        bundle: A folder or a zip; all its hashes are checked.
        output: The folder to make.
        hashes: Whether to ask the package registry for the hashes of the wheels.
        platforms: What the image can be built for, by Docker's names; by default, the machine of the bundle's kernels.
        run: How pip is run; for tests.

    Raises:
        InputError: The place can't take it, or there is no such platform.
        BundleError: The bundle is damaged, or says something that can't go into these files.
        HostError: Hashes were asked for, and no package registry gave them.
    """
    described = reader.read(bundle).manifest
    if described.is_module:
        raise InputError(
            'is of kind "module": it needs the Python of its model, which only its own image can bring',
            where=str(bundle),
            hint="Copy the bundle into that image and start it with: armopt run BUNDLE -- python serve.py",
        )
    parent = output.absolute().parent
    if output.exists():
        raise InputError("is there already", where=str(output), hint="Choose another place with -o")
    if not parent.is_dir():
        raise InputError("the folder to write into does not exist", where=str(parent), hint=f"mkdir -p {parent}")
    torch, kinds = torch_version(described), machines(platforms) or (machine(described),)
    pinned = _all_wheels(torch, run or pip, kinds) if hashes else ()
    texts = {
        DOCKERFILE: dockerfile(described, model_name(bundle), kinds, hashes=bool(pinned)),
        REQUIREMENTS: requirements(torch, pinned),
        ".dockerignore": "**/__pycache__\n",
    }
    if pinned:
        texts[MATERIALS] = bill_of_materials(described, model_name(bundle), pinned)
    try:
        with folder_beside(output) as folder:
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            _copy_bundle(bundle, folder / BUNDLE)
            _copy_armopt(folder / LIBRARY / "armopt")
            for path in folder.rglob("*"):  # COPY keeps modes, and the image's user owns none of it
                path.chmod(0o755 if path.is_dir() else 0o644)
            follow_umask(folder, 0o777)
            put(folder, output)
    except OSError as error:
        raise InputError(
            f"can't write the package: {error.strerror or error}",
            where=str(output),
            hint="Nothing was left behind. Free some space or choose another place with -o",
        ) from error
    files = tuple(sorted(entry.name for entry in output.iterdir()))
    return Package(output, files, _named(kinds), torch, bool(pinned), tuple(_remarks(described, kinds, bool(pinned))))


def machine(described: manifest.Manifest) -> str:
    """The machine of a bundle's kernels; on another, their portable twins run."""
    made = described.versions.get("machine", "")
    return made if described.target == targets.HOST and made in PLATFORMS else "aarch64"


def machines(platforms: Sequence[str]) -> tuple[str, ...]:
    """The machines of platforms by Docker's names.

    Raises:
        InputError: There is no image for one of them.
    """
    kinds = {name: kind for kind, name in PLATFORMS.items()}
    names = [name for given in platforms for name in given.split(",")]
    for name in names:
        if name not in kinds:
            raise InputError(f"is no platform that has wheels: {' and '.join(kinds)} have", where=f"--platform {name}")
    return tuple(kind for name, kind in kinds.items() if name in names)


def _remarks(described: manifest.Manifest, kinds: Sequence[str], hashes: bool) -> Iterator[str]:
    """What is worth knowing."""
    if not hashes:
        yield f"{REQUIREMENTS} has no hashes, as asked for"
    if not described.accuracy.passed:
        yield "the bundle failed its accuracy gate: it is not meant to be deployed"
    if "x86_64" in kinds:
        yield f"torch's wheels for {PLATFORMS['x86_64']} bring CUDA, which takes gigabytes"
    if other := [PLATFORMS[kind] for kind in kinds if kind != machine(described)]:
        yield f"on {', '.join(other)} portable twins run: the same rounding, but not the speed"


def _named(kinds: Iterable[str]) -> str:
    return ",".join(PLATFORMS[kind] for kind in kinds)


def torch_version(described: manifest.Manifest) -> str:
    """The torch for the image: the bundle's, if made on such a machine, else the last Arm CPU wheel on PyPI."""
    made, kind = described.versions.get("torch", ""), machine(described)
    plain = kind != "aarch64" or described.versions.get("torch_build") == "cpu"
    if not made or not plain or described.versions.get("machine") != kind:
        return environment.CPU_TORCH
    try:
        return Version(made).public
    except InvalidVersion:
        raise BundleError(
            f"was made with torch {made!r}, which is no version", where=manifest.NAME, hint="Make the bundle again"
        ) from None


def dockerfile(described: manifest.Manifest, name: str, kinds: Sequence[str], *, hashes: bool) -> str:
    """The Dockerfile: the environment as ENV lines, and `armopt serve` as the entry point, which sets the threads.

    Args:
        described: The bundle's manifest.
        name: Of the model in URLs.
        kinds: The machines that it can be built for.
        hashes: Whether requirements.txt has them.
    """
    wanted = environment.recorded(described.environment, manifest.NAME)
    if described.target != targets.HOST:
        wanted |= environment.wanted(targets.load(described.target))
    check = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/v2/health/ready', timeout=50)"
    command = ["python", "-m", "armopt", "serve", f"/app/{BUNDLE}", "--name", name]
    command += ["--host", "0.0.0.0", "--port", str(PORT)]
    install = f"pip install --no-cache-dir --only-binary=:all:{' --require-hashes' if hashes else ''}"
    build = f"docker {'build' if len(kinds) == 1 else 'buildx build'} --platform {_named(kinds)}"
    return f"""\
# For {described.target}, by armopt {__version__}. Run it with options of armopt serve behind it:
#   {build} -t model .
#   docker run --rm --read-only --cap-drop ALL -p {PORT}:{PORT} model --workers 2
FROM python:{PYTHON}-slim

RUN case "$(uname -m)" in {"|".join(kinds)}) ;; *) echo "this image is for {_named(kinds)}: {build} ." >&2; exit 1; esac
# `armopt serve` preloads it: oneDNN makes many small objects on each call
RUN apt-get update && apt-get install -y --no-install-recommends {ALLOCATOR} && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY {REQUIREMENTS} ./
RUN {install} -r {REQUIREMENTS}
COPY {LIBRARY} ./{LIBRARY}
COPY {BUNDLE} ./{BUNDLE}

{environment.render(wanted, "docker")}\
ENV PYTHONPATH="/app/{LIBRARY}" PYTHONDONTWRITEBYTECODE="1"
USER {_USER}:{_USER}
EXPOSE {PORT}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=60s --start-period=120s CMD {json.dumps(["python", "-c", check])}
ENTRYPOINT {json.dumps(command)}
CMD []
"""


def model_name(bundle: Path) -> str:
    """The name of a bundle's model in URLs, as ``armopt serve`` makes it from the bundle's place."""
    return Settings(str(bundle)).model_name


def bill_of_materials(described: manifest.Manifest, name: str, pinned: Sequence[Pinned]) -> str:
    """All that is installed, and the bundle, as CycloneDX 1.5: names, versions, hashes; nothing of the base image."""
    wheels = []
    for (name_, version, sha256), kinds in _grouped(pinned, lambda p: (p.name, p.version, p.sha256)):
        wheels.append(
            {
                "type": "library",
                "name": name_,
                "version": version,
                "purl": f"pkg:pypi/{name_}@{version}",
                "hashes": [{"alg": "SHA-256", "content": sha256}],
                "properties": [{"name": "armopt:platform", "value": PLATFORMS[kind]} for kind in kinds],
            }
        )
    model = {
        "type": "machine-learning-model",
        "name": name,
        "version": described.digest[:12],
        "hashes": [{"alg": "SHA-256", "content": described.digest}],
    }
    tool = {"type": "application", "name": "armopt", "version": __version__}
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": model, "tools": {"components": [tool]}},
        "components": [{"type": "library", "name": "armopt", "version": __version__}, *wheels],
    }
    return json.dumps(content, indent=1) + "\n"


def requirements(torch: str, pinned: Sequence[Pinned]) -> str:
    """requirements.txt: each wheel with its hash, and its machine where one alone has it; or how to add hashes."""
    if pinned:
        every, text = {each.machine for each in pinned}, _HASHED
        for (name, version), kinds in _grouped(pinned, lambda p: (p.name, p.version)):
            only = "" if set(kinds) == every else f' ; platform_machine == "{kinds[0]}"'
            hashes = {each.sha256 for each in pinned if (each.name, each.version) == (name, version)}
            text += (
                f"{name}=={version}{only}" + "".join(f" \\\n    --hash=sha256:{sha}" for sha in sorted(hashes)) + "\n"
            )
        return text
    return (
        "# NO HASHES: no package registry could be asked when this was written, so pip takes what it finds.\n"
        "# To add them, where a registry can be reached: armopt package BUNDLE -o DIR\n"
        + "".join(f"{line}\n" for line in (f"torch=={torch}", *_NEEDED))
    )


def _grouped(pinned: Iterable[Pinned], key: Callable[[Pinned], Any]) -> Iterator[tuple[Any, list[str]]]:
    """What wheels have in common, sorted, and the machines of those that have it."""
    for found, group in groupby(sorted(pinned, key=key), key):
        yield found, sorted({each.machine for each in group})


def resolve(torch: str, run: Runner, machine: str = "aarch64") -> tuple[Pinned, ...]:
    """Every wheel that the image needs, with its hash, as pip would choose them on a server of that kind.

    pip can choose files for another platform. But it evaluates the conditions on a package's needs for this machine.
    Those of torch differ (CUDA on x86), so they are evaluated here.

    Raises:
        HostError: pip is missing, or reaches no registry.
    """
    first = choose(run, [f"torch=={torch}"], machine, "--no-deps")
    there: dict[str, str] = {name: str(value) for name, value in default_environment().items()}
    there |= {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0", "extra": ""}
    there |= {"platform_machine": machine, "platform_system": "Linux", "sys_platform": "linux"}
    needs = []
    for line in (line for item in first for line in item["metadata"].get("requires_dist", [])):
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate(there):
            needs.append(f"{need.name}{need.specifier}")
    return tuple(pins([*first, *choose(run, [*needs, *_NEEDED], machine)], machine))


def _all_wheels(torch: str, run: Runner, kinds: Iterable[str]) -> tuple[Pinned, ...]:
    return tuple(wheel for kind in kinds for wheel in resolve(torch, run, kind))


def choose(run: Runner, wanted: Sequence[str], machine: str, *options: str) -> list[Mapping[str, Any]]:
    """The wheels that pip would install on a server of that kind, as its report has them.

    Raises:
        HostError: pip is missing, or reaches no registry.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *("install", "--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:"),
            *("--python-version", PYTHON, "--implementation", "cp", "--target", str(Path(folder) / "none")),
            *(f"--platform={name}_{machine}" for name in _WHEELS),
            *("--report", str(report), *options, *wanted),
        ]
        try:
            run(command)
            content = json.loads(report.read_text())
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            lines = [line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:]
            raise HostError(
                f"pip found no {machine} wheels: {re.sub(_VERSIONS, '', ' '.join(lines))}",
                where=" ".join(wanted),
                hint="Try again where a package registry can be reached, or write the package with --no-hashes",
            ) from None
    found: list[Mapping[str, Any]] = content["install"]
    return found


def pins(items: Iterable[Mapping[str, Any]], machine: str) -> list[Pinned]:
    """Wheels of pip's report, each with its hash.

    Raises:
        HostError: The registry gives none.
    """
    found: dict[str, Pinned] = {}
    for item in items:
        name, version = canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]
        archive = item["download_info"].get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise HostError("the registry gives no sha256", where=f"{name} {version}", hint="Try another registry")
        found[name] = Pinned(name, version, digest, machine)
    return list(found.values())


def pip(arguments: Sequence[str]) -> str:
    """Runs this Python's pip, and returns what it wrote."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * _MINUTES, check=True)
    return done.stdout


def _copy_bundle(bundle: Path, place: Path) -> None:
    """All that a server needs: without the FP32 original, which is for `validate`."""
    if bundle.is_dir():
        shutil.copytree(bundle, place, ignore=shutil.ignore_patterns(*KEPT))
        return
    with zipfile.ZipFile(bundle) as archive:  # its names were checked against the manifest
        archive.extractall(place, [name for name in archive.namelist() if name not in KEPT])


def _copy_armopt(place: Path) -> None:
    """armopt as it runs here; the folder of passes is a link in a checkout, and a folder in the copy."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(Path(os.path.abspath(__file__)).parents[1], place, symlinks=False, ignore=unwanted)
