"""Events per second of the modes, in one process against one broker and one database."""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from sidecar import settings as settings_module
from sidecar.app import DataPlane, compose
from sidecar.kms.file import create_key_file
from sidecar.postgres import migrations
from sidecar.postgres.connection import connected
from sidecar.settings import Settings

PARTITIONS, TENANTS, STREAMS, VALUE_BYTES = 4, 20, 2000, 1024
numbers = itertools.count(1)


@dataclass
class Bench:
    """A stack, and the topics that were filled in it."""

    bootstrap: str
    dsn: str
    folder: Path
    filled: dict[tuple[str, int], str] = field(default_factory=dict)

    async def database(self) -> str:
        name = f"bench_{os.getpid()}_{next(numbers)}"
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        dsn = self.dsn.rpartition("/")[0] + "/" + name
        async with connected(dsn) as migrated:
            await migrations.migrate(migrated)
        return dsn

    async def drop(self, dsn: str) -> None:
        connection = await asyncpg.connect(self.dsn)
        await connection.execute(f"DROP DATABASE {dsn.rpartition('/')[2]} WITH (FORCE)")
        await connection.close()

    def topic(self, count: int, *, streams: int = STREAMS, tenants: int = TENANTS, prefix: str = "in") -> str:
        """A topic with `count` events of 1 KB; each stream on one partition."""
        at = (f"{prefix}-{streams}-{tenants}", count)
        if at not in self.filled:
            self.filled[at] = name = f"bench-{prefix}-{streams}-{tenants}-{count}"
            admin = AdminClient({"bootstrap.servers": self.bootstrap})
            for future in admin.create_topics([NewTopic(name, PARTITIONS, 1)]).values():
                future.result()
            self.fill(name, count, streams, tenants)
        return self.filled[at]

    def fill(self, topic: str, count: int, streams: int, tenants: int) -> None:
        limits = {"queue.buffering.max.messages": 1_000_000, "queue.buffering.max.kbytes": 1_048_576}
        producer = Producer({"bootstrap.servers": self.bootstrap, "linger.ms": 20} | limits)
        padding = "x" * (VALUE_BYTES - 90)
        for i in range(count):
            stream = i % streams
            tenant = f"t{stream % tenants}".encode()
            value = json.dumps({"email": f"u{i}@example.org", "name": "Some Name", "seq": i, "padding": padding}).encode()
            headers = [("ce_id", b"%032x" % i), ("ce_type", b"UserUpdated"), ("ce_tenantid", tenant), ("ce_streamid", b"s%d" % stream)]
            producer.produce(topic, value, tenant + b"/s%d" % stream, partition=stream % PARTITIONS, headers=headers)
            if i % 5000 == 0:
                producer.poll(0)
        producer.flush()

    def settings(self, topic: str, dsn: str, **more: Any) -> Settings:
        number = next(numbers)
        key = self.folder / f"kek-{number}"
        create_key_file(key)
        document: dict[str, Any] = {
            "deployment": f"bench-{os.getpid()}-{number}",
            "kafka": {"bootstrap_servers": self.bootstrap},
            "postgres": {"dsn": dsn},
            "kms": {"uri": f"file:{key}"},
            "sources": [{"topic": topic}],
            "classes": [{"class": "Bench", "when": {"topic": topic}}],
            "control": {"topic": f"control-{number}", "receipts": f"receipts-{number}", "ledger": f"ledger-{number}", "allow_unsigned": True},
            "dead_letters": {"topic": f"dead-{number}"},
            "http": {"port": 0},
        }
        return settings_module.parse(document | more, where="bench", base=self.folder)


async def drain(plane: DataPlane, count: int) -> float:
    """Events per second behind the first batch, until `count` are stored and projected: joining the group and the first fetch are not counted."""
    stop = asyncio.Event()
    task = asyncio.create_task(plane.run(stop))
    started, first, done = 0.0, 0, 0
    while not task.done() and done < count:
        await asyncio.sleep(0.005)
        done = sum(min(lease.stored, lease.projected) for lease in list(plane.pipeline.owned.values()))
        if done and not first:
            started, first = time.perf_counter(), done
    seconds = time.perf_counter() - started
    stop.set()
    await task
    return (done - first) / seconds


async def bare_loader(bench: Bench, topic: str, count: int) -> float:
    """consume → COPY of the values as they are, into the same table: what any loader does."""
    dsn = await bench.database()
    connection = await asyncpg.connect(dsn)
    # confluent's client is handed batches of the product's size; offsets are committed behind each COPY
    consumer = Consumer({"bootstrap.servers": bench.bootstrap, "group.id": f"bare-{os.getpid()}-{next(numbers)}", "enable.auto.commit": False,
                         "isolation.level": "read_committed", "queued.max.messages.kbytes": 65_536})  # fmt: skip
    consumer.assign([TopicPartition(topic, p, 0) for p in range(PARTITIONS)])
    columns = ["tenant_id", "stream_id", "stream_position", "message_id", "message_type", "data", "source_id", "source_partition", "source_offset"]
    done, first, started = 0, 0, None
    while done < count:
        messages = [m for m in consumer.consume(2000, 0.5) if not m.error()]
        if not messages:
            continue
        rows = []
        for m in messages:
            h = dict(m.headers())
            tenant, stream = h["ce_tenantid"].decode(), h["ce_streamid"].decode()
            rows.append((tenant, stream, m.offset(), h["ce_id"].decode(), h["ce_type"].decode(), m.value(), 1, m.partition(), m.offset()))
        await connection.copy_records_to_table("messages", records=rows, columns=columns)
        consumer.commit(asynchronous=True)
        done += len(messages)
        if started is None:
            started, first = time.perf_counter(), done
    rate = (done - first) / (time.perf_counter() - (started or 0))
    consumer.close()
    await connection.close()
    await bench.drop(dsn)
    return rate


