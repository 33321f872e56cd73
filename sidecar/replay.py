"""What is stored but may not be projected: after a crash between the two, its view records are made from the store.

Never from the source record: what was stored under it may have been erased since, and must not come back.
"""

from collections.abc import Callable

from sidecar import telemetry
from sidecar.core.errors import KeyShredded, RecordError
from sidecar.dead_letters import DeadLetters
from sidecar.event_store import BY_SOURCE, Ciphers, open_row
from sidecar.kafka.producer import Outgoing
from sidecar.streams import Streams
from sidecar.views import Views, project_event
from sidecar.work import Work

_DEAD_BY_SOURCE = """SELECT "offset", reason, value_sha256 FROM dead_letters
WHERE source_id = $1 AND partition = $2 AND "offset" >= $3 AND "offset" < $4 AND reason <> 'view_too_large' ORDER BY 1"""


class Replay:
    """Reads before any lock is taken, opens under the guard."""

    def __init__(self, streams: Streams, new_ciphers: Callable[[], Ciphers], views: Views, dead_letters: DeadLetters) -> None:
        self._streams, self._new_ciphers, self._views, self._dead_letters = streams, new_ciphers, views, dead_letters

    async def load(self, work: Work) -> None:
        """The rows of the batch's `replays`, their tenants and their keys. May call the KMS; raises Unavailable."""
        store = self._streams.store
        for at, (first, end) in work.replays.items():
            lease = work.ends[at][0]  # not `owned`: it may have been revoked meanwhile
            work.stored_rows += await store.fetch(BY_SOURCE, lease.source_id, lease.partition, first, end)
            for row in await store.fetch(_DEAD_BY_SOURCE, lease.source_id, lease.partition, first, end):
                work.outgoing.append(self._dead_letters.record((*at, row["offset"]), row["reason"], row["value_sha256"]))
        names = sorted({row["tenant_id"] for row in work.stored_rows})
        missing = [name for name in names if name.encode() not in self._streams.tenants]
        if missing:
            await self._streams.load_tenants(missing)
        work.tenants |= {name: self._streams.tenants[name.encode()] for name in names}
        work.ciphers = self._new_ciphers()
        await work.ciphers.load(work.stored_rows)

    def records(self, work: Work) -> list[Outgoing]:
        """Their view records. Erased events have none."""
        out: list[Outgoing] = []
        for row in work.stored_rows:
            if work.ciphers is None:
                break
            tenant = work.tenants.get(row["tenant_id"])
            if tenant is None or tenant.refusal or row["stream_type_class"] in tenant.erased_classes:
                continue  # shredded meanwhile: its plain events have no view record beyond the barrier either
            try:
                event = open_row(row, work.ciphers)
            except KeyShredded:
                continue
            except RecordError as error:
                telemetry.dead_letters.labels(error.reason).inc()
                telemetry.log.error(
                    "a stored event cannot be opened", extra={"action": "project", "error": error, "position": row["stream_position"]}
                )
                continue
            lease, _ = work.ends.get((row["source_topic"], row["source_partition"]), (None, 0))
            out += project_event(self._views, event, (lease, row["source_offset"], event.tenant))
        return out
