"""``armopt env``: what to set before Python starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armopt.cli import options
from armopt.cli.output import Output

if TYPE_CHECKING:
    from armopt.environment.variables import Variable

Framework = Annotated[
    str, typer.Option("--framework", help="Without a BUNDLE: pytorch or tensorflow.", show_default=False)
]
Target = Annotated[str, typer.Option("--target", help="Without a BUNDLE: the product, graviton3 by default; or host.")]


def env(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle: a folder, or a zip of it.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="shell, docker, systemd, k8s or json.")] = "shell",
    framework: Framework = "",
    target: Target = "",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="OMP_NUM_THREADS; left open if not given.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print the environment that a bundle, or a framework on a target, wants: for a shell, Docker, systemd, k8s."""
    from armopt import environment

    chosen = wanted(bundle, framework, target, threads)
    if form in ("docker", "k8s"):
        chosen.pop(environment.PRELOAD, None)  # an image has files of its own, among which `armopt run` looks
    Output(as_json).text(environment.render(chosen, "json" if as_json else form))


def wanted(bundle: Path | None, framework: str, target: str, threads: int | None) -> dict[str, Variable]:
    """The variables that a bundle, or a framework on a target, wants of this host's build, if it is for this host.

    Raises:
        InputError: Neither is given, or both are.
    """
    from armopt.errors import InputError

    if bundle is not None:
        if framework or target:
            raise InputError("a bundle has its own framework and target", hint="Leave out --framework and --target")
        return _of_bundle(bundle, threads)
    if not framework and not target:
        raise InputError("no bundle given", hint="Give a BUNDLE, or e.g. --framework tensorflow --target graviton3")
    return _of_framework(framework, target, threads)


def _of_framework(framework: str, target: str, threads: int | None) -> dict[str, Variable]:
    import platform

    from armopt import environment, targets

    here = platform.machine() == "aarch64" or target == targets.HOST
    chosen = environment.wanted(
        targets.load(target or "graviton3"),
        threads=threads,
        build=environment.installed() if here else None,
        framework=framework or "pytorch",
        allocator=environment.allocator_library() if here else "",
    )
    return environment.only_read(chosen, environment.package_folder(framework)) if here else chosen


def _of_bundle(bundle: Path, threads: int | None) -> dict[str, Variable]:
    import platform

    from armopt import environment, targets
    from armopt.bundle import files

    manifest = files.read_manifest(bundle)
    kernels = {node.kernel for plan in manifest.plan for node in plan.nodes}
    here = manifest.machine == platform.machine()
    chosen = environment.recorded(manifest.environment, str(bundle))
    chosen |= environment.wanted(
        targets.load(manifest.target),
        threads=threads,
        build=environment.installed() if here else None,
        left_to_aten=bool(manifest.refused) or any(kernel.startswith("aten") for kernel in kernels),
        allocator=environment.allocator_library() if here else "",
    )
    return environment.only_read(chosen, environment.package_folder()) if here else chosen
