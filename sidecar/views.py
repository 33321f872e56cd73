"""Projection: which views want a stream's events, and the records that they get."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

from sidecar.core.model import Event, Headers, duration_ms
from sidecar.core.view import view_headers, view_key, view_partition
from sidecar.kafka.producer import Outgoing
from sidecar.settings import ViewSettings

_TOPIC = itemgetter(0)


@dataclass(frozen=True, slots=True)
class View:
    """A view with its recorded partition count, which never changes: a later tombstone must find the partition."""

    settings: ViewSettings
    partitions: int


class Views:
    """Routes by topic, class and tenant; answers are remembered."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = list(views)
        self._names = {v.settings.topic: v.settings.name for v in views}
        self._routes: dict[tuple[str, str, str], tuple[View, ...]] = {}
        self._by_tenant = any(v.settings.match.tenants != ["*"] for v in views)

    def __bool__(self) -> bool:
        return bool(self._views)

    def counted(self, records: Iterable[Outgoing]) -> list[tuple[str, int]]:
        """How many of the records are whose view's."""
        return [(self._names[topic], n) for topic, n in Counter(map(_TOPIC, records)).items() if topic in self._names]

    def matching(self, topic: str, stream_class: str, tenant: str) -> tuple[View, ...]:
        at = (topic, stream_class, tenant if self._by_tenant else "")
        found = self._routes.get(at)
        if found is None:
            if len(self._routes) > 100_000:
                self._routes.clear()
            found = tuple(v for v in self._views if _wants(v.settings, topic, stream_class, tenant))
            self._routes[at] = found
        return found


def _wants(view: ViewSettings, topic: str, stream_class: str, tenant: str) -> bool:
    match = view.match
    asked = ((topic, match.topics), (stream_class, match.classes), (tenant, match.tenants))
    return all(any(fnmatchcase(value, glob) for glob in globs) for value, globs in asked)


def project(
    views: Iterable[View],
    *,
    topic: str,
    partition: int,
    offset: int,
    tenant: str,
    stream: str,
    stream_class: str,
    position: int,
    message_id: bytes,
    type_: bytes,
    value: bytes | None,
    key: bytes | None,
    timestamp_ms: int,
    headers: Headers,
    subject: str | None = None,
    origin: Any = None,
) -> list[Outgoing]:
    """The view records of one event: the same to the byte from the source record and from the store."""
    out_headers = view_headers(
        headers,
        timestamp_ms,
        message_id=message_id,
        type_=type_,
        tenant=tenant.encode(),
        stream=stream.encode(),
        stream_class=stream_class.encode(),
        position=position,
        source=(topic.encode(), partition, offset),
        subject=None if subject is None else subject.encode(),
    )
    path = f"{tenant}/{stream}"
    return [
        Outgoing(
            view.settings.topic,
            view_partition(path, view.partitions),
            view_key(view.settings.key, path, position, key),
            value,
            out_headers,
            origin,
        )
        for view in views
    ]


def project_event(views: Views, event: Event, origin: Any = None) -> list[Outgoing]:
    """From the store, on a replay."""
    if event.source is None:
        return []
    topic, partition, offset = event.source
    return project(
        views.matching(topic, event.stream_class, event.tenant),
        topic=topic,
        partition=partition,
        offset=offset,
        tenant=event.tenant,
        stream=event.stream,
        stream_class=event.stream_class,
        position=event.position,
        message_id=event.message_id.encode(),
        type_=event.type.encode(),
        value=event.value,
        key=event.key,
        timestamp_ms=event.timestamp_ms,
        headers=event.headers,
        subject=event.subject,
        origin=origin,
    )


def dead_letter_record(topic: str, partitions: int, *, reason: str, source: tuple[str, int, int], digest: bytes) -> Outgoing:
    """What the dead letter topic gets: where, why and a digest. No value: whether it is sensitive is not known of a faulty record."""
    source_topic, partition, offset = source
    headers: Headers = [
        ("reason", reason.encode()),
        ("source_topic", source_topic.encode()),
        ("source_partition", b"%d" % partition),
        ("source_offset", b"%d" % offset),
        ("value_sha256", digest.hex().encode()),
    ]
    key = f"{source_topic}/{partition}/{offset}".encode()
    return Outgoing(topic, partition % partitions, key, b"", headers)


def topic_config(view: ViewSettings, max_record_bytes: int) -> dict[str, str]:
    """A view's topic: compacted so that tombstones erase, deleted so that it ends, both within what was promised."""
    within = str(duration_ms(view.erase_within))
    return {
        "cleanup.policy": "compact,delete",
        "retention.ms": str(duration_ms(view.retention)),
        "max.compaction.lag.ms": within,
        "segment.ms": within,
        "delete.retention.ms": "86400000",
        "max.message.bytes": str(max_record_bytes + 65_536),
    }
