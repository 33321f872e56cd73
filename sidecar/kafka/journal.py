"""A topic of ours that is kept for ever, read whole. Calls block."""

from collections.abc import Iterator
from typing import Final

from sidecar.kafka.admin import Admin
from sidecar.kafka.reading import read as read_span
from sidecar.settings import Settings

FOR_EVER: Final = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}


def read(settings: Settings, topic: str) -> Iterator[tuple[int, int, bytes | None, bytes | None]]:
    """-> (partition, offset, key, value) of each record, from the beginning to the end; nothing if there is no such topic.

    Raises BrokerUnavailable or AccessDenied: a topic that could not be read to its end was not read.
    """
    found = Admin(settings).describe([topic]).get(topic)
    if found is None:
        return
    for message in read_span(settings, topic, {partition: (0, None) for partition in range(found.partitions)}):
        yield message.partition() or 0, message.offset() or 0, message.key(), message.value()
