"""Audit rows, written in the transaction of the act."""

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from zlib import crc32

from sidecar.core.audit import GENESIS, AuditRow, Chain, link, tenant_ref
from sidecar.core.errors import ConfigurationError
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

AT_ONCE: Final = 500
"""Rows in memory while chains are checked. More are slower: the garbage collector looks at all of them."""


async def append(
    connection: Connection, *, writer: str, at: datetime, action: str, actor: str, tenant: str | None, details: dict[str, Any]
) -> AuditRow:
    """Add a row to the writer's chain; the caller is in a transaction. A lock per writer keeps the chain a chain."""
    return (await append_all(connection, writer=writer, at=at, action=action, actor=actor, tenant=tenant, details=[details]))[0]


async def append_all(
    connection: Connection, *, writer: str, at: datetime, action: str, actor: str, tenant: str | None, details: Sequence[dict[str, Any]]
) -> list[AuditRow]:
    """A row for each of `details`, in one go: one lock, one look at the chain's head, one statement."""
    if not details:
        return []
    with mapped():
        await connection.execute("SELECT pg_advisory_xact_lock(3, $1)", crc32(writer.encode()) - 2**31)
        head = await connection.fetchrow("SELECT seq, hash FROM audit_log WHERE writer = $1 ORDER BY seq DESC LIMIT 1", writer)
        prev, seq = (head["hash"], head["seq"]) if head else (GENESIS, 0)
        ref = tenant_ref(tenant) if tenant is not None else None
        rows: list[AuditRow] = []
        for each in details:
            rows.append(link(prev, writer=writer, seq=(seq := seq + 1), at=at, action=action, actor=actor, tenant_ref=ref, details=each))
            prev = rows[-1].hash
        await connection.executemany(
            "INSERT INTO audit_log (writer, seq, at, action, actor, tenant_ref, details, prev_hash, hash) VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9)",
            [(r.writer, r.seq, r.at, r.action, r.actor, r.tenant_ref, r.details, r.prev_hash, r.hash) for r in rows],
        )
    return rows


def _row(record: Any) -> AuditRow:
    return AuditRow(**dict(record))


async def read(connection: Connection, *, writer: str | None = None, limit: int = 50) -> list[AuditRow]:
    """The newest rows, oldest first."""
    with mapped():
        rows = await connection.fetch(
            "SELECT * FROM audit_log WHERE $1::text IS NULL OR writer = $1 ORDER BY at DESC, writer, seq DESC LIMIT $2", writer, limit
        )
    return [_row(row) for row in reversed(rows)]


async def refuse_a_part(connection: Connection) -> None:
    """A reader sees the rows of one tenant, or none (postgres/roles.py): a chain of which rows are hidden would look broken, or whole.

    Raises ConfigurationError.
    """
    with mapped():
        hidden = await connection.fetchval(
            """SELECT relkind = 'v' AND current_setting('sidecar.tenant', true) IS DISTINCT FROM '*' FROM pg_class WHERE oid = 'audit_log'::regclass"""
        )
    if hidden:
        mend = "a reader with sidecar.tenant=* can verify it, or the control role"
        raise ConfigurationError("this reader sees only a part of the audit trail", where="postgres.dsn_reader", mend=mend)


async def chains(connection: Connection, signed: Mapping[str, Mapping[int, bytes]] | None = None) -> AsyncIterator[Chain]:
    """Each writer's chain, checked to its end, also against what checkpoints signed of it (writer → seq → hash). One snapshot, in chunks."""
    left = dict(signed or {})
    chain: Chain | None = None
    with mapped():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.cursor(
                "SELECT writer, seq, at, action, actor, tenant_ref, details, prev_hash, hash FROM audit_log ORDER BY writer, seq"
            )
            while chunk := await rows.fetch(AT_ONCE):
                for writer, *row in chunk:
                    if chain is None or chain.writer != writer:
                        if chain is not None:
                            chain.end()
                            yield chain
                        chain = Chain(writer, left.pop(writer, {}))
                    chain.add(*row)
    ended = [chain] if chain is not None else []
    ended += [Chain(writer, heads) for writer, heads in sorted(left.items())]  # signed, and no row is left
    for chain in ended:
        chain.end()
        yield chain


async def verify(connection: Connection) -> AsyncIterator[tuple[str, int, str | None]]:
    """For each writer: its name, its newest seq, and what is wrong with its chain (None: it holds). Knows nothing of checkpoints."""
    async for chain in chains(connection):
        yield chain.writer, chain.seq, chain.problem
