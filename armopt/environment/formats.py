"""Variables as text for a shell, Docker, systemd or Kubernetes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict

from armopt.environment.variables import Variable
from armopt.errors import InputError

FORMATS = ("shell", "docker", "systemd", "k8s", "json")


def render(chosen: Mapping[str, Variable], format: str) -> str:
    """The variables as text for `format`, quoted for it, each with its reason as a comment.

    Args:
        chosen: See :func:`armopt.environment.wanted`.
        format: ``shell`` (to be sourced), ``docker`` (ENV lines), ``systemd`` (for [Service]), ``k8s`` (items
            of a container's ``env:``), ``json``.

    Raises:
        InputError: An unknown format, or a name or value that the format can't carry.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}", hint=f"Known are {', '.join(FORMATS)}")
    for name, variable in chosen.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError("not a name for an environment variable", where=repr(name))
        if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", variable.value):
            raise InputError("the value holds a line break or another control character", where=name)
    if format == "json":
        return json.dumps({n: asdict(v) for n, v in sorted(chosen.items())}, indent=2) + "\n"
    quote = _QUOTES[format]
    return "".join(
        f"# {' '.join(variable.why.split())}\n{quote(name, variable.value)}\n"
        for name, variable in sorted(chosen.items())
    )


def _docker(name: str, value: str) -> str:
    escaped = re.sub(r'(["\\$])', r"\\\1", value)
    return f'ENV {name}="{escaped}"'


def _systemd(name: str, value: str) -> str:
    # Environment= expands specifiers (%h) but no variables: systemd.exec(5), systemd.syntax(7).
    escaped = re.sub(r'(["\\])', r"\\\1", value).replace("%", "%%")
    return f'Environment="{name}={escaped}"'


_QUOTES: Mapping[str, Callable[[str, str], str]] = {
    "shell": lambda name, value: f"export {name}={shlex.quote(value)}",
    "docker": _docker,
    "systemd": _systemd,
    # A JSON string is a YAML double-quoted one; unquoted, `false` and `64` wouldn't be strings.
    "k8s": lambda name, value: f"- name: {name}\n  value: {json.dumps(value, ensure_ascii=False)}",
}
