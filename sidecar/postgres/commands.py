"""The inbox (`commands`) and the outbox (`receipts`). Every function runs in the caller's transaction unless it says otherwise.

A command's way is `step`; `advance` moves it by compare-and-set, so that of two executors, one of which does not know yet that it
lost its lock, only one takes a step. A receipt is written in the transaction of the step that it is about, and published later.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sidecar.core.errors import Conflict
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

CHANNEL: Final = "sidecar_commands"
TIMER_ISSUER: Final = "timer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command on its way. `facts` are what its steps found out so far (`commands.result`)."""

    command_id: UUID
    op: str
    tenant: str
    payload: bytes
    step: str | None
    facts: dict[str, Any]
    received_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command as it stands in the inbox."""

    payload_sha256: bytes
    facts: dict[str, Any]
    receipt: dict[str, Any] | None


async def find(connection: Connection, command_ids: Collection[UUID]) -> dict[UUID, Entry]:
    """Those of the ids that are in the inbox."""
    with mapped():
        rows = await connection.fetch(
            "SELECT command_id, payload_sha256, result, receipt FROM commands WHERE command_id = ANY ($1)", list(command_ids)
        )
    return {r["command_id"]: Entry(payload_sha256=r["payload_sha256"], facts=r["result"] or {}, receipt=r["receipt"]) for r in rows}


async def tenant_exists(connection: Connection, tenant: str) -> bool:
    with mapped():
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM tenants WHERE tenant_id = $1)", tenant))


async def insert(
    connection: Connection, *, command_id: UUID, op: str, tenant: str | None, payload: bytes, digest: bytes, issuer: str, status: str,
    facts: dict[str, Any], receipt: dict[str, Any], at: datetime,
) -> None:  # fmt: skip
    """A new command, accepted or rejected, with its receipt. `payload` is the record as it came, signatures and all; `digest` tells whether
    another record is the same command. Raises Conflict if the id came in between."""
    with mapped():
        await connection.execute(
            """INSERT INTO commands (command_id, op, tenant_id, payload, payload_sha256, issuer, status, result, receipt, received_at, finished_at)
               VALUES ($1, $2, $3, $4, $5, $6, $7::text, $8, $9, $10, CASE WHEN $7::text = 'rejected' THEN $10::timestamptz END)""",
            command_id,
            op,
            tenant,
            payload,
            digest,
            issuer,
            status,
            facts,
            receipt,
            at,
        )
        await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
    await add_receipt(connection, receipt)


async def read_up_to(connection: Connection, topic_id: str) -> dict[int, int]:
    """{partition: offset} of the control topic, behind the last record that is here."""
    with mapped():
        rows = await connection.fetch("SELECT partition, next_offset FROM control_cursors WHERE topic_id = $1", topic_id)
    return {row["partition"]: row["next_offset"] for row in rows}


async def remember_read(connection: Connection, topic_id: str, ends: dict[int, int]) -> None:
    with mapped():
        await connection.execute(
            """INSERT INTO control_cursors AS c SELECT $1, * FROM unnest($2::int[], $3::bigint[]) ON CONFLICT (topic_id, partition)
               DO UPDATE SET next_offset = greatest(c.next_offset, excluded.next_offset)""",
            topic_id,
            list(ends),
            list(ends.values()),
        )


async def in_outbox(connection: Connection, receipt_ids: Collection[UUID]) -> set[UUID]:
    """Those of the ids that are in the outbox."""
    with mapped():
        rows = await connection.fetch("SELECT receipt_id FROM receipts WHERE receipt_id = ANY ($1)", list(receipt_ids))
    return {row["receipt_id"] for row in rows}


async def add_receipts(connection: Connection, outgoing: Sequence[tuple[UUID, dict[str, Any]]]) -> int:
    """Bodies into the outbox, each once per outbox id, which is another than the receipt's where a stored one goes out again; -> how many were new."""
    rows = [{"id": str(outbox_id), "body": body} for outbox_id, body in outgoing]
    with mapped():
        done = await connection.execute(
            # clock_timestamp: the order of publication is the order of the steps, not of the beginnings of their transactions
            """INSERT INTO receipts (receipt_id, command_id, status, body, created_at)
               SELECT (r ->> 'id')::uuid, (r -> 'body' ->> 'command_id')::uuid, r -> 'body' ->> 'status', r -> 'body', clock_timestamp()
               FROM jsonb_array_elements($1::jsonb) r ON CONFLICT DO NOTHING""",
            rows,
        )
    return int(done.rpartition(" ")[2])


async def add_receipt(connection: Connection, body: dict[str, Any]) -> None:
    """Into the outbox, once per id."""
    await add_receipts(connection, [(UUID(body["receipt_id"]), body)])


async def advance(
    connection: Connection, job: Job, step: str, facts: dict[str, Any] | None = None, *, receipt: dict[str, Any] | None = None,
    finished: bool = False,
) -> Job:  # fmt: skip
    """The job behind its step; with a receipt where the step gives one. Raises Conflict if somebody else took the step."""
    with mapped():
        row = await connection.fetchrow(
            """UPDATE commands SET step = $3, result = coalesce(result, '{}') || $4::jsonb, receipt = coalesce($5::jsonb, receipt),
                 status = coalesce($5::jsonb ->> 'status', status), finished_at = CASE WHEN $6 THEN clock_timestamp() END
               WHERE command_id = $1 AND step IS NOT DISTINCT FROM $2 AND finished_at IS NULL RETURNING result""",
            job.command_id,
            job.step,
            step,
            facts or {},
            receipt,
            finished,
        )
    if row is None:
        raise Conflict(f"command {job.command_id} was taken on by another control process")
    if receipt is not None:
        await add_receipt(connection, receipt)
    return Job(
        command_id=job.command_id,
        op=job.op,
        tenant=job.tenant,
        payload=job.payload,
        step=step,
        facts=row["result"],
        received_at=job.received_at,
    )


