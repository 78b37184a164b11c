"""``armopt package``: what an image needs to serve a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armopt.cli import options
from armopt.cli.output import Output

if TYPE_CHECKING:
    from armopt.deploy.package import Package


def package(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to make.")],
    hashes: Annotated[
        bool, typer.Option("--hashes/--no-hashes", help="Ask the package registry for the hashes of all wheels.")
    ] = True,
    platforms: Annotated[
        list[str] | None,
        typer.Option(
            "--platform",
            metavar="NAME",
            help="What the image can be built for: linux/arm64, linux/amd64, or both. "
            "[default: the machine of the bundle's kernels]",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write what an image needs: Dockerfile with a health check, requirements with hashes, SBOM, the bundle."""
    from armopt.deploy import package

    out = Output(as_json)
    written = package.write(bundle, output, hashes=hashes, platforms=platforms or ())
    for remark in written.remarks:
        out.note(f"armopt: {remark}")
    out.result(_to_json(written), lambda: _text(written))


def _to_json(written: Package) -> dict[str, Any]:
    return {
        "package": str(written.path),
        "files": list(written.files),
        "platform": written.platform,
        "torch": written.torch,
        "hashes": written.hashes,
        "remarks": list(written.remarks),
    }


def _text(written: Package) -> str:
    hashes = "with" if written.hashes else "WITHOUT"
    build = "docker buildx build" if "," in written.platform else "docker build"
    return (
        f"Wrote {written.path}: {', '.join(written.files)}; torch {written.torch}, requirements {hashes} hashes.\n\n"
        f"Next:  {build} --platform {written.platform} -t model {written.path}"
    )
