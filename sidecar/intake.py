"""The way in: records as they came from Kafka become items, dead letters or replays. Dictionary hits, no I/O."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

from sidecar.core.aead import lp
from sidecar.core.errors import MalformedRecord, RecordError
from sidecar.core.extract import Extractor, occurred_at
from sidecar.core.model import Headers
from sidecar.kafka.consumer import Partition
from sidecar.postgres.batches import LeaseMove
from sidecar.postgres.leases import Lease
from sidecar.settings import LimitSettings
from sidecar.streams import Streams
from sidecar.work import Faulty, Item, Work

YIELD_EVERY_RECORDS = 100
"""Parsing and sealing give way to the batch in flight this often (docs/adr/0006)."""


class Intake:
    """Remembers which tenants and types it has checked."""

    def __init__(self, limits: LimitSettings, extractor_of: Callable[[str], Extractor], streams: Streams) -> None:
        self._limits, self._extractor_of, self._streams = limits, extractor_of, streams
        self._types: dict[bytes, bytes] = {}
        self._tenants_seen: dict[tuple[str, bytes], str] = {}

    async def parse(self, work: Work, owned: Mapping[Partition, Lease]) -> None:
        """Fill the batch: what is new to the store is an item or faulty, what only lacks its view records is a replay. Moves the staged cursors."""
        limits = self._limits
        max_bytes, max_headers = int(limits.max_record_bytes), limits.max_headers
        extractors: dict[str, Extractor] = {}
        for at, (first, end) in work.batch.vanished.items():
            if (lease := owned.get(at)) is not None:
                work.ends[at], work.replays[at] = (lease, end), [first, end]
        items = work.items
        tenant: str | None
        named: bytes | None
        for number, message in enumerate(cast(list[Any], work.batch.messages)):  # the stubs make every coordinate optional
            if not number % YIELD_EVERY_RECORDS:
                await asyncio.sleep(0)  # the batch in flight goes on meanwhile
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            at = (topic, partition)
            lease = owned.get(at)
            if lease is None:
                continue
            projected = offset >= lease.projected
            work.ends[at] = (lease, offset + 1)
            if offset < lease.staged:
                if projected:
                    work.replays.setdefault(at, [offset, 0])[1] = offset + 1
                continue
            extractor = extractors.get(topic) or extractors.setdefault(topic, self._extractor_of(topic))
            value, key = message.value(), message.key()
            tenant, named = None, None
            try:
                headers: Headers = message.headers() or ()
                if len(headers) > max_headers:
                    raise MalformedRecord("too many headers", reason="too_many_headers")
                by_name = dict(headers)
                raw_tenant, raw_stream, raw_type, raw_id = extractor.raw(topic, partition, offset, key, value, by_name)
                tenant = self._tenant(topic, extractor, raw_tenant)
                stream = raw_stream or b""
                if self._streams.tenants.get(raw_tenant or b"") is None or not self._in_hand(raw_tenant or b"", stream):
                    extractor.check_stream(stream)
                named = stream
                if len(value or b"") + len(key or b"") > max_bytes:
                    raise MalformedRecord("over the limit", reason="too_large")
                type_lp = self._types.get(raw_type or b"") or self._type(extractor, raw_type)
                extractor.check_message_id(raw_id)
                timestamp_ms = message.timestamp()[1]
            except RecordError as error:
                work.faulty.append(Faulty(lease, offset, error.reason, tenant, named, value, projected))
                continue
            except (SystemError, UnicodeDecodeError):  # a header's name is no UTF-8: confluent_kafka cannot say it
                work.faulty.append(Faulty(lease, offset, MalformedRecord.reason, None, None, value, projected))
                continue
            occurred_us = occurred_at(by_name, timestamp_ms)
            items.append(
                Item(lease, offset, raw_tenant or b"", stream, type_lp, raw_id or b"", value, key, timestamp_ms, occurred_us, headers, projected)
            )
        for at, (lease, end) in work.ends.items():
            if end > lease.staged:
                work.moves[at] = LeaseMove(lease.source_id, lease.partition, lease.epoch, lease.staged, end)
                lease.staged = end

    def _tenant(self, topic: str, extractor: Extractor, raw: bytes | None) -> str:
        seen = self._tenants_seen.get((topic, raw or b""))
        if seen is None:
            seen = extractor.check_tenant(raw)
            if len(self._tenants_seen) > 100_000:
                self._tenants_seen.clear()
            self._tenants_seen[topic, raw or b""] = seen
        return seen

    def _in_hand(self, tenant: bytes, stream: bytes) -> bool:
        held = self._streams.tenants[tenant]
        return stream in held.streams or stream in held.aged

    def _type(self, extractor: Extractor, raw: bytes | None) -> bytes:
        packed = lp(extractor.check_type(raw).encode())
        if len(self._types) > 10_000:
            self._types.clear()
        self._types[raw or b""] = packed
        return packed
