"""Certificates on record, and what goes into one, as SQL."""

# ruff: noqa: S608 (statements are put together from constants; what comes from outside is a parameter)

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sidecar.core.command import Command, stored
from sidecar.core.model import Scope
from sidecar.postgres import residue
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped
from sidecar.postgres.residue import Shown
from sidecar.postgres.scopes import messages_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A receipt of a shred that has no certificate. `stood_at`: when the receipt was written, by the database's clock."""

    command_id: UUID
    status: str
    receipt: dict[str, Any]
    stood_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the database knows of a shred beside its receipt."""

    command: Command
    issuer: str | None
    payload_sha256: bytes
    residue: list[Shown]
    set_aside_until: datetime | None
    audit_hash: bytes | None
    previous: UUID | None
    salt: bytes | None


async def due(connection: Connection, since: datetime | None, limit: int = 100) -> list[Due]:
    """Oldest first, of receipts from then on; none of a command that was only tried out, or taken back within its grace."""
    with mapped():
        rows = await connection.fetch(
            """SELECT r.command_id, r.status, r.body, r.created_at FROM receipts r
               WHERE r.status IN ('inaccessible', 'complete') AND r.body ->> 'receipt_id' = r.receipt_id::text
                 AND ($1::timestamptz IS NULL OR r.created_at > $1)
                 AND NOT EXISTS (SELECT FROM certificates c WHERE c.command_id = r.command_id AND c.status = r.status)
                 AND NOT EXISTS (SELECT FROM commands c WHERE c.command_id = r.command_id AND c.result ? 'restored')
               ORDER BY r.created_at LIMIT $2""",
            since,
            limit,
        )
    return [Due(command_id=r["command_id"], status=r["status"], receipt=r["body"], stood_at=r["created_at"]) for r in rows]


async def newest_receipt(connection: Connection) -> datetime | None:
    """When the last receipt was written; None without any."""
    with mapped():
        found: datetime | None = await connection.fetchval("SELECT max(created_at) FROM receipts WHERE status IN ('inaccessible', 'complete')")
    return found - timedelta(minutes=10) if found else None  # a transaction that began earlier may commit later


async def record(connection: Connection, due: Due) -> Record:
    position = due.receipt["audit"]
    with mapped():
        command = await connection.fetchrow("SELECT payload, payload_sha256, issuer FROM commands WHERE command_id = $1", due.command_id)
        until = await connection.fetchval("SELECT max(until) FROM quarantined_keys WHERE command_id = $1", due.command_id)
        digest = await connection.fetchval("SELECT hash FROM audit_log WHERE writer = $1 AND seq = $2", position["writer"], position["seq"])
        before = await connection.fetchrow(
            "SELECT certificate_id, salt FROM certificates WHERE command_id = $1 ORDER BY created_at DESC LIMIT 1", due.command_id
        )
    assert command is not None  # noqa: S101 (a receipt of a shred has its command)
    return Record(
        command=stored(command["payload"]),
        issuer=command["issuer"],
        payload_sha256=command["payload_sha256"],
        residue=await residue.of_command(connection, due.command_id),
        set_aside_until=until,
        audit_hash=digest,
        previous=before["certificate_id"] if before else None,
        salt=before["salt"] if before else None,
    )


async def sample(connection: Connection, scope: Scope, stood_at: datetime, limit: int) -> list[tuple[str, int]]:
    """Encrypted events of the scope, picked at random: -> (stream, position)."""
    with mapped():
        rows = await connection.fetch(
            f"""SELECT m.stream_id, m.stream_position FROM messages m WHERE {messages_of(scope)} AND m.data_encrypted IS NOT NULL
                AND m.created_at <= $3 ORDER BY random() LIMIT $4""",
            scope.tenant,
            scope.id,
            stood_at,
            limit,
        )
    return [(row["stream_id"], row["stream_position"]) for row in rows]


async def outstanding(connection: Connection, command_id: UUID) -> bool:
    """Whether anything of a shred is left to do."""
    with mapped():
        return bool(
            await connection.fetchval(
                """SELECT EXISTS (SELECT FROM residue WHERE command_id = $1 AND state <> 'done')
                     OR EXISTS (SELECT FROM quarantined_keys WHERE command_id = $1)""",
                command_id,
            )
        )


async def insert(connection: Connection, certificate_id: UUID, command_id: UUID, status: str, envelope: bytes, salt: bytes) -> bool:
    """False if it was there."""
    with mapped():
        done = await connection.execute(
            """INSERT INTO certificates (certificate_id, command_id, status, envelope, salt, created_at)
               VALUES ($1, $2, $3, $4, $5, clock_timestamp()) ON CONFLICT DO NOTHING""",
            certificate_id,
            command_id,
            status,
            envelope,
            salt,
        )
    return str(done) == "INSERT 0 1"


async def listed(connection: Connection, *, tenant: str | None = None, command_id: UUID | None = None) -> list[dict[str, Any]]:
    """Without the envelopes and without the salts, newest last. `taken_back`: the shred was, within its grace, after it had its certificate."""
    with mapped():
        rows = await connection.fetch(
            """SELECT e.certificate_id, e.command_id, c.tenant_id, e.status, e.created_at, coalesce(c.result ? 'restored', false) AS taken_back FROM certificates e JOIN commands c USING (command_id)
               WHERE ($1::text IS NULL OR c.tenant_id = $1) AND ($2::uuid IS NULL OR e.command_id = $2) ORDER BY e.created_at, e.certificate_id""",
            tenant,
            command_id,
        )
    return [dict(row) for row in rows]


async def find(connection: Connection, identity: UUID) -> dict[str, Any] | None:
    """A certificate by its id, or the newest of the command with that id, with envelope, salt and the command's payload."""
    with mapped():
        row = await connection.fetchrow(
            """SELECT e.*, c.payload FROM certificates e JOIN commands c USING (command_id) WHERE e.certificate_id = $1 OR e.command_id = $1
               ORDER BY e.created_at DESC LIMIT 1""",
            identity,
        )
    return dict(row) if row else None
