"""Seal epochs as rows: which version of a KMS key wraps which tenant keys, and how far a version is on its way to destruction.

Every function runs in the caller's transaction. That no KEK is stored under an epoch that is over, the trigger on tenant_keys sees to
(migration 2), for whoever stores one.
"""

# ruff: noqa: S608 (statements are put together from constants of this file; what comes from outside is a parameter)

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sidecar.core.errors import ConfigurationError
from sidecar.core.keys import KekRow
from sidecar.core.kms import KmsVersion, VersionState
from sidecar.core.model import Scope
from sidecar.postgres.connection import Connection
from sidecar.postgres.errors import mapped

INSERT_KEK: Final = """
INSERT INTO tenant_keys (tenant_id, generation, kek_version, kms_uri, kms_key_version, wrapped, fingerprint, state, dedicated)
VALUES ($1, $2, $3, $4, $5, $6, $7, 'active', $8)"""


def kek_record(row: KekRow) -> tuple[Any, ...]:
    """The arguments of INSERT_KEK."""
    return (row.tenant, row.generation, row.version, row.kms_uri, row.kms_key_version, row.wrapped, row.fingerprint, row.dedicated)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealEpoch:
    """`tenant`: of a dedicated key, whose."""

    kms_uri: str
    key_version: str
    state: str
    tenant: str | None
    backup_confirmed: bool
    created_at: datetime
    destroy_expected_at: datetime | None
    irrecoverable_at: datetime | None


async def of_key(connection: Connection, uri: str) -> list[SealEpoch]:
    """Oldest first."""
    return await _epochs(connection, "kms_uri = $1", uri)


async def of_tenant(connection: Connection, tenant: str) -> list[SealEpoch]:
    """Of the keys that are dedicated to it."""
    return await _epochs(connection, "tenant_id = $1", tenant)


async def of_shred(connection: Connection, tenant: str, command_id: UUID) -> list[SealEpoch]:
    """Of the keys that are dedicated to it, what was there when the shred was carried out: not what a readmission made since."""
    finished = "SELECT finished_at FROM commands WHERE command_id = $2::text::uuid"
    return await _epochs(connection, f"tenant_id = $1 AND created_at <= ({finished})", tenant, str(command_id))


async def has_keks(connection: Connection, tenant: str) -> bool:
    """One that is not destroyed, whichever KMS key wraps it."""
    with mapped():
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM tenant_keys WHERE tenant_id = $1 AND wrapped IS NOT NULL)", tenant))


async def under_way(connection: Connection) -> list[SealEpoch]:
    """What a roller has to look after."""
    return await _epochs(connection, "state IN ('retiring', 'retired', 'destroying')")


async def _epochs(connection: Connection, condition: str, *arguments: str) -> list[SealEpoch]:
    with mapped():
        rows = await connection.fetch(f"SELECT * FROM seal_epochs WHERE {condition} ORDER BY created_at, kms_key_version", *arguments)
    return [
        SealEpoch(
            kms_uri=row["kms_uri"],
            key_version=row["kms_key_version"],
            state=row["state"],
            tenant=row["tenant_id"],
            backup_confirmed=row["backup_confirmed_at"] is not None,
            created_at=row["created_at"],
            destroy_expected_at=row["destroy_expected_at"],
            irrecoverable_at=row["irrecoverable_at"],
        )
        for row in rows
    ]


async def listed(connection: Connection) -> list[dict[str, Any]]:
    """For people: every column, and how many living KEKs are under each."""
    with mapped():
        rows = await connection.fetch(
            """SELECT e.*, (SELECT count(*) FROM tenant_keys k
                 WHERE k.kms_uri = e.kms_uri AND k.kms_key_version = e.kms_key_version AND k.wrapped IS NOT NULL) AS tenant_keys
               FROM seal_epochs e ORDER BY e.created_at, e.kms_uri, e.kms_key_version"""
        )
    return [dict(row) for row in rows]


# ── a roll ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def begin(connection: Connection, uri: str, version: str, tenant: str | None) -> list[str]:
    """`version` wraps from now on, the others of the key are retiring; -> those. Waits for the batches that store KEKs under them."""
    with mapped():
        await connection.execute(
            "INSERT INTO seal_epochs (kms_uri, kms_key_version, tenant_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", uri, version, tenant
        )
        rows = await connection.fetch(
            """UPDATE seal_epochs SET state = 'retiring', retiring_at = clock_timestamp()
               WHERE kms_uri = $1 AND kms_key_version <> $2 AND state = 'active' RETURNING kms_key_version""",
            uri,
            version,
        )
    return sorted(row["kms_key_version"] for row in rows)


