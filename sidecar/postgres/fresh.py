"""What makes an append possible, on record before or with it: tenants, keys, streams, and which key sealed which positions.

In the caller's transaction, under the guard. Conflict: somebody else made or changed the same; reload, redo.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sidecar.core.audit import tenant_ref
from sidecar.core.errors import Conflict
from sidecar.core.keys import UseLimits
from sidecar.core.streams import Fresh, KeyRef
from sidecar.postgres import audit, seal_epochs
from sidecar.postgres.connection import Connection

_DEK_COLUMNS = ["tenant_id", "key_id", "key_version", "scope_kind", "scope_id", "generation", "kek_version", "key_material", "commitment"]
_DEK_COLUMNS += ["uses_reserved"]
_HISTORY_COLUMNS = ["tenant_id", "stream_id", "key_id", "key_version", "used_from_position"]
_STREAM_COLUMNS = [
    "tenant_id",
    "stream_id",
    "stream_type_class",
    "is_encrypted",
    "encrypted_from_position",
    "encryption_key_id",
    "encryption_algorithm",
]


def _dek_records(fresh: Fresh) -> list[tuple[Any, ...]]:
    out = []
    for row in fresh.deks:
        name, scope = row.name, row.name.scope
        at = (scope.tenant, name.key_id, name.version)
        uses = fresh.reserved.get(at, 0)
        out.append((*at, scope.kind.value, scope.id, name.generation, row.kek_version, row.wrapped, row.commitment, uses))
    return sorted(out, key=lambda r: (r[0], r[3], r[4]))


def _stream_records(fresh: Fresh) -> list[tuple[Any, ...]]:
    out = []
    for tenant, stream in fresh.streams:
        sealed = stream.key or stream.by_subject
        crypto = (True, 1, stream.key and stream.key.key_id, sealed.suite.label) if sealed else (False, None, None, None)
        out.append((tenant, stream.id, stream.stream_class, *crypto))
    return sorted(out, key=lambda r: (r[0], r[1]))


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as the arrays that `unnest` takes."""
    return [[row[n] for row in rows] for n in range(width)]


async def insert(connection: Connection, fresh: Fresh, limits: UseLimits, now: datetime) -> None:
    """In the caller's transaction, under the guard."""
    # sorted, so that two instances that make the same rows wait for each other instead of deadlocking; a unique violation
    # means that the other was first: Conflict, reload, redo
    if fresh.tenants:
        await connection.execute("INSERT INTO tenants (tenant_id) SELECT unnest($1::text[])", sorted(fresh.tenants))
    if fresh.keks:
        await connection.executemany(
            seal_epochs.INSERT_KEK,
            [seal_epochs.kek_record(row) for row in sorted(fresh.keks, key=lambda k: (k.tenant, k.generation, k.version))],
        )
    if fresh.retired:
        await _retire(connection, fresh, now)
    made = {(d.name.scope.tenant, d.name.key_id, d.name.version) for d in fresh.deks}
    if fresh.deks:
        await connection.copy_records_to_table("encryption_keys", records=_dek_records(fresh), columns=_DEK_COLUMNS)
    if fresh.streams:
        await connection.copy_records_to_table("streams", records=_stream_records(fresh), columns=_STREAM_COLUMNS)
    if reserved := {ref: uses for ref, uses in fresh.reserved.items() if ref not in made}:
        await _reserve(connection, reserved, limits)
    await _insert_history(connection, fresh, now)


async def audited(connection: Connection, fresh: Fresh, *, writer: str, now: datetime) -> None:
    """One row for all keys that were made, one for those that were used as often as they may."""
    if fresh.deks or fresh.keks:
        made: dict[str, Any] = {
            "tenant_keys": [{"tenant_ref": tenant_ref(k.tenant).hex(), "generation": k.generation, "version": k.version} for k in fresh.keks],
            "keys": [[str(d.name.key_id), d.name.version] for d in fresh.deks],
        }
        await audit.append(connection, writer=writer, at=now, action="create_keys", actor=writer, tenant=None, details=made)
    if fresh.retired:
        keys = [f"{key_id}/{version}" for _, key_id, version in sorted(fresh.retired)]
        details = {"cause": "count", "count": len(keys), "keys": keys}
        await audit.append(connection, writer=writer, at=now, action="keys.rotate", actor=writer, tenant=None, details=details)


