"""Connections: one setting for all, transaction-mode poolers refused."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import orjson

from sidecar.core.errors import ConfigurationError
from sidecar.postgres.errors import mapped

if TYPE_CHECKING:  # generic for the type checker only
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool


def _encode_json(value: Any) -> str:
    """Bytes are JSON already."""
    return value.decode() if isinstance(value, bytes) else orjson.dumps(value).decode()


async def _prepare(connection: Any) -> None:
    await connection.set_type_codec("jsonb", encoder=_encode_json, decoder=orjson.loads, schema="pg_catalog")


async def connect(dsn: str, *, application_name: str = "sidecar", command_timeout: float | None = None) -> Connection:
    """A direct connection. Raises StoreUnavailable. The guard's locks live in it: no pooler in transaction mode between."""
    with mapped():
        connection = await asyncpg.connect(
            dsn, server_settings={"application_name": application_name[:63]}, timeout=10, command_timeout=command_timeout, record_class=asyncpg.Record
        )
        await _prepare(connection)
    return connection


@asynccontextmanager
async def connected(dsn: str, *, application_name: str = "sidecar") -> AsyncIterator[Connection]:
    """A connection for the length of a block."""
    connection = await connect(dsn, application_name=application_name)
    try:
        yield connection
    finally:
        await connection.close()


async def open_pool(
    dsn: str, *, application_name: str = "sidecar", max_size: int = 4, check: Callable[[Connection], Awaitable[None]] | None = None
) -> Pool:  # fmt: skip
    """`check` is asked of every new connection: what it raises, whoever wanted the connection gets."""

    async def prepare(connection: Any) -> None:
        await _prepare(connection)
        if check is not None:
            await check(connection)

    with mapped():
        return await asyncpg.create_pool(
            dsn, min_size=0, max_size=max_size, init=prepare, timeout=10, server_settings={"application_name": application_name[:63]}
        )


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction on a connection of the pool, for the length of a block. Raises StoreUnavailable, or Conflict at commit."""
    with mapped():
        async with pool.acquire() as held, held.transaction():
            connection: Any = held
            yield connection


async def refuse_transaction_pooling(connection: Connection) -> None:
    """PgBouncer in transaction mode hands the session, and with it the guard's locks, to somebody else."""
    with mapped():
        seen = {await connection.fetchval("SELECT pg_backend_pid()") for _ in range(3)}
        listed = await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = pg_backend_pid() AND backend_start IS NOT NULL")
        await connection.execute("SELECT pg_advisory_lock_shared(4, 1)")
        kept = await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND classid = 4 AND objid = 1"
        )
        await connection.execute("SELECT pg_advisory_unlock_shared(4, 1)")
    if len(seen) != 1 or not kept or not listed:
        raise ConfigurationError(
            "Postgres is reached through a pooler in transaction mode, where session locks are lost",
            where="postgres.dsn",
            mend="name Postgres itself, or a pooler in session mode",
        )


def without_password(dsn: str) -> str:
    """A DSN for people's eyes."""
    parts = urlsplit(dsn)
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    return urlunsplit((parts.scheme, f"{user}@{host}" if user else host, parts.path, "", ""))