# A tenant that gets a new KEK in place of a new wrap of the old one: something below it was shredded, or this was begun before.
# Not while keys of it are in quarantine: they need the old KEK if they come back.
_GETS_NEW_KEK = """(NOT EXISTS (SELECT FROM quarantined_keys q WHERE q.tenant_id = k.tenant_id) AND (k.state = 'retired'
  OR EXISTS (SELECT FROM erased_scopes e WHERE e.tenant_id = k.tenant_id AND e.below_kek IS NULL)))"""
_UNDER = "k.kms_uri = $1 AND k.kms_key_version = $2 AND k.wrapped IS NOT NULL"


async def tenants_to_rekey(connection: Connection, epoch: SealEpoch) -> list[str]:
    """Those with a KEK under it that does not move: they get a new one."""
    with mapped():
        statement = f"SELECT DISTINCT k.tenant_id FROM tenant_keys k WHERE {_UNDER} AND {_GETS_NEW_KEK} ORDER BY 1"
        return [row["tenant_id"] for row in await connection.fetch(statement, epoch.kms_uri, epoch.key_version)]


async def keks_to_rewrap(connection: Connection, epoch: SealEpoch, after: tuple[str, int, int], limit: int) -> list[Any]:
    """The next rows of tenant_keys behind (tenant, generation, version)."""
    with mapped():
        return await connection.fetch(
            f"""SELECT k.* FROM tenant_keys k WHERE {_UNDER} AND NOT {_GETS_NEW_KEK}
                  AND (k.tenant_id, k.generation, k.kek_version) > ($3, $4, $5)
                ORDER BY k.tenant_id, k.generation, k.kek_version LIMIT $6""",
            epoch.kms_uri,
            epoch.key_version,
            *after,
            limit,
        )


async def rewrap(connection: Connection, epoch: SealEpoch, rows: Sequence[KekRow]) -> list[tuple[str, int, int]]:
    """Store new wraps where the row is still under the old version and not shredded; -> (tenant, generation, version) of those."""
    with mapped():
        done = await connection.fetch(
            """UPDATE tenant_keys k SET wrapped = x.w, kms_key_version = x.v
               FROM unnest($3::text[], $4::int[], $5::int[], $6::bytea[], $7::text[]) x(t, g, n, w, v)
               WHERE k.tenant_id = x.t AND k.generation = x.g AND k.kek_version = x.n
                 AND k.kms_uri = $1 AND k.kms_key_version = $2 AND k.wrapped IS NOT NULL
               RETURNING k.tenant_id, k.generation, k.kek_version""",
            epoch.kms_uri,
            epoch.key_version,
            [row.tenant for row in rows],
            [row.generation for row in rows],
            [row.version for row in rows],
            [row.wrapped for row in rows],
            [row.kms_key_version for row in rows],
        )
    return sorted((row["tenant_id"], row["generation"], row["kek_version"]) for row in done)


# Nothing that lives is under $1, $2, and nothing in quarantine that may live again.
_EMPTY = f"""NOT EXISTS (SELECT FROM tenant_keys k WHERE {_UNDER}) AND NOT EXISTS (
  SELECT FROM quarantined_keys q JOIN tenant_keys k USING (tenant_id, generation, kek_version)
  WHERE q.key_id IS NULL AND k.kms_uri = $1 AND k.kms_key_version = $2)"""


async def _if_empty(connection: Connection, epoch: SealEpoch, change: str, condition: str) -> bool:
    """Whether it was changed: it is as `condition` says, and nothing that lives is under it."""
    statement = f"UPDATE seal_epochs SET {change} WHERE kms_uri = $1 AND kms_key_version = $2 AND {condition} AND {_EMPTY}"
    with mapped():
        done = await connection.execute(statement, epoch.kms_uri, epoch.key_version)
    return str(done) == "UPDATE 1"


async def retire(connection: Connection, epoch: SealEpoch) -> bool:
    """True if no KEK is under it any more. None can come: it is retiring."""
    return await _if_empty(connection, epoch, "state = 'retired', retired_at = clock_timestamp()", "state = 'retiring'")


async def dedicated_to_roll(connection: Connection) -> list[str]:
    """Tenants with a KMS key of their own, of which something was shredded that their KEK still can have wrapped."""
    with mapped():
        rows = await connection.fetch(
            """SELECT DISTINCT tenant_id FROM erased_scopes e JOIN tenant_keys k USING (tenant_id)
               WHERE e.below_kek IS NULL AND k.dedicated AND k.wrapped IS NOT NULL ORDER BY 1"""
        )
    return [row["tenant_id"] for row in rows]


