"""What the control plane writes to Kafka: receipts, erased notices, tombstones, and (the command line) commands. Calls block.

Receipts go through a transactional producer: a predecessor that was killed, or cut off, is fenced by `open`, so that the search
for what it had already published sees all that it will ever have published. That makes it one receipt of each status.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped, translate
from sidecar.kafka.reading import read
from sidecar.settings import Settings

ID_HEADER = "outbox_id"
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A row of the outbox; `outbox_id` goes along as a header, by it a later start knows what is published."""

    outbox_id: UUID
    key: bytes | None
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRecord:
    """A notice (with a value) or a tombstone (without)."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]] = field(default_factory=list)


class ReceiptPublisher:
    """Owns one transactional producer; not to be used by two threads at once. Every call may raise BrokerUnavailable or ProducerFenced:
    then `close`, and `open` again before the next use."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.control.receipts
        self._producer: Producer | None = None

    @property
    def is_open(self) -> bool:
        return self._producer is not None

    def open(self) -> None:
        """Fence whoever published before."""
        own = {"transactional.id": f"{self._settings.deployment}/control/receipts", "linger.ms": 0, "transaction.timeout.ms": 30_000}
        producer = Producer(client_config(self._settings, **own))
        with mapped():
            producer.init_transactions(TIMEOUT_SECONDS)
        self._producer = producer

    def close(self) -> None:
        self._producer = None

    def publish(self, receipts: Sequence[Outgoing]) -> None:
        """All or none, in order. After an error the outcome may be either: `open`, then ask `already_published`."""
        if self._producer is None:
            raise BrokerUnavailable("the receipts' producer is not open")
        with mapped():
            self._producer.begin_transaction()
            for item in receipts:
                self._producer.produce(self._topic, item.value, key=item.key, headers=[(ID_HEADER, str(item.outbox_id).encode())])
            self._producer.commit_transaction(TIMEOUT_SECONDS)

    def already_published(self, since: datetime) -> set[UUID]:
        """The outbox ids that stand on the topic from then on, committed."""
        at = int(since.timestamp() * 1000)
        consumer = Consumer(client_config(self._settings, **{"group.id": f"{self._settings.deployment}.control.scan"}))
        try:
            with mapped():
                metadata = consumer.list_topics(self._topic, timeout=TIMEOUT_SECONDS).topics[self._topic]
                if metadata.error is not None:
                    raise KafkaException(metadata.error)
                starts = consumer.offsets_for_times([TopicPartition(self._topic, p, at) for p in metadata.partitions], timeout=TIMEOUT_SECONDS)
                for start in starts:
                    if start.error is not None:
                        raise KafkaException(start.error)
        finally:
            consumer.close()
        span: dict[int, tuple[int, int | None]] = {s.partition: (s.offset, None) for s in starts if s.offset >= 0}  # -1: nothing as new as that
        found: set[UUID] = set()
        for message in read(self._settings, self._topic, span):
            headers: Any = message.headers() or ()
            found.update(UUID(value.decode()) for name, value in headers if name == ID_HEADER)
        return found


class ViewWriter:
    """Erased notices and tombstones: idempotent, acks=all. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._producer = Producer(client_config(settings, **{"enable.idempotence": True, "linger.ms": 2, "message.timeout.ms": 10_000}))

    def write(self, records: Iterable[ViewRecord]) -> int:
        """Answers how many, when all of them are durable. Raises BrokerUnavailable: some may be written, write them again."""
        return _deliver(self._producer, ((r.topic, r.partition, r.key, r.value, r.headers) for r in records))


def publish_command(settings: Settings, tenant: str, value: bytes) -> None:
    """Put a command on the control topic; answers when it is durable. Raises BrokerUnavailable or AccessDenied."""
    # Not idempotent: that costs half a second at the producer's start, and the inbox knows a command that comes twice.
    producer = Producer(client_config(settings, **{"acks": "all", "linger.ms": 0, "message.timeout.ms": 10_000}))
    _deliver(producer, [(settings.control.topic, None, tenant.encode(), value, [])])


def _deliver(producer: Producer, records: Iterable[tuple[str, int | None, bytes, bytes | None, list[tuple[str, str | bytes | None]]]]) -> int:
    failed: list[KafkaError] = []
    count = 0

    def report(error: KafkaError | None, _message: object) -> None:
        if error is not None:
            failed.append(error)

    for topic, partition, key, value, headers in records:
        while True:
            try:
                producer.produce(topic, value, key=key, partition=-1 if partition is None else partition, headers=headers, on_delivery=report)
                break
            except BufferError:
                producer.poll(0.1)
            except KafkaException as error:
                raise translate(error.args[0]) from None
        count += 1
        producer.poll(0)
    left = producer.flush(TIMEOUT_SECONDS + 2)
    if failed:
        raise translate(failed[0])
    if left:
        raise BrokerUnavailable("the broker did not confirm in time")
    return count