async def complete(connection: Connection, command_id: UUID, body: dict[str, Any]) -> None:
    """The last receipt of a shred that was carried out long ago; once."""
    with mapped():
        await connection.execute("UPDATE commands SET receipt = $2, status = $2::jsonb ->> 'status' WHERE command_id = $1", command_id, body)
    await add_receipt(connection, body)


async def database_time(connection: Connection) -> datetime:
    """By whose clock keys are made."""
    with mapped():
        now: datetime = await connection.fetchval("SELECT now()")
    return now


async def tenants_waiting(connection: Connection) -> list[str]:
    """Tenants with commands to carry out, longest waiting first."""
    with mapped():
        rows = await connection.fetch("SELECT tenant_id FROM commands WHERE finished_at IS NULL GROUP BY tenant_id ORDER BY min(received_at)")
    return [row["tenant_id"] for row in rows]


async def next_job(connection: Connection, tenant: str) -> Job | None:
    """What is to be done next for a tenant: shreds, holds and readmissions before all others, in the order they came; one that was begun first of all.

    But a shred that deletes plain events (`noticed`: its keys are gone, what is left may take long) lets the next one past, if that is a shred too.
    """
    with mapped():
        row = await connection.fetchrow(
            """WITH waiting AS (SELECT *, op IN ('shred', 'hold', 'release', 'readmit') AS urgent FROM commands WHERE tenant_id = $1 AND finished_at IS NULL),
               numbered AS (SELECT *, row_number() OVER (PARTITION BY urgent, step IS NULL ORDER BY received_at, command_id) AS turn FROM waiting)
               SELECT * FROM numbered ORDER BY NOT urgent,
                 CASE WHEN step <> 'noticed' THEN 0 WHEN op = 'shred' AND step IS NULL AND turn = 1 THEN 1 WHEN step = 'noticed' THEN 2 ELSE 3 END, turn
               LIMIT 1""",
            tenant,
        )
    return (
        None
        if row is None
        else Job(
            command_id=row["command_id"],
            op=row["op"],
            tenant=row["tenant_id"],
            payload=row["payload"],
            step=row["step"],
            facts=row["result"] or {},
            received_at=row["received_at"],
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpublished:
    """A receipt that is not on the topic, as far as we know."""

    outbox_id: UUID
    command_id: UUID | None
    body: dict[str, Any]
    created_at: datetime


async def unpublished(connection: Connection, limit: int = 500) -> list[Unpublished]:
    """The oldest receipts that are not on the topic, as far as we know."""
    with mapped():
        rows = await connection.fetch(
            "SELECT receipt_id, command_id, body, created_at FROM receipts WHERE published_at IS NULL ORDER BY created_at, receipt_id LIMIT $1", limit
        )
    return [Unpublished(outbox_id=r["receipt_id"], command_id=r["command_id"], body=r["body"], created_at=r["created_at"]) for r in rows]


async def mark_published(connection: Connection, outbox_ids: list[UUID]) -> None:
    """They are on the topic."""
    with mapped():
        statement = "UPDATE receipts SET published_at = clock_timestamp() WHERE receipt_id = ANY ($1) AND published_at IS NULL"
        await connection.execute(statement, outbox_ids)


async def receipts(connection: Connection, *, command_id: UUID | None = None) -> list[dict[str, Any]]:
    """Bodies, newest last."""
    with mapped():
        rows = await connection.fetch(
            """SELECT body FROM receipts WHERE ($1::uuid IS NULL OR command_id = $1) AND body ->> 'receipt_id' = receipt_id::text
               ORDER BY created_at, receipt_id""",
            command_id,
        )
    return [row["body"] for row in rows]


async def refusals(connection: Connection, command_id: UUID) -> set[str]:
    """The ids of negative receipts for records that named the command and did not become it; none once a record did."""
    with mapped():
        rows = await connection.fetch(
            "SELECT receipt_id FROM receipts r WHERE command_id = $1 AND NOT EXISTS (SELECT FROM commands WHERE command_id = $1)", command_id
        )
    return {str(row["receipt_id"]) for row in rows}


async def receipt(connection: Connection, identity: UUID) -> dict[str, Any] | None:
    """A receipt by its id, or the newest of the command with that id."""
    with mapped():
        own: dict[str, Any] | None = await connection.fetchval("SELECT body FROM receipts WHERE receipt_id = $1", identity)
        newest: dict[str, Any] | None = own or await connection.fetchval("SELECT receipt FROM commands WHERE command_id = $1", identity)
        if newest is None:  # refused before it became a command
            newest = await connection.fetchval("SELECT body FROM receipts WHERE command_id = $1 ORDER BY created_at DESC LIMIT 1", identity)
    return newest


async def receipt_with(connection: Connection, command_id: UUID, status: str) -> dict[str, Any] | None:
    """The command's receipt of that status."""
    with mapped():
        body: dict[str, Any] | None = await connection.fetchval(
            "SELECT body FROM receipts WHERE command_id = $1 AND status = $2 AND body ->> 'receipt_id' = receipt_id::text", command_id, status
        )
    return body


async def written_at(connection: Connection, receipt_id: UUID) -> datetime:
    """By the database's clock."""
    with mapped():
        at: datetime = await connection.fetchval("SELECT created_at FROM receipts WHERE receipt_id = $1", receipt_id)
    return at
