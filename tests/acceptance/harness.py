"""What the acceptance tests share: a deployment with topics of its own, data planes as real processes, numbered events, and the checker.

    world = World(tmp_path, bootstrap, dsn, unique("w"))           # configuration, key file, source topic
    await world.prepare()                                         # migrated database, topics
    with world.start("a") as a, world.start("b"):                 # `python -m sidecar run`; killed at the end of the block
        world.publish(1000)                                       # event n: tenant n % 3, stream n % 12; acknowledged by the broker
        await world.settled()                                     # both cursors stand behind the last event
        a.kill(), a.stop()                                        # SIGKILL; SIGTERM -> the exit code
    await world.check()                                           # nothing lost, twice or out of order in store and view

`plane(world, "a", Subclass)` is a data plane in the test's own process, with a pipeline that the test hooks or breaks.

A checker is two methods: `faults` says what is wrong, `check` asserts that nothing is. A control asserts on the first.
"""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from sidecar.app import compose
from sidecar.kafka.admin import Admin
from sidecar.kms.file import create_key_file
from sidecar.pipeline import Pipeline
from sidecar.postgres import migrations
from sidecar.postgres.connection import connected
from sidecar.settings import Settings, load
from sidecar.testing.control_plane import PATIENCE_SECONDS, read_topic

CAMPAIGN = os.environ.pop("SIDECAR_CAMPAIGN", "") == "full"
"""Long campaigns run in a short form unless SIDECAR_CAMPAIGN=full. Popped: the product takes SIDECAR_* for settings."""

Stream = tuple[str, str]
Expected = Mapping[Stream, list[str]]
"""(tenant, stream) -> the message ids published to it, in order."""


