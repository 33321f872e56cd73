"""Residue in and around the database: dead rows of key tables, WAL, backups, and the seal epoch that makes all of these worthless."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

from sidecar.core.errors import AccessDenied
from sidecar.core.model import ScopeKind
from sidecar.ports import Clock
from sidecar.postgres import residue, seal_epochs
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.residue import KEY_TABLES, Entry, Look, Planned
from sidecar.sealing import Sealing
from sidecar.settings import Settings
from sidecar.steps import WRITER

DEAD_ROWS: Final = "dead rows of key tables"
WAL: Final = "write-ahead log"
LONGEST_SECONDS: Final = 300.0


def plan_store(settings: Settings, facts: dict[str, Any], now: datetime, *, resealed: bool) -> list[Planned]:
    """What a shred that destroyed keys, or deleted plain events, leaves in the database, its log and its backups.

    `facts["xid"]`: the transaction that destroyed; the deletions came behind it, and a grace's end will. `resealed`: events of the tenant were sealed
    anew; what they were before is plaintext, or opens with keys that go on.
    """
    kept_until, keys, plain = facts.get("kept_until"), facts["keys"]["count"], facts.get("plain_deleted") or facts.get("remainders_deleted")
    if not keys and not plain:
        return []
    events = bool(plain or resealed)
    dead: dict[str, Any] = {} if kept_until or events else {"xid": facts["xid"]}
    planned = [Planned(kind="database", place=DEAD_ROWS, details=dead | ({"events": True} if events else {})), Planned(kind="wal", place=WAL)]
    if keys:
        planned.append(Planned(kind="seal_epoch", place="seal epoch", details={"reason": "next seal epoch"}))
    if kept_until:
        planned.append(Planned(kind="grace", place="keys in quarantine", until=datetime.fromisoformat(kept_until)))
    for place, days in _kept(settings):
        details: dict[str, Any] = {"kept_days": days} if days is not None else {"reason": "how long they are kept is not declared (backups)"}
        planned.append(Planned(kind="backup", place=place, until=None if days is None else now + timedelta(days=days), details=details))
    return planned


def _kept(settings: Settings) -> list[tuple[str, int | None]]:
    """Place → days. `kms.backup: none` says of the key store that nobody backs it up."""
    kept = settings.backups
    keystore = 0 if kept.keystore_days is None and settings.kms.backup == "none" else kept.keystore_days
    return [("database backups", kept.database_days), ("keystore backups", keystore), ("archived WAL", kept.wal_days)]


class DeadRows:
    """Kind `database`: the old row versions, with wrapped bytes or plain events, leave the tables. An old snapshot anywhere holds them back."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._rid: dict[bool, tuple[int, dict[str, str]]] = {}
        """With or without `messages` → the transaction before which no dead row is left, and how the tables were rid of them."""

    async def act(self, entry: Entry) -> Look:
        async with transaction(self._pool) as connection:
            if await residue.pending(connection, entry.command_id, "grace"):
                return Look(again=_patience(entry.attempts), details={"reason": "waits for the end of the grace"})
            events = {"events": True} if entry.details.get("events") else {}
            details = events | {"xid": entry.details.get("xid") or await residue.own_xid(connection)}
        before, tables = self._rid.get(bool(events), (0, {}))
        if int(details["xid"]) < before:  # what ran for a later shred took this one's rows along
            return Look(again=None, details=details | {"tables": tables})
        async with transaction(self._pool) as connection:
            held_by = await residue.old_snapshots(connection, int(details["xid"]))
            horizon = await residue.horizon(connection)
            since = entry.details.get("unseen_since") or await residue.unseen_since(connection)
        if held_by:
            return Look(again=_patience(entry.attempts), details=details | {"held_by": held_by})
        tables = await residue.vacuum(self._pool, (*KEY_TABLES, "messages") if events else KEY_TABLES, since)
        if any("may not" in said for said in tables.values()):
            return Look(again=_patience(entry.attempts), details=details | {"tables": tables, "unseen_since": since})
        if not any(said == "autovacuumed" for said in tables.values()):
            self._rid[bool(events)] = (horizon, tables)
        return Look(again=None, details=details | {"tables": tables})


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
        self._kept, self._pool, self._clock = dict(_kept(settings)), pool, clock

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
    """Kind `seal_epoch`: whatever in the KMS could open a copy of the shredded keys is destroyed there, and the KMS says so."""

    def __init__(self, pool: Pool, clock: Clock, sealing: Callable[[], Sealing]) -> None:
        self._pool, self._clock, self._sealing = pool, clock, sealing

    async def act(self, entry: Entry) -> Look:
        scope = entry.command.scope
        async with transaction(self._pool) as connection:
            if await residue.pending(connection, entry.command_id, "grace"):
                return Look(again=_patience(entry.attempts), details={"reason": "waits for the end of the grace"})
            dedicated = await seal_epochs.of_shred(connection, scope.tenant, entry.command_id) if scope.kind is ScopeKind.TENANT else []
        if any(epoch.state != "destroyed" for epoch in dedicated):  # a KMS key that was this tenant's alone waits for no roll
            await self._sealing().destroy_dedicated(dedicated, WRITER)
        async with transaction(self._pool) as connection:
            at, reason = await seal_epochs.irrecoverable(connection, scope, entry.command_id)
        left = _patience(entry.attempts) if at is None else (at - self._clock.now()).total_seconds()
        details = {"reason": reason} if reason else {}
        return Look(again=min(left, LONGEST_SECONDS) if left > 0 else None, until=at, details=details)


def _patience(attempts: int) -> float:
    return min(1.5 ** min(attempts, 20), LONGEST_SECONDS)
