"""Workers on emulated cores, one per (core, PyTorch, environment) for the whole session."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from armopt.emulation import EmulatedWorker, PreparedFolder
from armopt.errors import HostError

REQUIRE_VARIABLE = "ARMOPT_REQUIRE_ARM64"  # "1": an unprepared folder fails these tests, it does not skip them
HERE = Path(__file__).parent

RequireTorch = Callable[[str], PreparedFolder]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.arm64)


@pytest.fixture(scope="session")
def require_torch() -> RequireTorch:
    """require_torch("2.10.0"): the prepared folder, or a loud skip."""

    def require(torch_version: str) -> PreparedFolder:
        folder = PreparedFolder.default()
        try:
            folder.require(torch_version)
        except HostError as error:
            if os.environ.get(REQUIRE_VARIABLE) == "1":
                pytest.fail(str(error), pytrace=False)
            warnings.warn(f"NOT TESTED on Arm: {error}", stacklevel=2)
            pytest.skip(str(error))
        return folder

    return require


@pytest.fixture(scope="session")
def arm64(require_torch: RequireTorch) -> Iterator[Callable[..., EmulatedWorker]]:
    """arm64(cpu, torch_version, env): the session's worker on that core, started by its first call."""
    workers: dict[object, EmulatedWorker] = {}

    def worker(
        cpu: str = "graviton3", torch_version: str = "2.10.0", env: Mapping[str, str] | None = None
    ) -> EmulatedWorker:
        require_torch(torch_version)
        key = (cpu, torch_version, tuple(sorted((env or {}).items())))
        if key not in workers:
            workers[key] = EmulatedWorker(cpu, torch_version, env)
        return workers[key]

    yield worker
    for started in workers.values():
        started.close()
