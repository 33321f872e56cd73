"""A topic of ours that is kept for ever, read whole. Calls block."""

import secrets
import time
from collections.abc import Iterator
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped
from sidecar.settings import Settings

FOR_EVER: Final = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
SILENCE_SECONDS: Final = 30.0
"""How long the broker may give nothing before its end was reached."""


def read(settings: Settings, topic: str) -> Iterator[tuple[int, int, bytes | None, bytes | None]]:
    """-> (partition, offset, key, value) of each record, from the beginning to the end as it was at the call; nothing if there is no such topic.

    Raises BrokerUnavailable or AccessDenied: a topic that could not be read to its end was not read.
    """
    own: dict[str, str | bool] = {
        "group.id": f"{settings.deployment}.read.{secrets.token_hex(4)}",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
    }
    own |= {"isolation.level": "read_committed", "auto.offset.reset": "earliest"}  # earliest: records may have been deleted from the start
    consumer = Consumer(client_config(settings, **own))
    try:
        with mapped():
            found = consumer.list_topics(topic, timeout=10).topics[topic]
            if found.error is not None:
                if found.error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
                    return
                raise KafkaException(found.error)
            waiting = set(found.partitions)
            consumer.assign([TopicPartition(topic, partition, 0) for partition in waiting])
            heard = time.monotonic()
            while waiting:
                for message in consumer.consume(1000, 0.5):
                    heard = time.monotonic()
                    error = message.error()
                    if error is None:
                        yield message.partition() or 0, message.offset() or 0, message.key(), message.value()
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition() or 0)
                    else:
                        raise KafkaException(error)
                if time.monotonic() - heard > SILENCE_SECONDS:
                    raise BrokerUnavailable(f"the topic {topic} could not be read to its end")
    finally:
        consumer.close()
