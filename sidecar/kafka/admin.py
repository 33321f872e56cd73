"""Topics, offsets and fencing, asked of the broker. Calls block: run them with `asyncio.to_thread`."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from sidecar.core.errors import BrokerUnavailable
from sidecar.kafka.client import client_config, mapped, translate
from sidecar.settings import Settings

TIMEOUT_SECONDS = 10.0
_ABSENT = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
_UNSETTLED = (KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.FENCED_LEADER_EPOCH, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION)
"""What a broker says of a partition that was made, or got another leader, in this moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicInfo:
    """A topic as it stands; `topic_id` differs after it was deleted and made again."""

    name: str
    topic_id: str
    partitions: int


class Admin:
    """One admin client, for the life of a process. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._refused: KafkaError | None = None
        self._client = AdminClient(client_config(settings, error_cb=self._heard))

    def _heard(self, error: KafkaError) -> None:
        """Called by `poll`: a client whose password is refused goes on trying, and what was asked of it only times out."""
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
            self._refused = error

    def describe(self, topics: Iterable[str]) -> dict[str, TopicInfo]:
        """Those of the topics that exist. Raises BrokerUnavailable."""
        names = list(topics)
        out: dict[str, TopicInfo] = {}
        if not names:
            return out
        for name, future in self._client.describe_topics(TopicCollection(names), request_timeout=TIMEOUT_SECONDS).items():
            try:
                found = future.result()
            except KafkaException as error:
                if error.args[0].code() not in _ABSENT:
                    self._client.poll(0)
                    raise translate(self._refused or error.args[0]) from None
                continue
            out[name] = TopicInfo(name=name, topic_id=str(found.topic_id), partitions=len(found.partitions))
        return out

    def list_topics(self) -> list[str]:
        """Every topic's name but Kafka's own."""
        with mapped():
            return sorted(name for name in self._client.list_topics(timeout=TIMEOUT_SECONDS).topics if not name.startswith("__"))

    def offsets(self, topics: Mapping[str, int], *, end: bool = True) -> dict[str, dict[int, int]]:
        """Log end (or start) offsets, {topic: {partition: offset}}; `topics` gives partition counts.

        The log end, not the last stable offset: `commit_transaction` returns before the markers are written.
        """
        spec = OffsetSpec.latest() if end else OffsetSpec.earliest()
        wanted = {TopicPartition(topic, p): spec for topic, count in topics.items() for p in range(count)}
        out: dict[str, dict[int, int]] = {topic: {} for topic in topics}
        until = time.monotonic() + TIMEOUT_SECONDS
        while wanted:
            futures = self._client.list_offsets(wanted, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=TIMEOUT_SECONDS)
            for tp, future in futures.items():
                try:
                    out[tp.topic][tp.partition] = future.result().offset
                except KafkaException as error:
                    if error.args[0].code() not in _UNSETTLED or time.monotonic() > until:
                        raise translate(error.args[0]) from None
            wanted = {tp: spec for tp, spec in wanted.items() if tp.partition not in out[tp.topic]}
            if wanted:
                time.sleep(0.02)
        return out

    def create(self, topic: str, partitions: int, config: Mapping[str, str]) -> bool:
        """True if it was made, False if it was there. Returns when a broker can be asked about it: that it stands is known earlier. Raises BrokerUnavailable."""
        new = NewTopic(topic, num_partitions=partitions, replication_factor=-1, config=dict(config))
        made = True
        try:
            self._client.create_topics([new], request_timeout=TIMEOUT_SECONDS)[topic].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise translate(error.args[0]) from None
            made = False  # by another instance, perhaps in this moment
        until = time.monotonic() + TIMEOUT_SECONDS
        while topic not in self.describe([topic]):
            if time.monotonic() > until:
                raise BrokerUnavailable(f"the broker made the topic {topic}, and does not show it")
            time.sleep(0.02)  # the controller has it; the broker that answers us hears of it a moment later
        return made

    def topic_config(self, topic: str) -> dict[str, str]:
        with mapped():
            resource = ConfigResource(ResourceType.TOPIC, topic)
            entries: dict[str, Any] = self._client.describe_configs([resource], request_timeout=TIMEOUT_SECONDS)[resource].result()
        return {name: entry.value for name, entry in entries.items()}

    def delete_records(self, below: Mapping[tuple[str, int], int]) -> None:
        """Delete what stands below the given offsets."""
        if below:
            wanted = [TopicPartition(topic, partition, offset) for (topic, partition), offset in below.items()]
            for future in self._client.delete_records(wanted, request_timeout=TIMEOUT_SECONDS).values():
                with mapped():
                    future.result()

    def groups_of(self, topic: str) -> dict[str, dict[str, int]]:
        """Consumer groups that have committed offsets on the topic: group → partition → offset. A question per group of the cluster."""
        with mapped():
            listed = self._client.list_consumer_groups(request_timeout=TIMEOUT_SECONDS).result()
            if listed.errors:
                raise listed.errors[0]  # a broker that did not answer may have groups of its own
            out: dict[str, dict[str, int]] = {}
            for group in sorted({entry.group_id for entry in listed.valid}):
                asked = self._client.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)], request_timeout=TIMEOUT_SECONDS)[group]
                at = {str(tp.partition): tp.offset for tp in asked.result().topic_partitions or () if tp.topic == topic and tp.offset >= 0}
                if at:
                    out[group] = at
        return out

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """The group's committed offsets on the topic; none where there is no such group."""
        found = self.describe([topic]).get(topic)
        wanted = [TopicPartition(topic, partition) for partition in range(found.partitions)] if found else []
        # asked by an admin client, of a broker that coordinates the group no more, librdkafka crashes the process (2.16)
        consumer = Consumer(client_config(self._settings, **{"group.id": group}))
        try:
            with mapped():
                at = consumer.committed(wanted, timeout=TIMEOUT_SECONDS)
                for tp in at:
                    if tp.error is not None:
                        raise KafkaException(tp.error)
        finally:
            consumer.close()
        return {tp.partition: tp.offset for tp in at if tp.offset >= 0}

    def fence(self, transactional_id: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Void whatever the producers with this id have open: what they send from now on is refused by the broker."""
        producer = Producer(client_config(self._settings, **{"transactional.id": transactional_id}))
        try:
            producer.init_transactions(timeout_seconds)
        except KafkaException as error:
            raise BrokerUnavailable(f"an instance could not be fenced: {error.args[0].name()}") from None
