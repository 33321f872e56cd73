"""The source side: one consumer, used by one thread. Every call here is a coroutine that runs there, in order.

Rebalance callbacks run inside `next_batch` and `idle`, in that thread: a revocation blocks it until the flow has let go.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from sidecar import telemetry
from sidecar.core.errors import BrokerUnavailable, SidecarError
from sidecar.kafka.client import client_config, mapped, translate
from sidecar.settings import Settings

T = TypeVar("T")
Partition = tuple[str, int]
POLL_SECONDS = 0.1
RELEASE_SECONDS = 20.0
"""How long a revocation waits for the batch in flight before it gives the partition up as it is: leases and the group's
generation keep a batch that ends later from counting."""
CLOSE_SECONDS = 10.0
FENCED_AGAIN_SECONDS = 60.0
SEEK_SECONDS = 2.0


class InstanceReplaced(SidecarError):
    """Another process runs under this instance id; this one ends."""


@dataclass(slots=True)
class Batch:
    """Records as they came, and the group metadata of the moment they came: the only one their offsets may be committed with.

    `vanished` has ranges of offsets whose records are not in the topic any more, but in the store.
    """

    messages: list[Message]
    group_metadata: Any
    rewinds: int
    vanished: Mapping[Partition, tuple[int, int]] = field(default_factory=dict)


class KafkaSource:
    """`on_assigned` is called with new partitions, which stay paused until `start`; `on_revoked` must settle or abort their batch."""

    def __init__(
        self,
        settings: Settings,
        instance_id: str,
        *,
        on_assigned: Callable[[list[Partition]], None],
        on_revoked: Callable[[list[Partition], bool], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._instance_id = instance_id
        self._on_assigned, self._on_revoked = on_assigned, on_revoked
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kafka-source")
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[list[Message]] = deque()
        self._metadata: Any = None
        self._rewinds = 0
        self._paused: set[Partition] = set()
        self._patterns: list[str] = []
        self._dead, self._died = False, float("-inf")
        self._fatal_error: KafkaError | None = None
        self._consumer = self._create(classic=settings.kafka.group_protocol != "consumer")

    def _heard(self, error: KafkaError) -> None:
        """Client-wide news. A batch call returns empty after a fatal error for ever and does not say why: this does."""
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal_error = error

    def _create(self, *, classic: bool) -> Consumer:
        # Classic, static membership: a killed instance comes back at once under its instance id. Under KIP-848 the broker
        # answers UNRELEASED_INSTANCE_ID until the dead member's session times out (docs/adr/0003).
        protocol: dict[str, Any] = {"group.protocol": "consumer"}
        if classic:
            protocol = {"partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 15_000, "group.instance.id": self._instance_id}
        return Consumer(
            client_config(
                self._settings,
                **{
                    "group.id": self._settings.group_id,
                    "client.id": self._instance_id,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "error",
                    "isolation.level": "read_committed",
                    "queued.max.messages.kbytes": 24_576,
                    "fetch.message.max.bytes": int(self._settings.limits.max_record_bytes),
                    "topic.metadata.refresh.interval.ms": 5_000,
                    "allow.auto.create.topics": False,
                    "error_cb": self._heard,
                }
                | protocol
                | dict(self._settings.kafka.client),
            )
        )

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._thread, function, *arguments)

    async def subscribe(self, topics: Iterable[str]) -> None:
        """Names, or globs over names."""
        patterns = ["^" + re.escape(t).replace(r"\*", ".*").replace(r"\?", ".") + "$" if set(t) & set("*?[") else t for t in topics]

        self._patterns = patterns

        def subscribe() -> None:
            with mapped():
                self._consumer.subscribe(patterns, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

        await self._call(subscribe)

    async def next_batch(self) -> Batch:
        """Up to `batch.max_records` and about `batch.max_bytes`, after `batch.max_wait_ms` at the latest; may be empty.

        Raises InstanceReplaced, or BrokerUnavailable for errors that the client does not mend by itself.
        """
        return await self._call(self._next)

    def _next(self) -> Batch:
        if not self._waiting:
            batch = self._settings.batch
            try:
                received = self._consumer.consume(batch.max_records, batch.max_wait_ms / 1000)
            except KafkaException as error:
                raise self._fatal(error.args[0]) from None
            if not received and (single := self._consumer.poll(0)) is not None:  # serves callbacks that a batch call leaves waiting
                received = [single]
            self._check_fatal()
            # right behind consume and poll, in their thread: no rebalance callback can run in between
            self._metadata = self._consumer.consumer_group_metadata()
            self._split(received, int(batch.max_bytes))
        return Batch(self._waiting.popleft() if self._waiting else [], self._metadata, self._rewinds)

    def _split(self, received: list[Message], max_bytes: int) -> None:
        part: list[Message] = []
        size = 0
        for message in received:
            error = message.error()
            if error is not None:
                self._check(error)
                continue
            length = len(message)
            if part and size + length > max_bytes:
                self._waiting.append(part)
                part, size = [], 0
            part.append(message)
            size += length
        if part:
            self._waiting.append(part)

    def _check_fatal(self) -> None:
        error, self._fatal_error = self._fatal_error, None
        if error is not None:
            raise self._fatal(error)

    def _check(self, error: KafkaError) -> None:
        """Most errors are news that the client acts on by itself; a fatal one ends it, and records that went before they were read
        (retention) would leave their partition standing: whoever reads it claims it again, from where it begins now."""
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise BrokerUnavailable("Kafka: records are gone before they were read")
        if error.fatal() or error.code() in (KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID):
            raise self._fatal(error)

    def _fatal(self, error: KafkaError) -> SidecarError:
        """A fatal error ends the client; `idle` makes another. A broker that was killed may fence us with what it forgot; twice
        within a minute it is another process."""
        if error.fatal() or error.code() in (KafkaError._FATAL, KafkaError.FENCED_INSTANCE_ID):
            now = time.monotonic()
            self._fatal_error = None
            first = self._dead or now - self._died > FENCED_AGAIN_SECONDS
            self._dead, self._died = True, now
            if first:
                return BrokerUnavailable(f"Kafka: {error.name()}: the consumer has to join again")
        if self._dead or error.code() == KafkaError.UNRELEASED_INSTANCE_ID:
            return InstanceReplaced(f"another process runs as instance {self._instance_id}; give each its own --instance-id")
        return translate(error) if not error.fatal() else BrokerUnavailable(f"Kafka: {error.name()}")

    async def idle(self, seconds: float) -> None:
        """Stay in the group without reading, while something that is needed is away. Rebalance callbacks run."""
        await self._call(self._idle, seconds)

    def _idle(self, seconds: float) -> None:
        if self._dead:
            self._join_again()
        with suppress(KafkaException):
            assigned = self._consumer.assignment()
            self._consumer.pause(assigned)
            self._paused |= {(tp.topic, tp.partition) for tp in assigned}
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            # what still arrives here was rewound over, or will be: `start` seeks
            message = self._consumer.poll(min(left, POLL_SECONDS))
            if message is not None and (error := message.error()) is not None:
                self._check(error)
            self._check_fatal()

    def _join_again(self) -> None:
        """A new client in place of one that met a fatal error; what that one was assigned is lost."""
        assigned: list[TopicPartition] = []
        with suppress(KafkaException):
            assigned = self._consumer.assignment()
        if assigned:
            asyncio.run_coroutine_threadsafe(_awaited(self._on_revoked([(tp.topic, tp.partition) for tp in assigned], True)), self._loop)
        with suppress(KafkaException, RuntimeError):
            self._consumer.close()
        self._waiting.clear()
        self._consumer = self._create(classic=self._settings.kafka.group_protocol != "consumer")
        self._dead = False
        with mapped():
            self._consumer.subscribe(self._patterns, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    async def start(self, offsets: Mapping[Partition, int]) -> None:
        """Read these partitions from these offsets on; what was fetched before is void, of whatever partition: name all that are read."""
        await self._call(self._start, dict(offsets))

    def _start(self, offsets: dict[Partition, int]) -> None:
        self._rewinds += 1
        self._waiting.clear()
        with mapped():  # `_seek` may poll: nothing must arrive between two seeks
            self._consumer.pause(self._consumer.assignment())
        for (topic, partition), offset in offsets.items():
            self._seek(TopicPartition(topic, partition, offset))
        with mapped():
            self._consumer.resume([TopicPartition(*at) for at in offsets if self._holds(at)])
        self._paused -= set(offsets)

    def _seek(self, target: TopicPartition) -> None:
        """Right after an assignment the client may not know the partition yet: it says so, and does a moment later. One whose topic was
        made again it never finds by itself: that is assigned anew, where it is to be read from. One that is revoked meanwhile is passed over."""
        begun = time.monotonic()
        while self._holds((target.topic, target.partition)):
            try:
                self._consumer.seek(target)
                return
            except KafkaException as error:
                if error.args[0].code() != KafkaError._STATE:
                    raise translate(error.args[0]) from None
            if time.monotonic() - begun > SEEK_SECONDS:
                with mapped():
                    self._consumer.incremental_unassign([target])
                    self._consumer.incremental_assign([target])
                return
            self._consumer.poll(0.02)

    def _holds(self, partition: Partition) -> bool:
        with mapped():
            return partition in {(tp.topic, tp.partition) for tp in self._consumer.assignment()}

    async def committed(self, partitions: Iterable[Partition]) -> dict[Partition, int | None]:
        """The group's committed offsets; None where there is none."""
        wanted = [TopicPartition(t, p) for t, p in partitions]

        def read() -> dict[Partition, int | None]:
            with mapped():
                return {(tp.topic, tp.partition): tp.offset if tp.offset >= 0 else None for tp in self._consumer.committed(wanted, timeout=10)}

        return await self._call(read)

    async def watermarks(self, partition: Partition) -> tuple[int, int]:
        """-> (first offset, end offset)."""

        def read() -> tuple[int, int]:
            with mapped():
                low, high = self._consumer.get_watermark_offsets(TopicPartition(*partition), timeout=10)
                return low, high

        return await self._call(read)

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit offsets outside a transaction, in the background: for batches that project nothing. Thread-safe."""
        with mapped():
            self._consumer.commit(offsets=[TopicPartition(t, p, o) for (t, p), o in offsets.items()], asynchronous=True)

    async def commit_start(self, partition: Partition, offset: int) -> None:
        """Record where a group begins, before anything is stored: no committed offset beside a lease then means a lost one."""

        def commit() -> None:
            with mapped():
                self._consumer.commit(offsets=[TopicPartition(*partition, offset)], asynchronous=False)

        await self._call(commit)

    async def group_metadata(self) -> Any:
        """Of this moment. What is owned when this returns may be committed with it."""
        return await self._call(self._consumer.consumer_group_metadata)

    async def assignment(self) -> list[Partition]:
        def read() -> list[Partition]:
            with mapped():
                return [(tp.topic, tp.partition) for tp in self._consumer.assignment()]

        return await self._call(read)

    async def close(self) -> None:
        """Leave the group; callbacks run. A static member's partitions stay its own until the session times out."""
        # librdkafka waits for itself, for ever, where it is closed while an assignment is on its way: the process ends without it
        closing = Thread(target=self._consumer.close, name="kafka-source-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_SECONDS)
        if closing.is_alive():
            telemetry.log.warning("the consumer does not close, and is left behind", extra={"action": "stop"})
        self._thread.shutdown(wait=False)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Paused, at an offset that asks the broker nothing: leases and both cursors are read outside this callback, then `start` seeks.
        consumer.incremental_assign([TopicPartition(tp.topic, tp.partition, 0) for tp in partitions])
        consumer.pause(partitions)
        fresh = [(tp.topic, tp.partition) for tp in partitions]
        self._paused |= set(fresh)
        self._loop.call_soon_threadsafe(self._on_assigned, fresh)

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._let_go(consumer, partitions, lost=False)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._let_go(consumer, partitions, lost=True)

    def _let_go(self, consumer: Consumer, partitions: list[TopicPartition], *, lost: bool) -> None:
        gone = [(tp.topic, tp.partition) for tp in partitions]
        settled = asyncio.run_coroutine_threadsafe(_awaited(self._on_revoked(gone, lost)), self._loop)
        with suppress(FutureTimeoutError):
            settled.result(RELEASE_SECONDS)
        self._paused -= set(gone)
        consumer.incremental_unassign(partitions)


async def _awaited(awaitable: Awaitable[None]) -> None:
    await awaitable
