"""What still stands in a view topic, committed or not. Blocks: run it with `asyncio.to_thread`."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped
from sidecar.settings import Settings

STALLED_SECONDS: Final = 30.0

Belongs = Callable[[str, str, str, int], bool]
"""(tenant, stream, class, position) of a view record: is it one of those that are looked for?"""


def payloads(settings: Settings, topic: str, span: Mapping[int, tuple[int, int]], belongs: Belongs) -> dict[tuple[int, str], tuple[int, int]]:
    """Records with a value, from an offset to below another of each partition; -> (partition, stream) → how many, newest position.

    Aborted ones count too: their bytes are on the broker's disk like any other's. Notices have no stream and do not count.
    """
    own = {"group.id": f"{settings.deployment}.control.scan", "enable.auto.commit": False, "isolation.level": "read_uncommitted"}
    own |= {"auto.offset.reset": "earliest", "enable.partition.eof": True, "client.id": f"scan-{secrets.token_hex(4)}"}
    found: dict[tuple[int, str], tuple[int, int]] = {}
    waiting = {partition for partition, (start, end) in span.items() if start < end}
    if not waiting:
        return found
    consumer = Consumer(client_config(settings, **own))
    try:
        with mapped():
            consumer.assign([TopicPartition(topic, partition, span[partition][0]) for partition in waiting])
            heard = time.monotonic()
            while waiting:
                for message in consumer.consume(5000, 0.2):
                    heard = time.monotonic()
                    _take(message, span, waiting, found, belongs)
                if time.monotonic() - heard > STALLED_SECONDS:
                    raise BrokerUnavailable("a view topic could not be read to the barrier")
    finally:
        consumer.close()
    return found


def _take(
    message: Any, span: Mapping[int, tuple[int, int]], waiting: set[int], found: dict[tuple[int, str], tuple[int, int]], belongs: Belongs
) -> None:
    partition, error = message.partition(), message.error()
    if error is not None:
        if error.code() != KafkaError._PARTITION_EOF:
            raise KafkaException(error)
        waiting.discard(partition)
        return
    if message.offset() >= span[partition][1]:
        waiting.discard(partition)
        return
    if message.value() is None:
        return
    headers = {name: (value or b"").decode("utf-8", "replace") for name, value in message.headers() or () if name in _NAMES}
    position = headers.get("ce_streamposition", "")
    if position.isdigit() and belongs(
        headers.get("ce_tenantid", ""), headers.get("ce_streamid", ""), headers.get("ce_streamtype", ""), int(position)
    ):
        at = (partition, headers["ce_streamid"])
        count, newest = found.get(at, (0, 0))
        found[at] = (count + 1, max(newest, int(position)))


_NAMES: Final = frozenset({"ce_tenantid", "ce_streamid", "ce_streamtype", "ce_streamposition"})
