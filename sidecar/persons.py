"""Whose a record is, where policy seals each person's events under a key of that person.

A record that names nobody is a dead letter without its value: under a key of the stream or the tenant it would look like any other event,
and a shred of the person would leave it readable without anybody knowing (docs/adr/0005).
"""

from sidecar import telemetry
from sidecar.core.aead import Suite
from sidecar.core.errors import MalformedRecord
from sidecar.core.extract import subject_of
from sidecar.core.streams import SealingKey, Tenant
from sidecar.streams import Streams
from sidecar.work import Faulty, Item, Work


class Persons:
    """Keeps nothing: persons in hand are the cache's."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def resolve(self, work: Work, items: list[Item]) -> list[SealingKey]:
        """Give each item its person, with one round trip for those not in hand. -> the keys, once per seal. Raises Unavailable.

        Items without a person leave the batch's items for its faulty ones.
        """
        named: list[tuple[Item, Tenant, str, Suite]] = []
        nobodys: set[int] = set()
        missing: dict[tuple[bytes, str, Suite], tuple[Tenant, str, Suite]] = {}
        for item in items:
            by = item.place.by_subject if item.place is not None else None
            if by is None or by.subject is None:
                continue
            tenant = self._streams.tenants[item.tenant]
            try:
                name = subject_of(by.subject, item.lease.topic, item.key, item.value, dict(item.headers))
            except MalformedRecord as error:
                nobodys.add(id(item))
                work.faulty.append(Faulty(item.lease, item.offset, error.reason, tenant.id, item.stream, item.value, item.projected))
                continue
            named.append((item, tenant, name, by.suite))
            if self._streams.find_subject(tenant, name, by.suite) is None:
                missing[item.tenant, name, by.suite] = (tenant, name, by.suite)
        if missing:
            await self._streams.load_subjects(missing.values(), work.fresh)
        if nobodys:
            work.items = [item for item in work.items if id(item) not in nobodys]
            telemetry.log.warning("records name no person where policy seals by person", extra={"action": "seal", "records": len(nobodys)})
        keys = []
        for item, tenant, name, suite in named:
            item.subject = self._streams.find_subject(tenant, name, suite)
            if item.subject is not None and item.subject.key is not None:
                keys.append(item.subject.key)
        return keys
