"""``armopt env``: what to set before Python starts."""

from __future__ import annotations

from typing import Annotated

import typer

from armopt.cli import options, sink


def env(
    bundle: options.BundlePath,
    form: Annotated[str, typer.Option("--format", help="shell, docker, systemd, k8s or json.")] = "shell",
    as_json: options.Json = False,
) -> None:
    """Print the environment that a bundle wants, for a shell, Docker, systemd or Kubernetes."""
    from armopt import environment
    from armopt.bundle import reader

    manifest = reader.read_manifest(bundle)
    variables = {name: environment.Variable(e["value"], e["why"]) for name, e in manifest.environment.items()}
    text = environment.render(variables, "json" if as_json else form)
    sink.Sink(as_json).text(text)
