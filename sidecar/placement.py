"""Where each record of a batch belongs: its tenant, stream and person, and a key with room to seal it. Whatever is not in hand is read in
one round trip for all; the KMS is called here, before any lock."""

from sidecar.core.errors import MalformedRecord
from sidecar.core.policy import Classifier, PolicySet
from sidecar.core.streams import SealingKey, Tenant, Touch
from sidecar.dead_letters import DeadLetters
from sidecar.persons import Persons
from sidecar.streams import Streams
from sidecar.work import Faulty, Item, Work


class Placement:
    """Keeps nothing: what is in hand is the cache's."""

    def __init__(self, streams: Streams, classifier: Classifier, persons: Persons, dead_letters: DeadLetters) -> None:
        self._streams, self._classifier, self._persons, self._dead_letters = streams, classifier, persons, dead_letters

    async def place(self, work: Work, policies: PolicySet) -> None:
        """Fills `place` and `subject` of the items, the batch's tenants and dead letters, and what it makes anew. Raises Unavailable."""
        streams = self._streams
        held = streams.tenants
        unknown = {item.tenant for item in work.items if item.tenant not in held}
        unknown |= {f.tenant.encode() for f in work.faulty if f.tenant and f.tenant.encode() not in held}
        if unknown:
            await streams.load_tenants(sorted(raw.decode() for raw in unknown))
        touches: dict[tuple[bytes, bytes], Touch] = {}
        unplaced: list[Item] = []
        for item in work.items:
            tenant = held[item.tenant]
            if tenant.id not in work.tenants:
                work.tenants[tenant.id] = tenant
                if not tenant.exists:
                    work.fresh.tenants.append(tenant.id)
                    tenant.exists = True  # staged: discarded with the batch
            if tenant.refusal is None and not (tenant.barriers and self._is_late(tenant, item)):
                item.place = streams.find(tenant, item.stream)
                if item.place is None:
                    unplaced.append(item)
                    if (item.tenant, item.stream) not in touches:
                        touches[item.tenant, item.stream] = self._touch(tenant, item)
        if work.faulty:
            touches = await self._dead_letters.touches(work) | touches
        if touches:
            await streams.load_streams(list(touches.values()), policies, work.fresh)
            for item in unplaced:
                item.place = streams.find(held[item.tenant], item.stream)
        await self._make_room(work)
        for fault in work.faulty:
            await self._dead_letters.add(work, fault)

    async def _make_room(self, work: Work) -> None:
        """Each key that the batch seals with may seal as often as it will, or has a successor from here on."""
        needs: dict[SealingKey, int] = {}
        fields: dict[SealingKey, int] = {}
        personal: list[Item] = []
        documents: list[Item] = []
        for item in work.items:
            stream = item.place
            if stream is None or stream.refusal is not None:
                continue
            if stream.fields is not None and item.value is not None:
                documents.append(item)
                if not _take_apart(work, item):
                    continue
            if stream.key is not None:
                needs[stream.key] = needs.get(stream.key, 0) + 1
            elif stream.by_subject is not None:
                personal.append(item)
        if any(item.document is None for item in documents):
            faulty = {id(item) for item in documents if item.document is None}
            work.items = [item for item in work.items if id(item) not in faulty]
        keys = await self._persons.resolve(work, personal) if personal else []
        if work.faulty:
            keys += await self._dead_letters.keys(work)
        for key in keys:
            needs[key] = needs.get(key, 0) + 1
        for item in documents:
            by = item.subject or item.place
            if by is not None and (sealing := by.key) is not None and item.document is not None:
                fields[sealing] = fields.get(sealing, 0) + len(item.document.places)
            if item.place is not None and item.place.fields is not None and item.place.fields.indexed:
                await self._streams.index_key(self._streams.tenants[item.tenant], work.fresh)
        self._streams.make_room(needs, work.fresh, fields)

    def _touch(self, tenant: Tenant, item: Item) -> Touch:
        stream = item.stream.decode()
        by_name = dict(item.headers)
        stream_class = self._classifier.classify(topic=item.lease.topic, type=item.type_lp[4:].decode(), stream=stream, headers=by_name)
        return Touch(tenant, item.stream, stream, stream_class)

    @staticmethod
    def _is_late(tenant: Tenant, item: Item) -> bool:
        """No stream is made for a record that stood in the topic when its tenant was shredded."""
        return tenant.refusal_of(item.lease.source_id, item.lease.partition, item.offset, None) is not None


def _take_apart(work: Work, item: Item) -> bool:
    """A record whose fields cannot be told from the rest is a dead letter: sealed whole it would not be what policy asks for, and plain never."""
    stream = item.place
    if stream is None or stream.fields is None or item.value is None:
        return True
    try:
        item.document = stream.fields.find(item.value)
    except MalformedRecord as error:
        work.faulty.append(Faulty(item.lease, item.offset, error.reason, item.tenant.decode(), item.stream, item.value, item.projected))
    return item.document is not None
