"""A topic, read from somewhere to somewhere. Calls block: run them with `asyncio.to_thread`."""

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped
from sidecar.settings import Settings

SILENCE_SECONDS: Final = 30.0
"""How long the broker may give nothing before the end was reached."""


def read(settings: Settings, topic: str, span: Mapping[int, tuple[int, int | None]], *, committed: bool = True) -> Iterator[Message]:
    """The records of each partition from an offset to below another; None: to the end as it is met. In order within a partition.

    Raises BrokerUnavailable or AccessDenied: what could not be read to its end was not read.
    """
    waiting = {partition: end for partition, (start, end) in span.items() if end is None or start < end}
    if not waiting:
        return
    own: dict[str, str | bool] = {"group.id": f"{settings.deployment}.read.{secrets.token_hex(4)}", "enable.auto.commit": False}
    own |= {"isolation.level": "read_committed" if committed else "read_uncommitted", "enable.partition.eof": True}
    own |= {"auto.offset.reset": "earliest"}  # records may have been deleted from the start
    consumer = Consumer(client_config(settings, **own))
    try:
        with mapped():
            consumer.assign([TopicPartition(topic, partition, span[partition][0]) for partition in waiting])
            heard = time.monotonic()
            while waiting:
                for message in consumer.consume(5000, 0.2):
                    heard = time.monotonic()
                    partition, offset, error = message.partition() or 0, message.offset() or 0, message.error()
                    if error is not None and error.code() != KafkaError._PARTITION_EOF:
                        raise KafkaException(error)
                    if partition not in waiting:
                        continue
                    end = waiting[partition]
                    if error is None and (end is None or offset < end):
                        yield message
                    if error is not None if end is None else offset + (error is None) >= end:
                        del waiting[partition]
                if time.monotonic() - heard > SILENCE_SECONDS:
                    raise BrokerUnavailable(f"the topic {topic} could not be read to its end")
    finally:
        consumer.close()