async def product(bench: Bench, topic: str, count: int, *, encrypt: bool, view: bool = False, strip: Callable[[], Any] | None = None) -> float:
    dsn = await bench.database()
    number = next(numbers)
    views = [{"name": f"view{number}", "topic": f"view-{number}", "partitions": 4}] if view else []
    settings = bench.settings(topic, dsn, views=views, policies={"install": [{"class": "Bench", "encrypt": encrypt}]})
    plane = await compose(settings, f"bench-{number}")
    restore = strip() if strip else None
    try:
        return await drain(plane, count)
    finally:
        if restore:
            restore()
        await bench.drop(dsn)


def without_policy_and_keys() -> Callable[[], None]:
    """The same loop with classification, policy and key look-up taken out: every stream is plain, no tenant is checked."""
    from sidecar.pipeline import Pipeline
    from sidecar.streams import Streams

    kept = (Streams._equip, Pipeline._verify)

    async def nothing(*_: Any) -> None:
        return None

    Streams._equip = nothing  # type: ignore[assignment,method-assign]
    Pipeline._verify = lambda *_: None  # type: ignore[assignment,method-assign]

    def restore() -> None:
        Streams._equip, Pipeline._verify = kept  # type: ignore[method-assign]

    return restore


async def ratios(bench: Bench, count: int, rounds: int) -> dict[str, Any]:
    topic = bench.topic(count)
    modes: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare_loader(bench, topic, count),
        "plain": lambda: product(bench, topic, count, encrypt=False),
        "stripped": lambda: product(bench, topic, count, encrypt=False, strip=without_policy_and_keys),
        "encrypted": lambda: product(bench, topic, count, encrypt=True),
        "view": lambda: product(bench, topic, count, encrypt=True, view=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in modes}
    for number in range(rounds + 1):  # the first round warms caches and is not counted
        for name, mode in modes.items():
            rate = await mode()
            print(f"  round {number} {name:10s} {rate:8.0f} events/s", file=sys.stderr)
            if number:
                rates[name].append(rate)
    pair = lambda a, b: [x / y for x, y in zip(rates[a], rates[b], strict=True)]  # noqa: E731
    return {f"{name} events/s": values for name, values in rates.items()} | {
        "encrypted / plain": pair("encrypted", "plain"),
        "encrypted / bare loader": pair("encrypted", "bare"),
        "view / bare loader": pair("view", "bare"),
        "plain / no policy and keys": pair("plain", "stripped"),
    }


def config_file(bench: Bench, settings: Settings, dsn: str, topic: str, **more: Any) -> Path:
    """The same settings for a process of its own."""
    file = bench.folder / f"{settings.deployment}.yaml"
    document = {
        "deployment": settings.deployment,
        "kafka": {"bootstrap_servers": bench.bootstrap},
        "postgres": {"dsn": dsn},
        "kms": {"uri": settings.kms.uri},
        "sources": [{"topic": topic}],
        "control": settings.control.model_dump(mode="json", exclude_none=True),
        "dead_letters": settings.dead_letters.model_dump(mode="json"),
        "http": {"port": 0},
    }
    file.write_text(json.dumps(document | more))
    return file


async def new_streams(bench: Bench, count: int, rounds: int) -> dict[str, Any]:
    """One event and a new DEK each."""
    topic = bench.topic(count, streams=count, prefix="new")
    rates = [await product(bench, topic, count, encrypt=True) for _ in range(rounds)]
    return {"new streams per second": rates}


def _resident_pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


async def memory(bench: Bench, count: int) -> dict[str, Any]:
    """Resident memory of a data plane in a process of its own after it has seen that many streams."""
    dsn = await bench.database()
    topic = bench.topic(count, streams=count, prefix="new")
    settings = bench.settings(topic, dsn, policies={"install": [{"class": "Bench", "encrypt": True}]})
    config = config_file(bench, settings, dsn, topic)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "--config", str(config), "run", "--instance-id", "memory", stderr=asyncio.subprocess.DEVNULL
    )
    peak = 0.0
    try:
        async with connected(dsn) as connection:
            stored = 0
            while stored < count and process.returncode is None:
                await asyncio.sleep(0.5)
                stored = await connection.fetchval("SELECT coalesce(sum(next_offset), 0)::bigint FROM partition_leases")
                pages = _resident_pages(process.pid)
                peak = max(peak, pages * os.sysconf("SC_PAGESIZE") / 2**20)
            streams = await connection.fetchval("SELECT count(*) FROM streams")
    finally:
        process.terminate()
        await process.wait()
    await bench.drop(dsn)
    return {"memory after a million streams MB": peak, "streams seen": streams}
