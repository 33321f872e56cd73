"""What a class of very many streams costs: its dry run, query by query, and how long its shred holds the guard.

SIDECAR_TEST_DSN=… python -m tests.benchmarks.large_classes 1000000      a server on which databases may be made
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from sidecar import preview
from sidecar.core.model import Scope, ScopeKind
from sidecar.postgres import holds, migrations, scopes, shreds, tenants
from sidecar.postgres.connection import connected
from tests.benchmarks import large_tenants


async def timed(what: str, call: Awaitable[Any]) -> None:
    started = time.perf_counter()
    found = await call
    sys.stdout.write(f"{what:28} {time.perf_counter() - started:7.3f} s  {str(found)[:60]}\n")


async def measure(dsn: str, streams: int) -> None:
    await large_tenants.seed_all(dsn, [streams])
    scope, command_id = Scope(tenant=large_tenants.name(streams), kind=ScopeKind.CLASS, id="Bench"), uuid4()
    asked = {
        "keys": scopes.count_deks,
        "streams": scopes.count_streams,
        "events": preview._events,
        "holds": holds.overlapping,
        "shared": preview._shared,
    }
    async with connected(dsn) as connection:
        for name, query in asked.items():
            async with connection.transaction():
                await timed(f"dry run: {name}", query(connection, scope))

        async def close() -> None:
            async with connection.transaction():
                await tenants.lock(connection, scope.tenant)
                await holds.refuse_held(connection, scope)
                await shreds.refuse_shared(connection, scope)
                await shreds.fence(connection, scope, command_id)
                await tenants.next_epoch(connection, scope.tenant, shredding=False)

        async def empty() -> int:
            async with connection.transaction():
                return (await shreds.take_keys(connection, scope, command_id, None)).count

        await timed("under the guard: closed", close())
        await timed("outside of it: emptied", empty())


async def main(streams: int) -> None:
    server, name = os.environ["SIDECAR_TEST_DSN"], f"large_{uuid4().hex[:8]}"
    dsn = urlsplit(server)._replace(path=f"/{name}").geturl()
    async with connected(server) as administrator:
        await administrator.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            async with connected(dsn) as connection:
                await migrations.migrate(connection)
            await measure(dsn, streams)
        finally:
            await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
