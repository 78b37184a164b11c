"""The serving process: ``armopt serve`` sets its environment and becomes it. Its one argument is the settings."""

from __future__ import annotations

import sys

import msgspec

from armopt.deploy.server.settings import Settings
from armopt.deploy.server.shared import shared_metrics
from armopt.errors import ArmoptError, HostError


def main() -> None:
    """Serves, or says why it can't."""
    try:
        settings = msgspec.json.decode(sys.argv[1], type=Settings)
        with shared_metrics():
            try:
                from armopt.deploy.server.workers import serve
            except ModuleNotFoundError as error:
                hint = "Install it with: pip install 'armopt[serve]'"
                raise HostError(f"{error.name} is missing", hint=hint) from None
            serve(settings)
    except ArmoptError as error:
        print(f"armopt: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
