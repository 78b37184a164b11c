"""Workers on emulated cores, one per (core, PyTorch, environment) for the whole session."""

import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from armopt.emulation import TORCH_VERSIONS, EmulatedResult, EmulatedWorker, PreparedFolder
from armopt.emulation.prepare import prepare
from armopt.errors import HostError
from armopt.targets.emulated import core_named
from tests.arm64 import bundles

HERE = Path(__file__).parent
JOBS = "tests.arm64.jobs_bundles"
PRELOAD = "tests.arm64.preload"

RequireTorch = Callable[[str], PreparedFolder]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.arm64)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, ())]
    lines = [value for report in reports for name, value in report.user_properties if name == "figure"]
    if lines and config.option.verbose > 0:
        terminalreporter.section("on the emulated cores")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """figure(line): what is worth knowing of a run that no assertion tells; shown at the end with ``-v``."""
    return partial(record_property, "figure")


@pytest.fixture(scope="session")
def require_torch(pytestconfig: pytest.Config) -> RequireTorch:
    """require_torch("2.10.0"): the prepared folder, or a loud skip. With ``--arm64`` it is prepared here."""
    is_required, is_full = pytestconfig.getoption("--arm64"), pytestconfig.getoption("--full")
    if is_required:
        releases = (*TORCH_VERSIONS, pytestconfig.getoption("--newest-torch")) if is_full else TORCH_VERSIONS
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            prepare(releases, report=lambda line: print(line, file=sys.stderr, flush=True), tensorflow=is_full)

    def require(torch_version: str) -> PreparedFolder:
        folder = PreparedFolder.default()
        try:
            folder.require(torch_version)
        except HostError as error:
            if is_required:
                raise
            warnings.warn(f"NOT TESTED on Arm: {error}", stacklevel=2)
            pytest.skip(str(error))
        return folder

    return require


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where probes keep what they find: what an earlier session found is no proof."""
    return {"ARMOPT_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="session")
def arm64(require_torch: RequireTorch, verdicts: dict[str, str]) -> Iterator[Callable[..., EmulatedWorker]]:
    """arm64(env): the session's Graviton3 with that environment, for what no server has; started by its first call."""
    workers: dict[object, EmulatedWorker] = {}

    def worker(env: dict[str, str]) -> EmulatedWorker:
        folder = require_torch("2.10.0")
        key = tuple(sorted(env.items()))
        if key not in workers:
            workers[key] = EmulatedWorker("neoverse-v1", "2.10.0", env | verdicts, folder=folder, preload=PRELOAD)
        return workers[key]

    yield worker
    for started in workers.values():
        started.close()


# --- servers: processes started as `armopt run BUNDLE -- python …` starts them ------------------


@dataclass(frozen=True)
class Host:
    """A kind of server: what it is, which PyTorch it has ("" is the newest), and what its environment lacks."""

    cpu: str
    torch_version: str = "2.10.0"
    lacks: tuple[str, ...] = ()


HOSTS = {
    "graviton3": Host("graviton3"),
    "graviton3-torch2.13": Host("graviton3", "2.13.0"),
    "graviton3-no-fpmath": Host("graviton3", lacks=("DNNL_DEFAULT_FPMATH_MODE", "LD_PRELOAD")),
    "yitian710": Host("yitian710"),
    "graviton2": Host("graviton2"),
    "graviton3-newest": Host("graviton3", ""),
    "yitian710-newest": Host("yitian710", ""),
    "graviton2-newest": Host("graviton2", ""),
}


@dataclass(frozen=True)
class Server:
    """A worker in the environment of a bundle, and the queue that it shares with the other servers."""

    host: Host
    worker: EmulatedWorker
    queue: ThreadPoolExecutor

    def submit(self, job: str, **arguments: Any) -> "Future[EmulatedResult]":
        """Queues a job."""
        return self.queue.submit(self.worker.call, job, **arguments)

    def call(self, job: str, **arguments: Any) -> EmulatedResult:
        """Runs a job at once, beside those that are queued."""
        return self.worker.call(job, **arguments)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], bundles.Made]:
    """made(example, target): a bundle, made on this machine once."""
    folder = tmp_path_factory.mktemp("bundles")
    known: dict[tuple[str, str], bundles.Made] = {}

    def make(example: str, target: str) -> bundles.Made:
        if (example, target) not in known:
            known[example, target] = bundles.make(example, target, folder)
        return known[example, target]

    return make


@pytest.fixture(scope="session")
def server(
    pytestconfig: pytest.Config,
    require_torch: RequireTorch,
    made: Callable[[str, str], bundles.Made],
    verdicts: dict[str, str],
) -> Iterator[Callable[[str], Server]]:
    """server(name): one of HOSTS, with the environment that `armopt run` gives on it."""
    started: dict[str, Server] = {}
    asked: dict[str, EmulatedWorker] = {}  # to know that environment, no torch is needed
    queue = ThreadPoolExecutor(2)

    def start(name: str) -> Server:
        if name not in started:
            host = HOSTS[name]
            host = replace(host, torch_version=host.torch_version or pytestconfig.getoption("--newest-torch"))
            folder = require_torch(host.torch_version)
            if host.torch_version not in asked:
                asked[host.torch_version] = EmulatedWorker(
                    core_named(host.cpu).name, host.torch_version, preload="json", folder=folder
                )
            bundle = made("convnet", host.cpu).path
            env = asked[host.torch_version].call(f"{JOBS}:run_environment", bundle=bundle, threads=1).value
            env = {name: value for name, value in env.items() if name not in host.lacks} | verdicts
            worker = EmulatedWorker(core_named(host.cpu).name, host.torch_version, env, folder=folder, preload=PRELOAD)
            started[name] = Server(host, worker, queue)
        return started[name]

    yield start
    queue.shutdown(wait=False, cancel_futures=True)
    for worker in (*asked.values(), *(server.worker for server in started.values())):
        worker.close()