# ── its end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def confirm_backup(connection: Connection, version: str | None, by: str) -> list[str]:
    """On record for the retired epochs (or one): a keystore backup from after them exists. -> their versions."""
    with mapped():
        rows = await connection.fetch(
            """UPDATE seal_epochs SET backup_confirmed_at = clock_timestamp(), backup_confirmed_by = $2
               WHERE state = 'retired' AND backup_confirmed_at IS NULL AND ($1::text IS NULL OR kms_key_version = $1) RETURNING kms_key_version""",
            version,
            by,
        )
        if not rows and version is not None:
            state = await connection.fetchval("SELECT state FROM seal_epochs WHERE kms_key_version = $1", version)
            raise ConfigurationError(
                f"seal epoch {version} is {state or 'unknown'}, or its backup is confirmed already",
                where="--epoch",
                mend="`sidecar keys epochs` lists them; only a retired one waits for a backup",
            )
    return sorted(row["kms_key_version"] for row in rows)


async def end(connection: Connection, epoch: SealEpoch) -> bool:
    """Of a dedicated key whose tenant was shredded: nothing has to move, and no backup is needed. False if something lives under it."""
    change = "state = 'retired', retiring_at = coalesce(retiring_at, clock_timestamp()), retired_at = clock_timestamp()"
    return await _if_empty(connection, epoch, change, "state IN ('active', 'retiring')")


async def mark_destroying(connection: Connection, epoch: SealEpoch) -> bool:
    """Once more only if nothing that lives is under it; True if it may be destroyed now."""
    return await _if_empty(connection, epoch, "state = 'destroying', destroy_requested_at = clock_timestamp()", "state = 'retired'")


async def record(connection: Connection, epoch: SealEpoch, found: KmsVersion, now: datetime) -> bool:
    """What the KMS says of a version whose destruction was asked for; True once it says destroyed, and only then.

    Irrecoverable since it was seen to be: what the KMS has on record of it may be from when it began, or a date that was put off since.
    """
    destroyed = found.state is VersionState.DESTROYED
    with mapped():
        await connection.execute(
            """UPDATE seal_epochs SET destroy_expected_at = $3, destroyed_at = CASE WHEN $4 THEN $5::timestamptz END,
                 irrecoverable_at = CASE WHEN $4 THEN greatest($3, $5) END, state = CASE WHEN $4 THEN 'destroyed' ELSE state END
               WHERE kms_uri = $1 AND kms_key_version = $2 AND state = 'destroying'""",
            epoch.kms_uri,
            epoch.key_version,
            found.irrecoverable_at,
            destroyed,
            now,
        )
    return destroyed


# ── what it means for a shred ───────────────────────────────────────────────────────────────────────────────────────


async def irrecoverable(connection: Connection, scope: Scope, command_id: UUID) -> tuple[datetime | None, str | None]:
    """When the KMS made sure that no copy of the scope's wrapped keys can be opened; else None and what it waits for.

    An old backup may hold any wrap that a key of the scope ever had, so of each KMS key that wraps one of its KEKs every version up to
    the last that did must be destroyed; of a generation before a readmission, all KEKs. Says nothing of views, sources and WAL. Which KEKs there were, the database's clock alone says.
    """
    with mapped():
        below = await connection.fetchval("SELECT min(below_kek) FROM erased_scopes WHERE command_id = $1", command_id)
        keks = await connection.fetch(
            """SELECT k.wrapped IS NULL AS destroyed, k.kms_uri, k.kms_key_version FROM tenant_keys k
               WHERE k.tenant_id = $1 AND ($3::int IS NULL OR k.kek_version < $3 OR k.generation < (SELECT generation FROM tenants WHERE tenant_id = $1))
                 AND k.created_at <= coalesce((SELECT finished_at FROM commands WHERE command_id = $2), 'infinity')""",
            scope.tenant,
            command_id,
            below,
        )
        epochs = await connection.fetch(
            """SELECT DISTINCT e.* FROM seal_epochs last JOIN seal_epochs e ON e.kms_uri = last.kms_uri AND e.created_at <= last.created_at
               WHERE (last.kms_uri, last.kms_key_version) IN (SELECT * FROM unnest($1::text[], $2::text[]))""",
            [row["kms_uri"] for row in keks],
            [row["kms_key_version"] for row in keks],
        )
    if not keks or not all(row["destroyed"] for row in keks) or any(row["state"] in ("active", "retiring") for row in epochs):
        return None, "next seal epoch"
    if any(row["state"] == "retired" for row in epochs):
        return None, "keystore backup to be confirmed"
    if any(row["state"] == "destroying" for row in epochs):
        return None, "destruction in the KMS"
    return max(row["irrecoverable_at"] for row in epochs), None
