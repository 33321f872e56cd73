"""What becomes of a record that cannot be stored (docs/adr/0005): a row, and a record on the dead letter topic."""

from hashlib import sha256

from sidecar.core.aead import Suite
from sidecar.core.envelope import Header, dead_letter_aad, seal
from sidecar.core.keys import TenantState
from sidecar.core.model import Scope, ScopeKind
from sidecar.core.streams import SealingKey, Tenant
from sidecar.kafka.producer import Outgoing
from sidecar.postgres.batches import DeadLetter
from sidecar.streams import Streams
from sidecar.views import dead_letter_record
from sidecar.work import Faulty, Work


class DeadLetters:
    """`topic` has `partitions`."""

    def __init__(self, streams: Streams, topic: str, partitions: int) -> None:
        self._streams, self._topic, self._partitions = streams, topic, partitions

    async def keys(self, work: Work) -> list[SealingKey]:
        """What the batch's values will be sealed with, once per seal."""
        return [await self._key(work, tenant) for fault in work.faulty if (tenant := self._sealed_for(fault)) is not None]

    def _sealed_for(self, fault: Faulty) -> Tenant | None:
        tenant = self._streams.tenants[fault.tenant.encode()] if fault.tenant else None
        return tenant if tenant is not None and tenant.exists and tenant.state == TenantState.ACTIVE and fault.value else None

    async def _key(self, work: Work, tenant: Tenant) -> SealingKey:
        return await self._streams.shared_key(Scope.of_tenant(tenant.id), tenant, Suite.AES_256_GCM, work.fresh)

    async def add(self, work: Work, fault: Faulty) -> None:
        """Hash and coordinates; the value sealed under the tenant's own key where there is such a tenant."""
        sealed = None
        tenant = self._streams.tenants[fault.tenant.encode()] if fault.tenant else None
        if fault.value and self._sealed_for(fault) is not None and tenant is not None:
            work.tenants[tenant.id] = tenant
            key = await self._key(work, tenant)
            prefix = Header(suite=key.suite, scope_kind=ScopeKind.TENANT, key_id=key.key_id, key_version=key.version, framed=False).prefix()
            aad = dead_letter_aad(tenant.id, fault.lease.source_id, fault.lease.partition, fault.offset, prefix)
            sealed = seal(key.cipher, prefix, aad, fault.value)
        lease, digest = fault.lease, sha256(fault.value or b"").digest()
        work.dead_letters.append(
            DeadLetter(
                source_id=lease.source_id,
                partition=lease.partition,
                offset=fault.offset,
                reason=fault.reason,
                tenant=tenant.id if tenant is not None and tenant.exists else None,
                value_sha256=digest,
                value_encrypted=sealed,
            )
        )
        if fault.projected:
            work.outgoing.append(self.record((lease.topic, lease.partition, fault.offset), fault.reason, digest))

    def record(self, source: tuple[str, int, int], reason: str, digest: bytes = sha256().digest()) -> Outgoing:
        """For the topic; `source` is topic, partition, offset."""
        return dead_letter_record(self._topic, self._partitions, reason=reason, source=source, digest=digest)
