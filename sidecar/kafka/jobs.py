"""Chunks onto the jobs topic, spread over its partitions. Calls block."""

from collections.abc import Sequence

from confluent_kafka import Producer

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped
from sidecar.settings import Settings

CONFIG = {"cleanup.policy": "delete", "retention.ms": "604800000"}
TIMEOUT_SECONDS = 10.0


def publish(settings: Settings, values: Sequence[bytes]) -> None:
    """Raises BrokerUnavailable if not all of them were acknowledged: then any of them may be there."""
    arrived = 0

    def delivered(error: object, _message: object) -> None:
        nonlocal arrived
        arrived += error is None

    producer = Producer(client_config(settings, acks="all", **{"message.timeout.ms": 10_000}))
    with mapped():
        for number, value in enumerate(values):
            producer.produce(settings.jobs.topic, value, partition=number % settings.jobs.partitions, on_delivery=delivered)
            producer.poll(0)
        producer.flush(TIMEOUT_SECONDS)
    if arrived != len(values):
        raise BrokerUnavailable("Kafka did not acknowledge the chunks")
