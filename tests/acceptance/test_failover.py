"""Promise: after a failover nothing is served before `sidecar ledger replay`; and where there is a standby at all, one must be synchronous.

On a real standby: a base backup of the stack's own Postgres, streaming.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sidecar.core.errors import ConfigurationError, LedgerBehind, StoreUnavailable
from sidecar.core.model import Scope
from sidecar.postgres.connection import connect
from sidecar.postgres.durability import check_standby
from sidecar.settings import load
from sidecar.testing import local_postgres, local_process
from sidecar.testing.local_stack import LocalStack, kill_postgres
from tests.acceptance.world import World, blocking, build, until


@contextmanager
def standby(stack: LocalStack, folder: Path) -> Iterator[str]:
    """A streaming standby of the stack's Postgres; -> its DSN."""
    data, port = folder / "standby", local_process.free_ports(1)[0]
    data.mkdir(mode=0o700)
    programs, unprivileged = local_postgres._binaries(), local_postgres._as_unprivileged(data)
    backup = [*unprivileged, str(programs / "pg_basebackup"), "-d", stack.dsn, "-D", str(data), "-R", "-X", "stream", "-c", "fast"]
    subprocess.run(backup, check=True, capture_output=True, cwd=folder)
    command = [*unprivileged, str(programs / "postgres"), "-D", str(data), f"--port={port}", "--listen_addresses=127.0.0.1"]
    command += ["--unix_socket_directories=", "--max_connections=200"]
    pid = local_process.spawn(command, log=folder / "standby.log", cwd=data)
    try:
        dsn = urlsplit(stack.dsn)._replace(netloc=f"postgres@127.0.0.1:{port}").geturl()
        until(lambda: ask(dsn, "SELECT pg_is_in_recovery()"), "the standby to come up")
        yield dsn
    finally:
        local_postgres.stop(pid)


def ask(dsn: str, sql: str) -> Any:
    async def main() -> Any:
        connection = await connect(dsn)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    try:
        return blocking(main)
    except StoreUnavailable:
        return None


def check(dsn: str, *, production: bool) -> None:
    async def main() -> None:
        connection = await connect(dsn)
        try:
            await check_standby(connection, production=production)
        finally:
            await connection.close()

    blocking(main)


def at(world: World, dsn: str) -> None:
    """The world's processes and readers use another Postgres from here on."""
    document = json.loads(world.config.read_text())
    document["postgres"]["dsn"] = dsn
    world.config.write_text(json.dumps(document))
    world.settings = load(world.config)


def test_a_promoted_standby_is_refused_until_the_replay_and_an_asynchronous_one_at_start(own_stack: LocalStack, tmp_path: Path) -> None:
    world = build(own_stack, own_stack.dsn, tmp_path / "world", "w")
    check(own_stack.dsn, production=True)  # without a standby there is nothing to ask for
    try:
        with standby(own_stack, tmp_path) as second:
            until(lambda: ask(own_stack.dsn, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"), "the standby to stream")
            with pytest.raises(ConfigurationError, match="none is synchronous"):
                check(own_stack.dsn, production=True)
            check(own_stack.dsn, production=False)
            control = world.control()
            assert "none is synchronous" in control.text()
            ask(own_stack.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'")
            ask(own_stack.dsn, "SELECT pg_reload_conf()")
            until(lambda: ask(own_stack.dsn, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"), "it to be synchronous")
            check(own_stack.dsn, production=True)

            data = world.run()
            for tenant in ("acme", "globex"):
                world.event(world.topic("in"), b"old", tenant=tenant, stream="aes-1")
            world.settle()
            assert world.carry_out("shred", Scope.of_tenant("acme"))["status"] == "inaccessible"
            at(world, second)
            with pytest.raises(LedgerBehind, match="standby"):
                world.events("globex")
            kill_postgres(own_stack.dir)
            data.kill()
            control.kill()
            assert ask(second, "SELECT pg_promote(true)")
            ask(second, "ALTER SYSTEM RESET synchronous_standby_names")
            ask(second, "SELECT pg_reload_conf()")
            with pytest.raises(LedgerBehind, match="ledger replay"):
                world.events("globex")
            waits = world.run(wait=False)
            until(lambda: "sidecar ledger replay" in waits.text(), "the data plane to say what it waits for")
            assert sum(world.json("ledger", "replay")["applied"].values()) == 0  # nothing was lost
            waits.wait_ready()
            world.event(world.topic("in"), b"new", tenant="globex", stream="aes-1")
            world.settle()
            assert [row["value"] for row in world.events("globex")] == [b"old", b"new"]
            assert [row["status"] for row in world.events("acme")] == ["erased"]
            world.close()
    finally:
        world.close()
