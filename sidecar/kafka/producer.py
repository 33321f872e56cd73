"""The view side: one transactional producer, its calls in one thread.

librdkafka lacks KIP-890's client part: when the outcome of a commit is not known, the only way to find out is a new producer
with the same transactional id (`reopen`), which ends the old transaction one way or the other.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from sidecar import telemetry
from sidecar.core.errors import BrokerUnavailable, ConfigurationError
from sidecar.core.model import Headers
from sidecar.kafka.client import FENCED_CODES, OutcomeUnknown, ProducerFenced, client_config, translate
from sidecar.kafka.consumer import Partition
from sidecar.settings import Settings

COMMIT_SECONDS = 10.0
"""After a broker was killed a transaction can hang; `reopen` settles it, so waiting longer only delays."""
INIT_SECONDS = 10.0
EMIT_SECONDS = 12.0


class Outgoing(NamedTuple):
    """A record to produce; `origin` finds its source record again when the broker finds it too large."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    origin: Any = None


class TooLarge(Exception):
    """Some records exceed what the broker takes; the transaction was aborted. Internal to projection."""

    def __init__(self, origins: list[Any]) -> None:
        super().__init__(f"{len(origins)} records too large")
        self.origins = origins


class TransactionalProducer:
    """Emits a batch's records and offsets in one transaction. Raises ProducerFenced, OutcomeUnknown or BrokerUnavailable;
    after any of them `reopen` before the next `emit`."""

    def __init__(self, settings: Settings, instance_id: str) -> None:
        self._settings, self._id = settings, settings.transactional_id(instance_id)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kafka-views")
        self._producer: Producer | None = None
        self._singly = False
        """Each record in a batch of its own: the broker refuses whole batches, and does not say for which record's sake."""
        self._refused: list[Any] = []
        self.left_behind = 0
        """Threads that a call of librdkafka may still hold."""

    async def reopen(self) -> None:
        """A new producer: whatever an older one with this id had open is ended when this returns."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._reopen)

    def _reopen(self) -> None:
        if self._producer is not None:
            with suppress(KafkaException):
                self._producer.purge()
            self._producer = None
        producer = Producer(
            client_config(
                self._settings,
                **{
                    "transactional.id": self._id,
                    "enable.idempotence": True,
                    "acks": "all",
                    "transaction.timeout.ms": 20_000,
                    "linger.ms": 5,
                    "batch.num.messages": 10_000,
                    "queue.buffering.max.messages": 500_000,
                    "queue.buffering.max.kbytes": 262_144,
                    "message.max.bytes": int(self._settings.limits.max_record_bytes) + 65_536,
                    "compression.type": "lz4",
                    "delivery.report.only.error": True,
                    "on_delivery": self._undelivered,
                }
                | ({"batch.num.messages": 1} if self._singly else {})
                | dict(self._settings.kafka.client),
            )
        )
        try:
            producer.init_transactions(INIT_SECONDS)
        except KafkaException as error:
            raise self._translated(error.args[0]) from None
        self._producer = producer

    async def emit(self, records: Iterable[Outgoing], offsets: Mapping[Partition, int], group_metadata: Any) -> None:
        """One transaction: all of it is visible to a read_committed consumer, or none."""
        emitting = asyncio.get_running_loop().run_in_executor(self._thread, self._emit, records, offsets, group_metadata)
        try:
            async with asyncio.timeout(EMIT_SECONDS):
                await emitting
        except TimeoutError:
            # librdkafka's calls outlast their own timeouts when the broker was killed under them: that producer is left to its thread,
            # and the next one fences it
            self._thread, self._producer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kafka-views"), None
            self.left_behind += 1
            raise OutcomeUnknown("Kafka: a transaction hangs") from None

    def _emit(self, records: Iterable[Outgoing], offsets: Mapping[Partition, int], group_metadata: Any) -> None:
        producer = self._producer
        if producer is None:
            raise OutcomeUnknown("Kafka: the producer is not open")
        self._refused.clear()
        try:
            producer.begin_transaction()
            too_large = self._produce(producer, records)
            if too_large:
                producer.abort_transaction(COMMIT_SECONDS)
                raise TooLarge(too_large)
            if offsets:
                positions = [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets.items()]
                producer.send_offsets_to_transaction(positions, group_metadata, COMMIT_SECONDS)
            if not self._delivered(producer):
                producer.abort_transaction(COMMIT_SECONDS)
                raise self._found_too_large()
            producer.commit_transaction(COMMIT_SECONDS)
        except KafkaException as error:
            failed = self._failed(producer, error.args[0])
            raise self._found_too_large() if self._refused and not isinstance(failed, ProducerFenced) else failed from None

    def _delivered(self, producer: Producer) -> bool:
        """Has the broker all records? False as soon as it refuses one: a commit would wait for those behind it until its time is up."""
        until = time.monotonic() + COMMIT_SECONDS
        while producer.flush(0.05) and not self._refused and time.monotonic() < until:
            pass
        return not self._refused

    def _undelivered(self, error: KafkaError, _message: Any, origin: Any = None) -> None:
        """The broker did not take a record; called in the thread of `emit`, for failures alone."""
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            self._refused.append(origin)

    def _found_too_large(self) -> TooLarge:
        """A topic takes less than the client may send. Which records are too large shows when each is sent by itself: from now on."""
        if self._singly:
            return TooLarge([origin for origin in self._refused if origin is not None])
        self._singly = True
        telemetry.log.warning(
            "a view's topic takes less than a batch: records are sent one by one; raise its max.message.bytes", extra={"action": "project"}
        )
        self._reopen()
        return TooLarge([])

    def _produce(self, producer: Producer, records: Iterable[Outgoing]) -> list[Any]:
        """Hand the records to the client; answers the origins of those that it refuses as too large."""
        too_large: list[Any] = []
        produce = producer.produce
        for topic, partition, key, value, headers, origin in records:
            more: dict[str, Any] = {"on_delivery": partial(self._undelivered, origin=origin)} if self._singly else {}
            while True:
                try:
                    produce(topic, value, key, partition, headers=cast(Any, headers), **more)
                    break
                except BufferError:
                    producer.poll(0.1)
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                        raise
                    too_large.append(origin)
                    break
        producer.poll(0)
        return too_large

    def _failed(self, producer: Producer, error: KafkaError) -> Exception:
        """What a failed transaction means. An abortable one is aborted here, so that its outcome is known."""
        if error.txn_requires_abort():
            try:
                producer.abort_transaction(COMMIT_SECONDS)
            except KafkaException:
                return OutcomeUnknown(f"Kafka: {error.name()}, and the transaction could not be aborted")
        return self._translated(error)

    @staticmethod
    def _translated(error: KafkaError) -> Exception:
        if error.code() in FENCED_CODES:
            return ProducerFenced(f"Kafka: {error.name()}")
        ours = translate(error)
        if isinstance(ours, ConfigurationError):
            return ours
        return ours if not isinstance(ours, BrokerUnavailable) else OutcomeUnknown(f"Kafka: {error.name()}")

    async def close(self) -> None:
        self._producer = None
        self._thread.shutdown(wait=False)
