"""The two applications of the demo, with nothing but confluent_kafka: one publishes CloudEvents, one subscribes to the decrypted view."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

ERASED = "io.sidecar.erased.v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    tenant: str
    stream: str
    type: str
    value: bytes
    id: str = field(default_factory=lambda: str(uuid4()))

    @property
    def headers(self) -> list[tuple[str, str | bytes | None]]:
        """CloudEvents, binary mode."""
        attributes = {"specversion": "1.0", "id": self.id, "source": "/demo/shop", "type": self.type}
        return [(f"ce_{k}", v) for k, v in (attributes | {"tenantid": self.tenant, "streamid": self.stream}).items()]


class Publisher:
    """Remembers the id of every event that the broker took: what must be in the store and in the view, once."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self.topic = topic
        self._common = {"bootstrap.servers": bootstrap, "acks": "all", "linger.ms": 5, "enable.idempotence": True, "log_level": 2}
        self._plain = Producer(self._common)
        self._transactional: Producer | None = None
        self.published: set[str] = set()

    def publish(self, events: list[Event]) -> None:
        """Returns when the broker has all of them."""
        self._produce(self._plain, events)

    def publish_at_once(self, events: list[Event]) -> None:
        """In one transaction: to a reader of committed records they appear all together, as a backlog."""
        if self._transactional is None:
            self._transactional = Producer({**self._common, "transactional.id": f"demo-shop-{uuid4()}"})
            self._transactional.init_transactions(30)
        self._transactional.begin_transaction()
        self._produce(self._transactional, events)
        self._transactional.commit_transaction(30)

    def _produce(self, producer: Producer, events: list[Event]) -> None:
        def taken(error: KafkaError | None, _message: Message) -> None:
            if error is not None:
                raise KafkaException(error)

        for event in events:
            key = f"{event.tenant}/{event.stream}"
            while True:
                try:
                    producer.produce(self.topic, event.value, key, on_delivery=taken, headers=event.headers)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
        if producer.flush(60):
            raise TimeoutError("the broker did not take all events")
        self.published |= {event.id for event in events}


class Subscriber:
    """Reads a topic from its beginning, committed records only. Keeps count of ids, and the records asked for."""

    def __init__(self, bootstrap: str, topic: str, wanted: Callable[[str], bool] = lambda _id: False) -> None:
        config = {"bootstrap.servers": bootstrap, "group.id": f"demo-{uuid4()}", "isolation.level": "read_committed"}
        self._consumer = Consumer({**config, "enable.auto.commit": False, "enable.partition.eof": True, "log_level": 2})
        partitions = self._consumer.list_topics(topic, timeout=20).topics[topic].partitions
        self._consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        self._wanted = wanted
        self.partitions = set(partitions)
        self.seen: Counter[str] = Counter()
        self.kept: dict[str, Message] = {}
        self.notices: list[tuple[int, dict[str, Any]]] = []
        """Partition and value of each erased notice."""

    def read(self) -> Iterator[Message]:
        """What is there now, then an end."""
        left = set(self.partitions)
        while left:
            for message in self._consumer.consume(2000, 0.5):
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition() or 0)
                elif not error.retriable():
                    raise KafkaException(error)

    def poll(self) -> int:
        """Take in what has come; -> how many different events were seen so far."""
        for message in self._consumer.consume(2000, 0.05):
            error = message.error()
            if error is None:
                self.take(message)
            elif error.code() != KafkaError._PARTITION_EOF and not error.retriable():
                raise KafkaException(error)
        return len(self.seen)

    def take(self, message: Message) -> None:
        """Count it; a notice is no event, and a tombstone (without headers) takes a record away."""
        headers = header_texts(message)
        if not headers:
            return
        if headers["ce_type"] == ERASED:
            self.notices.append((message.partition() or 0, json.loads(message.value() or b"{}")))
            return
        self.seen[headers["ce_id"]] += 1
        if self._wanted(headers["ce_id"]):
            self.kept[headers["ce_id"]] = message

    def close(self) -> None:
        self._consumer.close()


def header_texts(message: Message) -> dict[str, str]:
    return {name: (raw or b"").decode() for name, raw in message.headers() or []}  # type: ignore[union-attr]


def make_topic(bootstrap: str, topic: str, partitions: int) -> None:
    """The source topic belongs to the application, so the application makes it."""
    client = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    client.create_topics([NewTopic(topic, partitions, 1)])[topic].result(30)


def journal(bootstrap: str, topic: str) -> list[tuple[int, Any]]:
    """Every record of a topic as it is now: its timestamp in ms, its JSON value."""
    reader = Subscriber(bootstrap, topic)
    try:
        return [(message.timestamp()[1], json.loads(message.value() or b"null")) for message in reader.read()]
    finally:
        reader.close()


def event_ids(bootstrap: str, topic: str) -> Counter[str]:
    """How often each event stands in a topic as it is now, to a reader of committed records."""
    reader = Subscriber(bootstrap, topic)
    try:
        for message in reader.read():
            reader.take(message)
        return reader.seen
    finally:
        reader.close()