@dataclass
class Instance:
    """A data plane as a process of its own: ours to stop or kill."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self) -> "Instance":
        """Returns when it said `ready`: topics and schema are there, the producer and the guard session are open."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "\nready " not in "\n" + self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not ready (exit {self.process.poll()}):\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def said(self, action: str) -> list[dict[str, Any]]:
        """Its log lines with that action."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("action") == action]


class World:
    """One deployment of one test: configuration, key file, topics, and what was published to them."""

    def __init__(
        self, folder: Path, bootstrap: str, dsn: str, deployment: str, *, partitions: int = 4, view_partitions: int = 3, **sections: dict[str, Any]
    ) -> None:
        """`sections` are merged into the configuration's sections of these names, one level deep."""
        self.folder, self.bootstrap, self.dsn, self.deployment, self.partitions = folder, bootstrap, dsn, deployment, partitions
        self.topic, self.view_topic = f"{deployment}.users", f"{deployment}.view"
        document: dict[str, Any] = {
            "deployment": deployment,
            "kafka": {"bootstrap_servers": bootstrap},
            "postgres": {"dsn": dsn},
            "kms": {"uri": "file:./keys/kek"},
            "sources": [{"topic": self.topic}],
            "classes": [{"class": "CartData", "when": {"stream": "cart-*"}}, {"class": "UserPersonalData", "when": {"topic": self.topic}}],
            "views": [{"name": "users", "topic": self.view_topic, "partitions": view_partitions, "match": {"topics": [self.topic]}}],
            "control": {
                "topic": f"{deployment}.control",
                "receipts": f"{deployment}.receipts",
                "ledger": f"{deployment}.ledger",
                "allow_unsigned": True,
            },
            "dead_letters": {"topic": f"{deployment}.dead"},
            "batch": {"max_records": 200, "max_wait_ms": 20},
            "http": {"port": 0},
        }
        for name, section in sections.items():
            document[name] = section if isinstance(section, list) else document.get(name, {}) | section
        self.config = folder / "sidecar.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(json.dumps(document))  # JSON is YAML
        self.key_file = folder / "keys" / "kek"
        create_key_file(self.key_file)
        self.settings: Settings = load(self.config)
        self.admin = Admin(self.settings)
        self.expected: dict[Stream, list[str]] = {}
        self.ends: dict[tuple[str, int], int] = {}
        self._number = 0
        self._asking = Consumer({"bootstrap.servers": bootstrap, "group.id": self.settings.group_id, "log_level": 0})

    async def prepare(self) -> None:
        """The source topic and a migrated database; the rest `run` makes itself in development."""
        self.admin.create(self.topic, self.partitions, {})
        async with connected(self.dsn) as connection:
            await migrations.migrate(connection)

    def launch(self, name: str, *, main: str = "", environment: Mapping[str, str] | None = None) -> Instance:
        """Start a data plane and do not wait. `main`: Python source to run instead of `-m sidecar`, given the configuration and the name."""
        log = self.folder / f"{name}-{secrets.token_hex(3)}.log"
        command = ["-c", main, str(self.config), name] if main else ["-m", "sidecar", "--config", str(self.config), "run", "--instance-id", name]
        with log.open("wb") as stderr:
            process = subprocess.Popen([sys.executable, *command], stderr=stderr, stdout=stderr, env=dict(os.environ) | dict(environment or {}))
        return Instance(name, process, log)

    @contextmanager
    def start(self, name: str, **options: Any) -> Iterator[Instance]:
        """A data plane that serves; killed at the end of the block if it still runs."""
        instance = self.launch(name, **options)
        try:
            yield instance.wait_ready()
        finally:
            instance.kill()

    def publish(
        self, count: int, *, tenants: int = 3, streams: int = 12, prefix: str = "s", size: int = 100, aborted: int = 0, per_second: float = 0
    ) -> None:
        """The next numbered events, keyed by stream; returns when the broker has all of them.

        With `aborted`, in transactions of 10 records, of which every `aborted`-th is aborted and not expected: offsets have holes.
        """
        more = {"transactional.id": f"{self.deployment}.app"} if aborted else {}
        producer = Producer({"bootstrap.servers": self.bootstrap, "enable.idempotence": True, "linger.ms": 5, "log_level": 0, **more})
        if aborted:
            producer.init_transactions(20)
        for first in range(0, count, 10):
            keep = not aborted or (first // 10) % aborted != aborted - 1
            if aborted:
                producer.begin_transaction()
            for _ in range(min(10, count - first)):
                self._produce(producer, self._number % tenants, self._number % streams, prefix, size, keep=keep)
            if aborted:
                producer.commit_transaction(20) if keep else (producer.flush(60), producer.abort_transaction(20))
            if per_second:
                time.sleep(10 / per_second)
        assert producer.flush(120) == 0, "the broker did not take all events"

    def _produce(self, producer: Producer, tenant: int, number: int, prefix: str, size: int, *, keep: bool) -> None:
        n, stream, tenant_id = self._number, f"{prefix}{number}", f"tenant-{tenant}"
        self._number += 1
        message_id = f"e{n}" if keep else f"aborted-{n}"
        attributes = {"specversion": "1.0", "id": message_id, "source": "/test", "type": "user.changed", "tenantid": tenant_id, "streamid": stream}
        headers: list[tuple[str, str | bytes | None]] = [(f"ce_{name}", text) for name, text in attributes.items()]
        if keep:
            self.expected.setdefault((tenant_id, stream), []).append(message_id)

        def delivered(error: KafkaError | None, message: Any) -> None:
            assert error is None, f"the broker did not take {message_id}: {error}"
            if keep:
                at = (message.topic(), message.partition())
                self.ends[at] = max(self.ends.get(at, 0), message.offset() + 1)

        while True:
            try:
                producer.produce(self.topic, body(message_id, size), stream, (tenant * 7 + number) % self.partitions, delivered, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)

    @property
    def count(self) -> int:
        return sum(map(len, self.expected.values()))

    async def stored(self) -> int:
        return int(await query(self.dsn, "SELECT count(*) FROM messages") or 0)

    def committed(self) -> dict[tuple[str, int], int]:
        """The group's committed offsets, of the source topic's partitions."""
        every = {(self.topic, partition) for partition in range(self.partitions)} | self.ends.keys()
        found = self._asking.committed([TopicPartition(*at) for at in every], timeout=10)
        return {(tp.topic, tp.partition): tp.offset for tp in found}

    async def settled(self) -> None:
        """Both cursors of every partition stand behind the last event that was published: no more is to come of it."""
        wanted = dict(self.ends)
        await until(lambda: self._is_settled(wanted), f"every event of {wanted} stored and projected")

    async def _is_settled(self, wanted: Mapping[tuple[str, int], int]) -> bool:
        try:
            committed = await asyncio.to_thread(self.committed)
        except KafkaException:
            return False
        return all(committed.get(at, 0) >= end for at, end in wanted.items())

    async def check(self) -> None:
        """Every published event once and in order, in the store and in the view as a `read_committed` consumer sees it; nothing else."""
        faults = await self.faults()
        assert not faults, str(faults)

    async def faults(self) -> "Faults":
        return await find_faults(self)


@asynccontextmanager
async def plane(world: World, name: str, pipeline: Callable[[Any], Any] = Pipeline) -> AsyncIterator[Any]:
    """A data plane in this process, for tests that delay, break or watch a step: a subclass of Pipeline. Stopped gracefully at the end."""
    stop = asyncio.Event()
    composed = await compose(world.settings, name, pipeline_of=pipeline)
    task = asyncio.create_task(composed.run(stop))
    try:
        await until(lambda: task.done() or composed.pipeline.ready[0], f"{name} serves")
        if task.done():
            task.result()
        yield composed.pipeline
    finally:
        stop.set()
        await task


def body(message_id: str, size: int) -> bytes:
    """The value of an event: it names itself."""
    return json.dumps({"id": message_id, "secret": "x" * size}).encode()


# ── the checker ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Faults:
    """What is wrong, by invariant: message ids, or streams with what they hold in place of what they should."""

    lost_in_store: list[str] = field(default_factory=list)
    twice_in_store: list[str] = field(default_factory=list)
    disorder_in_store: list[str] = field(default_factory=list)
    lost_in_view: list[str] = field(default_factory=list)
    twice_in_view: list[str] = field(default_factory=list)
    disorder_in_view: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    """Events or values that nobody published."""

    def __bool__(self) -> bool:
        return any(self.__dict__.values())

    def __str__(self) -> str:
        return "; ".join(f"{name}: {len(found)}, e.g. {found[:3]}" for name, found in self.__dict__.items() if found) or "none"


async def find_faults(world: World) -> Faults:
    """Compare store and view with what was published: I1 nothing lost, I2 nothing twice, I3 positions 1, 2, 3 in Kafka's order."""
    faults = Faults()
    rows = await query_all(world.dsn, "SELECT tenant_id, stream_id, stream_position, message_id FROM messages ORDER BY 1, 2, 3")
    store: dict[Stream, list[tuple[int, str]]] = {}
    for row in rows:
        store.setdefault((row["tenant_id"], row["stream_id"]), []).append((row["stream_position"], row["message_id"]))
    view: dict[Stream, list[tuple[int, str]]] = {}
    for message in await asyncio.to_thread(read_topic, world.settings, world.view_topic):
        headers = {name: (raw or b"").decode() for name, raw in message.headers() or []}
        if json.loads(message.value())["id"] != headers["ce_id"]:
            faults.strangers.append(f"value of {headers['ce_id']}")
        view.setdefault((headers["ce_tenantid"], headers["ce_streamid"]), []).append((int(headers["ce_streamposition"]), headers["ce_id"]))
    _compare(store, world.expected, faults.lost_in_store, faults.twice_in_store, faults.disorder_in_store, faults.strangers)
    _compare(view, world.expected, faults.lost_in_view, faults.twice_in_view, faults.disorder_in_view, faults.strangers)
    return faults


def _compare(
    found: Mapping[Stream, list[tuple[int, str]]], expected: Expected, lost: list[str], twice: list[str], disorder: list[str], strangers: list[str]
) -> None:
    for stream in expected.keys() | found.keys():
        wanted, have = expected.get(stream, []), found.get(stream, [])
        counts = Counter(message_id for _, message_id in have)
        lost += [message_id for message_id in wanted if not counts[message_id]]
        twice += [message_id for message_id, count in counts.items() if count > 1]
        strangers += sorted(counts.keys() - set(wanted))
        if [message_id for _, message_id in have] != wanted or [position for position, _ in have] != list(range(1, len(have) + 1)):
            disorder.append(f"{stream}: positions {[p for p, _ in have][:5]}…, {len(have)} of {len(wanted)}")


# ── waiting and asking ──────────────────────────────────────────────────────────────────────────────────────────────────


async def until(condition: Callable[[], Any | Awaitable[Any]], what: str) -> None:
    """Wait for a condition, sync or async; fail by name when it does not come. The time is a limit, never a measure."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = condition()
        if await answer if isinstance(answer, Awaitable) else answer:
            return
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Any]:
    """A plain connection, without the product between."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def query(dsn: str, sql: str, *arguments: Any) -> Any:
    async with session(dsn) as connection:
        return await connection.fetchval(sql, *arguments)


async def query_all(dsn: str, sql: str, *arguments: Any) -> list[Any]:
    async with session(dsn) as connection:
        return list(await connection.fetch(sql, *arguments))


def stop_all(instances: Iterable[Instance]) -> None:
    for instance in instances:
        instance.kill()
