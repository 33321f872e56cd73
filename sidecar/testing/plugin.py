"""pytest fixtures with a real Kafka and Postgres; loaded by itself where `sidecar` is installed, and costs nothing until a fixture is used.

`local_stack`     one per test run, shared by all xdist workers; down when the run ends, however it ends
`make_database`   call it: a fresh, empty database's DSN, dropped after the test
`database`        one such DSN
`own_stack`       a private stack, for a test that kills, restarts or scans it
`unique`          call it with a name: that name, never used before (topics, groups, tenants)
`topic_prefix`    a prefix of this test alone
`softhsm`         PKCS#11 tokens in software; `softhsm.make_token()` gives the URI of a new one

SIDECAR_TEST_BOOTSTRAP and SIDECAR_TEST_DSN name servers to use in place of ours (the role must be allowed to create databases).
"""

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sidecar.testing.local_stack import LocalStack
    from sidecar.testing.softhsm import SoftHsm

_DIRECTORY = pytest.StashKey[Path]()


def _shared(config: pytest.Config) -> tuple[Path, int]:
    """Where the run's stack is, and the process whose end is the end of the run: the same answer in the controller and in its workers."""
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None:
        return Path(worker["sidecar_stack"]), int(worker["sidecar_owner"])
    if _DIRECTORY not in config.stash:
        config.stash[_DIRECTORY] = Path(tempfile.gettempdir(), f"sidecar-test-{os.getpid()}-{secrets.token_hex(4)}")
    return config.stash[_DIRECTORY], os.getpid()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist, in the controller, before a worker starts."""
    directory, owner = _shared(node.config)
    node.workerinput.update(sidecar_stack=str(directory), sidecar_owner=owner)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Also after Ctrl-C. (After SIGKILL the stack's watcher does it.)"""
    directory, owner = _shared(session.config)
    if owner != os.getpid() or not directory.exists():
        return
    from sidecar.testing import local_stack

    failed = int(exitstatus) not in (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED)
    local_stack.down(directory, wipe=True, keep_logs=failed)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if failed and reporter is not None:
        reporter.write_line(f"\nlogs of the local stack: {directory}")


@pytest.fixture(scope="session")
def local_stack(request: pytest.FixtureRequest) -> "LocalStack":
    """The run's broker and database. Share it politely: own topics (`unique`), own databases (`make_database`), no restarts."""
    from dataclasses import replace

    from sidecar.testing.local_stack import LocalStack, up

    directory, owner = _shared(request.config)
    bootstrap, dsn = os.environ.get("SIDECAR_TEST_BOOTSTRAP", ""), os.environ.get("SIDECAR_TEST_DSN", "")
    if bootstrap and dsn:
        return LocalStack(dir=directory, bootstrap_servers=bootstrap, dsn=dsn)
    stack = up(directory, fast=True, kafka=not bootstrap, postgres=not dsn, owner_pid=owner)
    return replace(stack, bootstrap_servers=bootstrap or stack.bootstrap_servers, dsn=dsn or stack.dsn)


@pytest.fixture
def own_stack() -> Iterator["LocalStack"]:
    """A stack that nobody else sees, with fsync as in earnest. `sidecar.testing.local_stack` kills and starts its parts."""
    from sidecar.testing.local_stack import down, up

    directory = Path(tempfile.gettempdir(), f"sidecar-own-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield up(directory, owner_pid=os.getpid())
    finally:
        down(directory, wipe=True)


@pytest.fixture
def make_database(local_stack: "LocalStack") -> Iterator[Callable[[], str]]:
    """A function that makes an empty database and returns its DSN. All of them are dropped after the test, whoever is still connected."""
    from urllib.parse import urlsplit

    made: list[str] = []

    def make() -> str:
        name = f"test_{secrets.token_hex(6)}"
        _execute(local_stack.dsn, f"CREATE DATABASE {name} TEMPLATE template0")
        made.append(name)
        return urlsplit(local_stack.dsn)._replace(path=f"/{name}").geturl()

    yield make
    for name in made:
        _execute(local_stack.dsn, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(make_database: Callable[[], str]) -> str:
    """The DSN of a fresh, empty database of this test alone."""
    return make_database()


@pytest.fixture
def unique() -> Callable[[str], str]:
    """A function that makes a name unique: `unique("users")` is `users-5f3a…`, another one at each call."""
    return lambda name: f"{name}-{secrets.token_hex(5)}"


@pytest.fixture
def topic_prefix(unique: Callable[[str], str]) -> str:
    """A prefix for all topics of one test; it ends in a dot."""
    return unique("t") + "."


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> "SoftHsm":
    """This process's SoftHSM2, with no token yet."""
    from sidecar.testing.softhsm import SoftHsm

    return SoftHsm(tmp_path_factory.mktemp("softhsm"))


def _execute(dsn: str, sql: str) -> None:
    """In a thread with a loop of its own: fixtures of async tests may find theirs running."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import asyncpg

    async def execute() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(execute())).result()
