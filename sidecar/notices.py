"""What a shred writes into views: erased notices, then tombstones. Either may be written again, readers tell by `ce_id` and key."""

import asyncio
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

from sidecar.core.model import Scope, ScopeKind
from sidecar.core.view import ERASED_TYPE, parse_attributes, view_key, view_partition
from sidecar.kafka.admin import Admin
from sidecar.kafka.receipts import ViewRecord, ViewWriter
from sidecar.postgres import scopes
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.views import Match, View, views_on_record


class Notices:
    """Knows which views a scope can stand in. Every call may raise BrokerUnavailable or StoreUnavailable: repeat it."""

    def __init__(self, pool: Pool, admin: Admin, writer: ViewWriter) -> None:
        self._pool, self._admin, self._writer = pool, admin, writer

    async def affected(self, scope: Scope) -> list[View]:
        """The views that may hold records of the scope, by any match that they ever had, where the topic exists."""
        async with transaction(self._pool) as connection:
            views = await views_on_record(connection)
            of_class = scope.id if scope.kind is ScopeKind.CLASS else None
            if scope.kind is ScopeKind.STREAM:
                of_class = await scopes.stream_class(connection, scope.tenant, scope.id)
        present = await asyncio.to_thread(self._admin.describe, {view.topic for view in views})
        wanted = [v for v in views if any(matches(m.tenants, scope.tenant) and (of_class is None or matches(m.classes, of_class)) for m in v.matches)]
        return [view for view in wanted if view.topic in present]

    async def give_notice(self, command_id: UUID, scope: Scope, erased_at: str, views: Iterable[View]) -> None:
        """One per partition; durable when it returns."""
        await self.write([notice(command_id, scope, erased_at, view, partition) for view in views for partition in range(view.partitions)])

    async def write(self, records: list[ViewRecord]) -> None:
        await asyncio.to_thread(self._writer.write, records)


def matches(globs: list[str], value: str) -> bool:
    """Whether any of them does."""
    return any(fnmatchcase(value, glob) for glob in globs)


def notice(command_id: UUID, scope: Scope, erased_at: str, view: View, partition: int) -> ViewRecord:
    """To one partition. Its `ce_id` comes from command and partition: one that is repeated has the same."""
    said = scope.to_json()
    value = {"tenant": said.pop("tenant"), "scope": said, "command_id": str(command_id), "erased_at": erased_at}
    headers: list[tuple[str, str | bytes | None]] = [
        ("ce_specversion", b"1.0"),
        ("ce_id", f"{command_id}.{partition}".encode()),
        ("ce_type", ERASED_TYPE.encode()),
        ("ce_source", b"/sidecar"),
        ("ce_time", erased_at.encode()),
        ("ce_tenantid", scope.tenant.encode()),
    ]
    key = f"{scope.tenant}/erased/{command_id}".encode()
    return ViewRecord(topic=view.topic, partition=partition, key=key, value=json.dumps(value, ensure_ascii=False).encode(), headers=headers)


def erasing_keys(view: View, scope: Scope) -> list[str]:
    """The key modes of a view under which a tombstone erases a sealed event of the scope and nothing else.

    With `source` the key is sealed with the event; with `stream` a person's events lie under the same key as those of others.
    """
    return [mode for mode in view.keys if mode == "event" or (mode == "stream" and scope.kind is not ScopeKind.SUBJECT)]


def tombstones(tenant: str, stream: str, position: int, view: View, modes: Iterable[str], metadata: str | None = None) -> list[ViewRecord]:
    """Of one event, under each key that it may stand under in the view; `metadata` is a plain one's, with its source key."""
    path, source_key = f"{tenant}/{stream}", parse_attributes(metadata)[0] if metadata else None
    keys = [key for mode in modes if (key := view_key(mode, path, position, source_key)) is not None]
    return [ViewRecord(topic=view.topic, partition=view_partition(path, view.partitions), key=key, value=None) for key in keys]


def plain_tombstones(tenant: str, row: Any, views: list[View]) -> list[ViewRecord]:
    """Of one deleted plain event (a row of `shreds.delete_plain`), in each view that can hold it."""

    def holds(match: Match) -> bool:
        return (row["class"] is None or matches(match.classes, row["class"])) and (row["topic"] is None or matches(match.topics, row["topic"]))

    wanted = (view for view in views if any(holds(match) for match in view.matches))
    return [t for view in wanted for t in tombstones(tenant, row["stream_id"], row["stream_position"], view, view.keys, row["metadata"])]
