"""What is stored but may not be projected: after a crash between the two, its view records are made from the store.

Never from the source record: what was stored under it may have been erased since, and must not come back.
"""

# ruff: noqa: S608 (statements are put together from constants; what comes from outside is a parameter)

from collections.abc import Callable
from typing import Any

from sidecar import telemetry
from sidecar.core.errors import KeyShredded, RecordError
from sidecar.core.streams import Stream, Tenant
from sidecar.dead_letters import DeadLetters
from sidecar.event_store import BY_SOURCE, Ciphers, open_row
from sidecar.kafka.producer import Outgoing
from sidecar.postgres.leases import Lease
from sidecar.streams import Streams
from sidecar.views import Views, project_event
from sidecar.work import Work

_OF_RANGE = "source_id = $1 AND source_partition = $2 AND source_offset >= $3 AND source_offset < $4"
_TENANTS = f"SELECT DISTINCT tenant_id FROM messages WHERE {_OF_RANGE}"
_ROWS = f"""SELECT m.*, EXISTS (SELECT FROM erased_scopes e WHERE e.tenant_id = m.tenant_id AND e.readmitted_at IS NULL
  AND (e.scope_kind = 'stream' AND e.scope_id = m.stream_id OR e.scope_kind = 'class' AND e.scope_id = m.stream_type_class)) AS erased
FROM ({BY_SOURCE}) m"""
_DEAD = """SELECT "offset", reason, value_sha256 FROM dead_letters
WHERE source_id = $1 AND partition = $2 AND "offset" >= $3 AND "offset" < $4 AND reason <> 'view_too_large' ORDER BY 1"""
_CHUNK_END = f"SELECT max(source_offset) + 1 AS end FROM (SELECT source_offset FROM messages WHERE {_OF_RANGE} ORDER BY 1 LIMIT $5) c"
CHUNK = 1000


class Replay:
    """Reads before any lock is taken, opens under the guard."""

    def __init__(self, streams: Streams, new_ciphers: Callable[[], Ciphers], views: Views, dead_letters: DeadLetters) -> None:
        self._streams, self._new_ciphers, self._views, self._dead_letters = streams, new_ciphers, views, dead_letters

    async def chunk_end(self, lease: Lease, first: int, end: int) -> int:
        """Where a range ends that a batch can hold."""
        (row,) = await self._streams.store.fetch(_CHUNK_END, lease.source_id, lease.partition, first, end, CHUNK)
        return end if row["end"] is None else int(row["end"])

    async def load(self, work: Work) -> None:
        """The rows of the batch's `replays`, their tenants and their keys. May call the KMS; raises Unavailable."""
        fetch, held = self._streams.store.fetch, self._streams.tenants
        ranges = {at: (work.ends[at][0], first, end) for at, (first, end) in work.replays.items()}  # not `owned`: it may be revoked by now
        names: set[str] = set()
        for lease, first, end in ranges.values():
            names |= {row["tenant_id"] for row in await fetch(_TENANTS, lease.source_id, lease.partition, first, end)}
        # The tenants before the rows: a shred in between moved the epoch that the batch is checked against.
        if missing := [name for name in sorted(names) if name.encode() not in held]:
            await self._streams.load_tenants(missing)
        work.tenants |= {name: held[name.encode()] for name in names}
        for at, (lease, first, end) in ranges.items():
            work.stored_rows += await fetch(_ROWS, lease.source_id, lease.partition, first, end)
            for row in await fetch(_DEAD, lease.source_id, lease.partition, first, end):
                work.outgoing.append(self._dead_letters.record((*at, row["offset"]), row["reason"], row["value_sha256"]))
        work.ciphers = self._new_ciphers()
        await work.ciphers.load(work.stored_rows)

    def records(self, work: Work) -> list[Outgoing]:
        """Their view records. Erased events have none."""
        out: list[Outgoing] = []
        for row in work.stored_rows:
            tenant, lease = work.tenants.get(row["tenant_id"]), work.ends[row["source_topic"], row["source_partition"]][0]
            if tenant is None or work.ciphers is None or _refused(row, tenant):
                continue
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
            out += project_event(self._views, event, (lease, row["source_offset"], event.tenant))
        return out


def _refused(row: Any, tenant: Tenant) -> bool:
    """Would the record be refused now? Then its event, also a plain one, gets no view record beyond the shred's barrier."""
    erased = "scope_erased" if row["erased"] else None
    stream = Stream(row["stream_id"], b"", row["stream_type_class"] or "", erased, None, 0)
    return tenant.refusal_of(row["source_id"], row["source_partition"], row["source_offset"], stream) is not None
