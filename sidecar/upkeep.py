"""What goes on beside the batches: heartbeat, news of changed tenants, topics that were made again, purging, lag."""

import asyncio
from contextlib import suppress
from typing import Any

from sidecar import telemetry
from sidecar.core.errors import SidecarError
from sidecar.kafka.admin import Admin
from sidecar.pipeline import Pipeline
from sidecar.postgres.connection import connect
from sidecar.postgres.errors import mapped
from sidecar.settings import Settings

BEAT_SECONDS = 1.0
LOOK_EVERY_BEATS = 2


class Upkeep:
    """One task for the life of a data plane. Nothing here is needed for correctness but the watch on topic ids."""

    def __init__(self, settings: Settings, instance_id: str, pipeline: Pipeline, admin: Admin, topic_ids: dict[str, str]) -> None:
        self._settings, self._instance_id = settings, instance_id
        self._pipeline, self._admin, self._topic_ids = pipeline, admin, topic_ids
        self._purge = {s.topic for s in settings.sources if s.purge == "after_projection"}

    async def run(self) -> None:
        while True:
            try:
                await self._watch()
            except (SidecarError, OSError) as error:
                # news may have been missed
                for tenant in list(self._pipeline.ports.streams.tenants.values()):
                    self._pipeline.forget(tenant.id)
                telemetry.log.warning("upkeep waits", extra={"action": "upkeep", "error": error})
                await asyncio.sleep(BEAT_SECONDS)

    async def _watch(self) -> None:
        connection = await connect(
            self._settings.postgres.for_role("data"), application_name=f"sidecar upkeep {self._instance_id}", command_timeout=30
        )
        try:
            with mapped():
                await connection.add_listener("sidecar_tenant_epoch", self._heard)
            beats = 0
            while True:
                with mapped():
                    await connection.execute("UPDATE instances SET heartbeat_at = now() WHERE instance_id = $1", self._instance_id)
                if beats % LOOK_EVERY_BEATS == 0:
                    await self._look()
                beats += 1
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            with suppress(Exception):
                await connection.close(timeout=1)

    def _heard(self, _connection: Any, _pid: int, _channel: str, tenant: Any) -> None:
        self._pipeline.forget(str(tenant))

    async def _look(self) -> None:
        """Topic ids, purging and lag of the partitions in hand."""
        leases = list(self._pipeline.owned.values())
        topics = {lease.topic for lease in leases}
        if not topics:
            return
        found = await asyncio.to_thread(self._admin.describe, topics)
        again = {name for name in topics if name in found and found[name].topic_id != self._topic_ids.get(name)}
        if again:
            telemetry.log.warning("a source topic was deleted and made again", extra={"action": "reclaim", "topics": sorted(again)})
            self._pipeline.reclaim([(lease.topic, lease.partition) for lease in leases if lease.topic in again])
            return
        ends = await asyncio.to_thread(self._admin.offsets, {name: found[name].partitions for name in topics if name in found})
        for lease in leases:
            end = ends.get(lease.topic, {}).get(lease.partition)
            if end is not None:
                telemetry.lag_records.labels(lease.topic, str(lease.partition)).set(max(0, end - min(lease.stored, lease.projected)))
        below = {(le.topic, le.partition): min(le.stored, le.projected) for le in leases if le.topic in self._purge}
        await asyncio.to_thread(self._admin.delete_records, {at: offset for at, offset in below.items() if offset > 0})