async def _retire(connection: Connection, fresh: Fresh, now: datetime) -> None:
    """Versions at the soft limit. One that is not active any more was rotated by somebody else: Conflict, reload, redo."""
    done = await connection.execute(
        """UPDATE encryption_keys k SET is_active = false, retired_at = $4 FROM unnest($1::text[], $2::uuid[], $3::int[]) x(t, k, v)
           WHERE k.tenant_id = x.t AND k.key_id = x.k AND k.key_version = x.v AND k.is_active""",
        *_columns(fresh.retired, 3),
        now,
    )
    if int(done.rpartition(" ")[2]) != len(fresh.retired):
        raise Conflict("a key was rotated meanwhile")


async def _reserve(connection: Connection, reserved: dict[KeyRef, int], limits: UseLimits) -> None:
    """Uses of keys that others use too, set aside for this instance. None left below the limits, or rotated meanwhile: Conflict."""
    done = await connection.execute(
        """WITH wanted AS (
             SELECT k.tenant_id, k.key_id, k.key_version, x.n FROM unnest($1::text[], $2::uuid[], $3::int[], $4::bigint[]) x(t, k, v, n)
             JOIN encryption_keys k ON k.tenant_id = x.t AND k.key_id = x.k AND k.key_version = x.v
             WHERE k.is_active AND k.uses_reserved < $5 AND k.uses_reserved + x.n <= $6
             ORDER BY k.tenant_id, k.key_id, k.key_version FOR UPDATE OF k)
           UPDATE encryption_keys k SET uses_reserved = k.uses_reserved + w.n FROM wanted w
           WHERE k.tenant_id = w.tenant_id AND k.key_id = w.key_id AND k.key_version = w.key_version""",
        *_columns([(*ref, uses) for ref, uses in reserved.items()], 4),
        limits.soft,
        limits.hard,
    )
    if int(done.rpartition(" ")[2]) != len(reserved):
        raise Conflict("a key's uses were reserved by others meanwhile")


async def _insert_history(connection: Connection, fresh: Fresh, now: datetime) -> None:
    if fresh.turned:
        await connection.executemany(
            """UPDATE streams SET is_encrypted = true, encrypted_from_position = coalesce(encrypted_from_position, $5),
                 encryption_key_id = $3, encryption_algorithm = $4, key_rotation_count = key_rotation_count + is_encrypted::int,
                 last_key_rotation = CASE WHEN is_encrypted THEN $6 ELSE last_key_rotation END
               WHERE tenant_id = $1 AND stream_id = $2""",
            [(*turn, now) for turn in fresh.turned],
        )
        await connection.executemany(
            """UPDATE stream_key_history SET used_to_position = $3 - 1
               WHERE tenant_id = $1 AND stream_id = $2 AND used_to_position IS NULL""",
            [(tenant, stream, position) for tenant, stream, _, _, position in fresh.turned],
        )
    if fresh.history:
        await connection.copy_records_to_table("stream_key_history", records=fresh.history, columns=_HISTORY_COLUMNS)
    if fresh.persons:
        # Many persons' keys are in use in a stream side by side: a row ends only where the same key's next version begins.
        rows = _columns(fresh.persons, 5)
        await connection.execute(
            """UPDATE stream_key_history h SET used_to_position = x.p - 1 FROM unnest($1::text[], $2::text[], $3::uuid[], $4::int[], $5::bigint[])
                 x(t, s, k, v, p) WHERE h.tenant_id = x.t AND h.stream_id = x.s AND h.key_id = x.k AND h.key_version < x.v
                 AND h.used_to_position IS NULL""",
            *rows,
        )
        await connection.execute(
            f"""INSERT INTO stream_key_history ({", ".join(_HISTORY_COLUMNS)})
                SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::int[], $5::bigint[]) x(t, s, k, v, p)
                WHERE NOT EXISTS (SELECT FROM stream_key_history h WHERE h.tenant_id = x.t AND h.stream_id = x.s AND h.key_id = x.k
                                  AND h.key_version = x.v AND h.used_to_position IS NULL)""",  # noqa: S608 (constants)
            *rows,
        )
