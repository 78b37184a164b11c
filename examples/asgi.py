"""The ASGI application of a bundle, for a server that you run already.

    cd examples
    armopt run BUNDLE -- uvicorn --factory asgi:app --workers 2
    armopt run BUNDLE -- gunicorn --worker-class asgi --workers 2 'asgi:app()'

with BUNDLE=/path/of/BUNDLE in the environment. `armopt serve` has more: one copy of the weights in all workers, reload.
"""

from __future__ import annotations

import os

from starlette.types import ASGIApp

from armopt.deploy.server.app import Service
from armopt.deploy.server.served import prepare
from armopt.deploy.server.settings import Settings


def app() -> ASGIApp:
    settings = Settings(os.environ["BUNDLE"])
    return Service(prepare(settings), settings).app
