"""Publish and follow a topic as any application would: for the command line."""

from collections.abc import Iterator

from confluent_kafka import Consumer, Message, Producer, TopicPartition

from sidecar.core.errors import BrokerUnavailable, ConfigurationError
from sidecar.core.model import Headers
from sidecar.kafka.admin import Admin
from sidecar.kafka.client import client_config, mapped
from sidecar.settings import Settings

TIMEOUT_SECONDS = 10.0


def send(settings: Settings, topic: str, *, key: bytes | None, value: bytes | None, headers: Headers) -> tuple[int, int]:
    """-> (partition, offset) of the written record. Raises BrokerUnavailable when it was not acknowledged in time."""
    at: list[tuple[int, int]] = []
    producer = Producer(client_config(settings, acks="all", **{"message.max.bytes": 100_000_000, "message.timeout.ms": 10_000}))

    def delivered(error: object, message: Message) -> None:
        partition, offset = message.partition(), message.offset()
        if error is None and partition is not None and offset is not None:
            at.append((partition, offset))

    with mapped():
        producer.produce(topic, value, key, headers=list(headers), on_delivery=delivered)
        producer.flush(TIMEOUT_SECONDS)
    if not at:
        raise BrokerUnavailable("Kafka did not acknowledge the record")
    return at[0]


def follow(settings: Settings, topic: str, *, from_beginning: bool) -> Iterator[Message]:
    """Committed records of all partitions, for ever."""
    found = Admin(settings).describe([topic]).get(topic)
    if found is None:
        raise ConfigurationError(f"there is no topic {topic}", where="the broker", mend="`sidecar topics apply` creates views; check the name")
    consumer = Consumer(
        client_config(
            settings,
            **{"group.id": "sidecar.subscribe", "enable.auto.commit": False, "auto.offset.reset": "earliest", "isolation.level": "read_committed"},
        )
    )
    low, high = Admin(settings).offsets({topic: found.partitions}, end=False), Admin(settings).offsets({topic: found.partitions})
    begin = low if from_beginning else high
    with mapped():
        consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in begin[topic].items()])
    try:
        while True:
            message = consumer.poll(0.5)
            if message is not None and message.error() is None:
                yield message
    finally:
        consumer.close()
