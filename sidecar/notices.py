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
from sidecar.postgres import shreds
from sidecar.postgres.connection import Pool, transaction
from sidecar.postgres.shreds import View


class Notices:
    """Knows which views a scope can stand in. Every call may raise BrokerUnavailable or StoreUnavailable: repeat it."""

    def __init__(self, pool: Pool, admin: Admin, writer: ViewWriter) -> None:
        self._pool, self._admin, self._writer = pool, admin, writer

    async def affected(self, scope: Scope) -> list[View]:
        """The views that may hold records of the scope, where the topic exists."""
        async with transaction(self._pool) as connection:
            views = await shreds.views(connection)
            of_class = scope.id if scope.kind is ScopeKind.CLASS else None
            if scope.kind is ScopeKind.STREAM:
                of_class = await shreds.stream_class(connection, scope.tenant, scope.id)
        present = await asyncio.to_thread(self._admin.describe, {view.topic for view in views})
        wanted = [v for v in views if matches(v.tenants, scope.tenant) and (of_class is None or matches(v.classes, of_class))]
        return [view for view in wanted if view.topic in present]

    async def give_notice(self, command_id: UUID, scope: Scope, erased_at: str, views: Iterable[View]) -> None:
        """One per partition; durable when it returns."""
        await self.write([notice(command_id, scope, erased_at, view, partition) for view in views for partition in range(view.partitions)])

    async def write(self, records: list[ViewRecord]) -> None:
        await asyncio.to_thread(self._writer.write, records)


def matches(globs: list[str], value: str) -> bool:
    return any(fnmatchcase(value, glob) for glob in globs)


def notice(command_id: UUID, scope: Scope, erased_at: str, view: View, partition: int) -> ViewRecord:
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


def tombstone(tenant: str, stream: str, position: int, view: View, metadata: str | None = None) -> ViewRecord | None:
    """Of one event; None where its key in the view cannot be known: with `key: source` it is sealed with the event (`metadata` is a plain one's)."""
    path = f"{tenant}/{stream}"
    source_key = parse_attributes(metadata)[0] if view.key_mode == "source" and metadata else None
    key = view_key(view.key_mode, path, position, source_key)
    return None if key is None else ViewRecord(topic=view.topic, partition=view_partition(path, view.partitions), key=key, value=None)


def plain_tombstones(tenant: str, row: Any, views: list[View]) -> list[ViewRecord]:
    """Of one deleted plain event (a row of `shreds.delete_plain`), one per view that can hold it."""
    wanted = (
        v for v in views if (row["class"] is None or matches(v.classes, row["class"])) and (row["topic"] is None or matches(v.topics, row["topic"]))
    )
    found = (tombstone(tenant, row["stream_id"], row["stream_position"], view, row["metadata"]) for view in wanted)
    return [record for record in found if record is not None]
