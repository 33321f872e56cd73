"""What becomes of a record that cannot be stored (docs/adr/0005): a row, and a record on the dead letter topic."""

from hashlib import sha256

from sidecar.core.aead import Suite
from sidecar.core.envelope import Header, dead_letter_aad, seal
from sidecar.core.model import Scope
from sidecar.core.streams import SealingKey, Stream, Tenant, Touch
from sidecar.kafka.producer import Outgoing
from sidecar.postgres.batches import DeadLetter, Refusal
from sidecar.streams import Streams
from sidecar.views import dead_letter_record
from sidecar.work import Faulty, Work


class DeadLetters:
    """`topic` has `partitions`."""

    def __init__(self, streams: Streams, topic: str, partitions: int) -> None:
        self._streams, self._topic, self._partitions = streams, topic, partitions

    async def touches(self, work: Work) -> dict[tuple[bytes, bytes], Touch]:
        """The streams that faulty records name, where they are known and not in hand. A dead letter makes no stream."""
        tenants, find = self._streams.tenants, self._streams.find
        named = {(f.tenant.encode(), f.stream) for f in work.faulty if f.tenant and f.stream}
        wanted = [(raw, stream) for raw, stream in named if tenants[raw].exists and not tenants[raw].refusal and find(tenants[raw], stream) is None]
        rows = await self._streams.store.streams([(raw.decode(), stream.decode()) for raw, stream in wanted]) if wanted else []
        known = [row for row in rows if row["stream_type_class"] is not None]
        return {
            (row["tenant_id"].encode(), row["stream_id"].encode()): Touch(
                tenants[row["tenant_id"].encode()], row["stream_id"].encode(), row["stream_id"], row["stream_type_class"]
            )
            for row in known
        }

    async def keys(self, work: Work) -> list[SealingKey]:
        """What the batch's values will be sealed with, once per seal."""
        return [key for fault in work.faulty if (key := await self._key(work, fault)) is not None]

    async def add(self, work: Work, fault: Faulty) -> None:
        """A row, and a record for the topic; a refusal instead where the tenant or the stream was shredded: nothing of it is kept."""
        lease, digest = fault.lease, sha256(fault.value or b"").digest()
        tenant, _, refusal = self._place(fault)
        if tenant is not None:
            work.tenants[tenant.id] = tenant
            if refusal is not None:
                work.refusals.append(Refusal(lease.source_id, lease.partition, fault.offset, tenant.id, refusal))
                return
        key = await self._key(work, fault)
        work.dead_letters.append(
            DeadLetter(
                source_id=lease.source_id,
                partition=lease.partition,
                offset=fault.offset,
                reason=fault.reason,
                tenant=None if tenant is None else tenant.id,
                value_sha256=digest,
                value_encrypted=None if key is None else _sealed(key, fault),
            )
        )
        if fault.projected:
            work.outgoing.append(self.record((lease.topic, lease.partition, fault.offset), fault.reason, digest))

    def _place(self, fault: Faulty) -> tuple[Tenant | None, Stream | None, str | None]:
        """-> the tenant if it is known, the stream if it is in hand, why the record would be refused."""
        tenant = self._streams.tenants[fault.tenant.encode()] if fault.tenant else None
        if tenant is None or not tenant.exists:
            return None, None, None
        stream = self._streams.find(tenant, fault.stream) if fault.stream and not tenant.refusal else None
        return tenant, stream, tenant.refusal_of(fault.lease.source_id, fault.lease.partition, fault.offset, stream)

    async def _key(self, work: Work, fault: Faulty) -> SealingKey | None:
        """The stream's own. The tenant's for a record that names no stream, so nothing smaller can be shredded of it. Else none."""
        tenant, stream, refusal = self._place(fault)
        if tenant is None or refusal is not None or not fault.value:
            return None
        if fault.stream is not None:
            return None if stream is None else stream.key
        return await self._streams.shared_key(Scope.of_tenant(tenant.id), tenant, Suite.AES_256_GCM, work.fresh)

    def record(self, source: tuple[str, int, int], reason: str, digest: bytes = sha256().digest()) -> Outgoing:
        """For the topic; `source` is topic, partition, offset."""
        return dead_letter_record(self._topic, self._partitions, reason=reason, source=source, digest=digest)


def _sealed(key: SealingKey, fault: Faulty) -> bytes:
    prefix = Header(suite=key.suite, scope_kind=key.scope.kind, key_id=key.key_id, key_version=key.version, framed=False).prefix()
    aad = dead_letter_aad(key.scope.tenant, fault.lease.source_id, fault.lease.partition, fault.offset, prefix)
    return seal(key.cipher, prefix, aad, fault.value or b"")
