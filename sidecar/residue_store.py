"""Residue in and around the database: dead rows of key tables, WAL, backups, and the seal epoch that makes all of these worthless."""

from datetime import datetime, timedelta
from typing import Any, Final

from sidecar.core.errors import AccessDenied
from sidecar.ports import Clock
from sidecar.postgres import residue
from sidecar.postgres.connection import Connection, Pool, transaction
from sidecar.postgres.residue import Entry, Look, Planned
from sidecar.settings import BackupSettings, Settings

DEAD_ROWS: Final = "dead rows of key tables"
WAL: Final = "write-ahead log"
LONGEST_SECONDS: Final = 300.0


def plan_store(settings: Settings, facts: dict[str, Any], now: datetime) -> list[Planned]:
    """What a shred that destroyed keys leaves in the database, its log and its backups. `facts["xid"]`: the transaction that did it."""
    planned = [
        Planned(kind="database", place=DEAD_ROWS, details={"xid": facts["xid"]}),
        Planned(kind="wal", place=WAL),
    ]
    for place, days in _kept(settings.backups):
        details: dict[str, Any] = {"kept_days": days} if days is not None else {"reason": "how long they are kept is not declared (backups)"}
        planned.append(Planned(kind="backup", place=place, until=None if days is None else now + timedelta(days=days), details=details))
    return planned


def _kept(backups: BackupSettings) -> list[tuple[str, int | None]]:
    return [("database backups", backups.database_days), ("keystore backups", backups.keystore_days), ("archived WAL", backups.wal_days)]


async def plan_epochs(connection: Connection, tenant: str) -> list[Planned]:
    """After the keys are gone: what is still living above a copy of them."""
    keks = await residue.living_keks(connection, tenant)
    return [
        Planned(kind="seal_epoch", place=f"seal epoch {version} of {uri}", details={"kms_uri": uri, "kms_key_version": version, "tenant_keys": keks})
        for uri, version in await residue.seal_epochs(connection, tenant)
    ]


class DeadRows:
    """Kind `database`: the old row versions, with the wrapped bytes, leave the tables. An old snapshot anywhere holds them back."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def act(self, entry: Entry) -> Look:
        details = {"xid": entry.details["xid"]}
        async with transaction(self._pool) as connection:
            held_by = await residue.old_snapshots(connection, int(details["xid"]))
        if held_by:
            return Look(again=_patience(entry.attempts), details=details | {"held_by": held_by})
        tables = await residue.vacuum(self._pool, entry.created_at)
        blocked = any("may not" in said for said in tables.values())
        return Look(again=_patience(entry.attempts) if blocked else None, details=details | {"tables": tables})


class Wal:
    """Kind `wal`: the log up to where the dead rows were removed has been recycled, and no replication slot keeps it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def act(self, entry: Entry) -> Look:
        async with transaction(self._pool) as connection:
            if await residue.done_at(connection, entry.command_id, "database") is None:
                return Look(again=_patience(entry.attempts), details={"reason": f"waits for: {DEAD_ROWS}"})
            lsn = entry.details.get("lsn") or await residue.wal_position(connection)
        try:
            async with transaction(self._pool) as connection:
                files, slots = await residue.wal_behind(connection, lsn)
        except AccessDenied:
            return Look(again=LONGEST_SECONDS, details={"lsn": lsn, "reason": "the control role may not look at pg_wal: GRANT pg_monitor"})
        details = {"lsn": lsn, "files": files, "slots": slots}
        return Look(again=_patience(entry.attempts) if files or slots else None, details=details)


class Backups:
    """Kind `backup`: by the declared retention, counted from when the dead rows were removed."""

    def __init__(self, settings: Settings, pool: Pool, clock: Clock) -> None:
        self._kept, self._pool, self._clock = dict(_kept(settings.backups)), pool, clock

    async def act(self, entry: Entry) -> Look:
        days = self._kept.get(entry.place)
        if days is None:
            return Look(again=LONGEST_SECONDS, details={"reason": "how long they are kept is not declared (backups)"})
        async with transaction(self._pool) as connection:
            since = await residue.done_at(connection, entry.command_id, "database")
        until = None if since is None else since + timedelta(days=days)
        details = {"kept_days": days} | ({} if since else {"reason": f"counts from the removal of: {DEAD_ROWS}"})
        left = LONGEST_SECONDS if until is None else (until - self._clock.now()).total_seconds()
        if until is None:
            left = _patience(entry.attempts)
        return Look(again=min(left, LONGEST_SECONDS) if left > 0 else None, until=until, details=details)


class SealEpoch:
    """Kind `seal_epoch`: destroyed in the KMS, and no tenant key that wrapped what was shredded lives on under another one."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool, self._clock = pool, clock

    async def act(self, entry: Entry) -> Look:
        at = entry.details
        async with transaction(self._pool) as connection:
            state, irrecoverable_at = await residue.seal_epoch(connection, at["kms_uri"], at["kms_key_version"])
            living = [kek for kek in await residue.living_keks(connection, entry.command.scope.tenant) if kek in at["tenant_keys"]]
        gone = state == "destroyed" and (irrecoverable_at is None or irrecoverable_at <= self._clock.now())
        details = at | {"state": state, "tenant_keys_living": len(living)}
        return Look(again=None if gone and not living else _patience(entry.attempts), until=irrecoverable_at, details=details)


def _patience(attempts: int) -> float:
    return min(1.5 ** min(attempts, 20), LONGEST_SECONDS)
