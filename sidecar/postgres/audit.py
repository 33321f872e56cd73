"""Audit rows, written in the transaction of the act."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from zlib import crc32

from sidecar.core.audit import GENESIS, AuditRow, find_break, link, tenant_ref
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped


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


async def verify(connection: Connection) -> AsyncIterator[tuple[str, int, str | None]]:
    """For each writer: its name, its newest seq, and what is wrong with its chain (None: it holds)."""
    with mapped():
        writers = await connection.fetch("SELECT writer, max(seq) AS newest FROM audit_log GROUP BY writer ORDER BY writer")
    for entry in writers:
        with mapped():
            rows = await connection.fetch("SELECT * FROM audit_log WHERE writer = $1 ORDER BY seq", entry["writer"])
        yield entry["writer"], entry["newest"], find_break(_row(row) for row in rows)
